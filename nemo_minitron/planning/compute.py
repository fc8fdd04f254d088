"""Floating-point operations, tokens and GPU hours of a stage."""

from dataclasses import dataclass
from itertools import chain

from nemo_minitron.config.layers import ATTENTION, LINEAR, MAMBA, kinds_of
from nemo_minitron.config.layout import layers_of_stages
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import own_ranks
from nemo_minitron.config.pipeline import ClusterConfig
from nemo_minitron.config.stages import (
    DistillConfig,
    ImportanceConfig,
    PruneConfig,
    SearchConfig,
    TeacherLogitsConfig,
)
from nemo_minitron.config.training_stages import TrainingStageConfig
from nemo_minitron.planning.memory import Job
from nemo_minitron.planning.shares import matmul_parameters
from nemo_minitron.search import candidates


@dataclass(frozen=True)
class Work:
    """The tokens and operations of a stage.

    Attributes:
        tokens: number that go through the model without validation, or None for all of the data.
        flops: of all ranks together, recomputation included.
    """

    tokens: int | None
    flops: float | None

    def gpu_hours(self, cluster: ClusterConfig, mfu: float) -> float | None:
        """Time of all ranks at a share ``mfu`` of the peak, hours."""
        if self.flops is None:
            return None
        return self.flops / (cluster.peak_tflops * 1e12 * mfu) / 3600


def forward_parts(config: ModelConfig, seq_length: int) -> dict[str, float]:
    """Return operations of one token's forward pass, by part of the model.

    As Megatron-LM counts them (``num_floating_point_operations``): a multiply and an add each, the
    masked half of attention included, and layers for multi-token prediction where there are any.

    Args:
        config: global sizes.
        seq_length: positions that a token attends to.

    Returns:
        ``attention`` (its four matrices), ``core_attn`` (scores and their product with the values),
        ``mlp``, ``experts``, ``mamba``, ``scan``, ``prediction`` and ``output``.
    """
    products = {name: 2.0 * size for name, size in matmul_parameters(config).items()}
    kinds = kinds_of(config)
    windows = config.window_size or [0] * config.num_layers
    seen = sum(
        min(window or seq_length, seq_length)
        for window, letters in zip(windows, kinds, strict=True)
        if ATTENTION in letters
    )
    inner = (config.mamba_num_heads or 0) * (config.mamba_head_dim or 0)
    scan = 7.0 * inner * (config.mamba_state_dim or 0) * "".join(kinds).count(MAMBA)
    # What is read, written and forgotten of a state of each value head, four multiplications each.
    state = (config.linear_key_head_dim or 0) * (config.linear_value_head_dim or 0)
    linear = "".join(kinds).count(LINEAR) * (config.linear_num_value_heads or 0)
    scan += 8.0 * linear * state
    # Scores and values for each position that is seen.
    core = 2.0 * config.num_attention_heads * (config.query_channels + config.kv_channels)
    products["prediction"] += (config.mtp_num_layers or 0) * seq_length * core
    return {**products, "core_attn": seen * core, "scan": scan}


def forward_flops(config: ModelConfig, seq_length: int) -> float:
    """Return operations of one token's forward pass."""
    return sum(forward_parts(config, seq_length).values())


def built_teacher(cfg: DistillConfig, student: ModelConfig, teacher: ModelConfig) -> ModelConfig:
    """Return the teacher as ``distill`` builds it.

    Its layers for multi-token prediction are left out unless the student has such layers and both
    models are on the same ranks (docs/design/mtp.md).
    """
    if student.mtp_num_layers is None or own_ranks(cfg):
        return teacher.without_prediction()
    return teacher


def training_flops(model: ModelConfig, teacher: ModelConfig | None, seq_length: int) -> float:
    """Return operations of one token of a training, without what the backward pass does again."""
    # The backward pass takes twice the forward pass.
    each = 3 * forward_flops(model, seq_length)
    return each if teacher is None else each + forward_flops(teacher, seq_length)


def work(job: Job) -> Work:
    """Return tokens and operations of an item, of all its phases."""
    parts = [_work(one) for one in job.of_phases()]
    tokens, flops = [part.tokens for part in parts], [part.flops for part in parts]
    if None in tokens or None in flops:
        return Work(None, None)
    return Work(sum(filter(None, tokens)), sum(filter(None, flops)))


def _work(job: Job) -> Work:
    tokens = _tokens(job)
    if tokens is None:
        return Work(None, None)
    cfg, length = job.cfg, job.cfg.data.seq_length
    if isinstance(cfg, SearchConfig):
        found = [job.model.resized(one.sizes) for one in candidates(job.model, cfg.search)]
        return Work(
            len(found) * tokens, tokens * sum(forward_flops(small, length) for small in found)
        )
    if not isinstance(cfg, TrainingStageConfig):
        return Work(tokens, forward_flops(job.model, length) * tokens)
    teacher = job.teacher if isinstance(cfg, DistillConfig) else None
    each = training_flops(job.model, teacher, length) + recomputed_flops(job, cfg, length)
    return Work(tokens, each * tokens)


def _tokens(job: Job) -> int | None:
    cfg = job.cfg
    if isinstance(cfg, TrainingStageConfig | TeacherLogitsConfig):
        return int(cfg.trainer.max_steps * cfg.data.global_batch_size * cfg.data.seq_length)
    if not cfg.data.given or cfg.data.num_samples is None:
        return None
    samples = cfg.data.num_samples
    if isinstance(cfg, ImportanceConfig):
        samples += _ablation_passes(cfg, job.model.num_layers) * cfg.scores.lm_loss_samples
    if isinstance(cfg, PruneConfig):
        samples *= cfg.pruning.iterations
    return int(samples * cfg.data.seq_length)


def _ablation_passes(cfg: ImportanceConfig, layers: int) -> float:
    """Passes through the whole model that losses without layers take.

    One for each layer or block, through the layers from it on: half of them on average.
    """
    passes = layers / 2 if cfg.scores.layers_by("lm_loss") else 0.0
    if cfg.scores.layers_by("block_lm_loss"):
        passes += sum((layers - size + 1) / 2 for size in cfg.scores.block_sizes)
    return passes


def recomputed_flops(job: Job, cfg: TrainingStageConfig, seq_length: int) -> float:
    """Return operations of one token that the backward pass does again."""
    trainer, parts = job.trainer, forward_parts(job.model, seq_length)
    if trainer.recompute_granularity is None:
        return 0.0
    if trainer.recompute_granularity == "selective":
        names = {"moe": "experts"}
        modules = trainer.recompute_modules or ["core_attn"]
        return sum(parts[names.get(module, module)] for module in modules)
    layers = sum(parts.values()) - parts["output"]
    if trainer.recompute_method == "uniform":
        return layers
    chunks = chain.from_iterable(layers_of_stages(job.model, job.parallel))
    count = sum(min(size, trainer.recompute_num_layers or 0) for size in chunks)
    return (layers - parts["prediction"]) * count / job.model.num_layers
