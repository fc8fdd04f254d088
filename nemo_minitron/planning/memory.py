"""Bytes on the fullest rank of a stage that runs a model."""

from copy import copy
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from nemo_minitron.config.layout import padded_vocab_size
from nemo_minitron.config.megatron import merged_recompute
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.pipeline import ClusterConfig
from nemo_minitron.config.stages import (
    DistillConfig,
    ImportanceConfig,
    PruneConfig,
    TeacherLogitsConfig,
)
from nemo_minitron.config.training import TrainerConfig
from nemo_minitron.config.training_stages import TrainingStageConfig
from nemo_minitron.data.checks import check_batches, check_sequence
from nemo_minitron.planning import activations
from nemo_minitron.planning.activations import Tokens
from nemo_minitron.planning.precision import TrainedBytes, fp8, weight_bytes
from nemo_minitron.planning.shares import Share, shares

GIB = float(1 << 30)
# Buffers [chunk_size, v / tp] in fp32 of the loss: student, teacher, and what the loss makes.
_LOGIT_BUFFERS = 4
_RECEIVED = 3  # hidden states from a teacher on ranks of its own: the loss's, and two in advance


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by what they are for."""

    weights: float
    """Weights of the model that is run or trained."""
    gradients: float
    """Megatron's buffer, fp32 unless ``megatron.ddp.grad_reduce_in_fp32=false``."""
    optimizer: float
    """Adam's moments, and main weights in fp32 beside weights in bf16."""
    teacher: float
    """The teacher's weights, and its last hidden states of a global batch."""
    activations: float
    logits: float
    """Chunks of logits, and the gradient of the output layer."""

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return float(sum(asdict(self).values()))

    def in_gib(self) -> dict[str, float]:
        """Return all parts and their total in GiB, for tables and files."""
        return {f.name: getattr(self, f.name) / GIB for f in fields(self)} | {
            "total": self.total / GIB
        }


@dataclass(frozen=True)
class Job:
    """One item on its ranks.

    Attributes:
        cfg: config of the stage.
        model: what it runs or trains.
        teacher: what it distils from, where a teacher is built.
        data_parallel_size: model replicas.
        on_gpus: whether the ranks have GPUs.
    """

    cfg: Any
    model: ModelConfig
    teacher: ModelConfig | None
    data_parallel_size: int
    on_gpus: bool

    @property
    def parallel(self) -> ParallelConfig:
        """The layout of the model."""
        parallel: ParallelConfig = self.cfg.parallel
        return parallel

    @property
    def megatron(self) -> Any:
        """Megatron's own settings; the parts that the stage has."""
        return self.cfg.megatron

    @property
    def trainer(self) -> TrainerConfig:
        """Trainer settings of a training stage, with recomputation from either section."""
        return merged_recompute(self.cfg.trainer, self.cfg.megatron)

    @property
    def trains(self) -> bool:
        """Whether there are gradients and an optimizer."""
        return isinstance(self.cfg, TrainingStageConfig)

    @property
    def bf16(self) -> bool:
        """Whether weights and activations are bf16."""
        if isinstance(self.cfg, ImportanceConfig | PruneConfig):  # of the stages that score
            return self.on_gpus and self.model.dtype != "float32"
        trainer = getattr(self.cfg, "trainer", None)  # evaluate has none, and runs in fp32
        return trainer is not None and trainer.precision == "bf16-mixed"

    @property
    def element(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.bf16 else 4

    @property
    def teacher_apart(self) -> ParallelConfig | None:
        """Layout of a teacher on ranks of its own."""
        if self.teacher is None or not isinstance(self.cfg, DistillConfig):
            return None
        where = self.cfg.teacher_parallel
        return where.of(self.parallel) if where.own_ranks else None

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches of one replica in a global batch."""
        data = self.cfg.data
        return max(1, data.global_batch_size // (data.micro_batch_size * self.data_parallel_size))

    def of_phases(self) -> list["Job"]:
        """Return the phases of a training, each as a job of its own; otherwise this one alone."""
        return [replace(self, cfg=cfg) for cfg in stage_of_each_phase(self.cfg)]


def stage_of_each_phase(cfg: Any) -> list[Any]:
    """The config of a stage as it is in each phase of a training; of another stage as it is."""
    if not isinstance(cfg, TrainingStageConfig) or cfg.trainer.phases is None:
        return [cfg]
    found = []
    for phase in cfg.phases():
        one = copy(cfg)  # ``replace`` would check it as a whole training
        one.data = phase.data
        one.trainer = replace(cfg.trainer, max_steps=phase.steps, phases=None)
        found.append(one)
    return found


def check_split(cfg: Any, ranks: int) -> None:
    """Refuse samples or batches that cannot be dealt out, in any phase.

    Raises:
        ValueError: see ``data.checks``.
    """
    for one in stage_of_each_phase(cfg):
        if isinstance(cfg, TeacherLogitsConfig):  # it deals out samples, not batches
            check_sequence(one.data, cfg.parallel)
        else:
            check_batches(one.data, cfg.parallel, ranks)


def fullest_rank(job: Job) -> Memory:
    """Return the memory of the pipeline stage that needs most, in the phase that needs most.

    Ranks that run a teacher alone count, too.
    """
    found = []
    for one in job.of_phases():
        found += [_rank_memory(one, share) for share in shares(job.model, job.parallel)]
        found += _ranks_of_teacher(one)
    return max(found, key=lambda memory: memory.total)


def fits(memory: Memory, cluster: ClusterConfig) -> bool:
    """Whether a rank has room for all of it."""
    return memory.total <= (cluster.gpu_memory_gb - cluster.reserved_memory_gb) * GIB


def _tokens(job: Job, parallel: ParallelConfig) -> Tokens:
    kinds = {"bf16": job.bf16, "fp8": fp8(job.megatron), "fused": job.on_gpus}
    return Tokens.of(job.cfg.data, parallel, **kinds)


def _rank_memory(job: Job, share: Share) -> Memory:
    tokens = _tokens(job, job.parallel)
    weights = weight_bytes(job.model, share, job.megatron, job.element, trained=job.trains)
    last = share.stage == job.parallel.pipeline_model_parallel_size - 1
    logits = _logits(job, share, tokens) if last else 0.0
    if not job.trains:
        # Forward only: a layer at a time, and hidden states on their way through the pipeline.
        kept = activations.layer(job.model, job.parallel, tokens, share.kinds)
        return Memory(weights, 0.0, 0.0, 0.0, kept, logits)
    ahead = activations.micro_batches_in_flight(job.parallel, share.stage, job.micro_batches)
    held = activations.stage(job.model, job.parallel, tokens, job.trainer, share.kinds, ahead)
    if last:  # the final norm and the hidden states that the loss gathers, with their gradient
        state = job.model.hidden_size * tokens.count * tokens.element
        held += 2 * activations.residual(job.model, job.parallel, tokens) + 2 * state
        held += activations.prediction(job.model, job.parallel, tokens, job.trainer)
    teacher, during = _teacher(job, share.stage, tokens)
    # Weights that wait in host memory are back while no activation of the student exists.
    return Memory(
        weights=weights,
        gradients=float(share.total * TrainedBytes.of(job.megatron, bf16=job.bf16).gradient),
        optimizer=_optimizer(job, share),
        teacher=teacher,
        activations=max(held + logits, during) - logits,
        logits=logits,
    )


def _optimizer(job: Job, share: Share) -> float:
    """Return bytes of Adam's state; the distributed optimizer splits it over the replicas."""
    each = TrainedBytes.of(job.megatron, bf16=job.bf16).optimizer
    if not job.cfg.optim.use_distributed_optimizer:
        return float(each * share.total)
    replicas = job.data_parallel_size * job.parallel.context_parallel_size
    experts = share.expert * job.parallel.expert_model_parallel_size
    return each * (share.dense + experts) / replicas


def _teacher(job: Job, stage: int, tokens: Tokens) -> tuple[float, float]:
    """Return the teacher's bytes during the whole step, and those of its own pass alone."""
    if job.teacher is None or not isinstance(job.cfg, DistillConfig):
        return 0.0, 0.0
    if job.teacher_apart is not None:
        last = stage == job.parallel.pipeline_model_parallel_size - 1
        return (_received(job, job.teacher, tokens) if last else 0.0), 0.0
    cfg, parallel = job.cfg, job.cfg.teacher_parallel.of(job.parallel)
    share = shares(job.teacher, parallel)[stage]
    weights = weight_bytes(job.teacher, share, job.megatron, job.element, trained=False)
    state = activations.residual(job.teacher, parallel, tokens)
    last = stage == parallel.pipeline_model_parallel_size - 1
    inner = len(cfg.distillation.intermediate.losses)
    states = job.micro_batches * state * (int(last) + inner)
    once = activations.layer(job.teacher, parallel, tokens, share.kinds)
    if not cfg.distillation.offload_teacher:
        return weights + states, once
    stays = share.output * job.element
    return stays + states, weights - stays + once


def _received(job: Job, teacher: ModelConfig, tokens: Tokens) -> float:
    """Return bytes on the student's last stage of a teacher that is on ranks of its own.

    Its output layer, from which the loss makes logits, and hidden states of micro-batches.
    """
    tp = job.parallel.tensor_model_parallel_size
    rows = padded_vocab_size(teacher.vocab_size, tp) // tp
    states = _RECEIVED * tokens.count * tokens.element
    return float((rows * job.element + states) * teacher.hidden_size)


def _ranks_of_teacher(job: Job) -> list[Memory]:
    """Return the memory of the ranks that run only the teacher, one for each pipeline stage."""
    parallel, teacher = job.teacher_apart, job.teacher
    if parallel is None or teacher is None:
        return []
    found, tokens = [], _tokens(job, parallel)
    for share in shares(teacher, parallel):
        weights = weight_bytes(teacher, share, job.megatron, job.element, trained=False)
        kept = activations.layer(teacher, parallel, tokens, share.kinds)
        found.append(Memory(0.0, 0.0, 0.0, weights, kept, 0.0))
    return found


def _logits(job: Job, share: Share, tokens: Tokens) -> float:
    """Buffers of the chunked loss (``distillation/logit_loss.py``) on the last stage."""
    cfg = job.cfg
    chunk = getattr(cfg, "chunk_size", None) or (
        cfg.distillation.chunk_size if isinstance(cfg, DistillConfig) else 256
    )
    rows = -(-job.model.vocab_size // job.parallel.tensor_model_parallel_size)
    buffers = _LOGIT_BUFFERS * min(chunk, tokens.count) * rows * 4
    if not job.trains:
        return float(buffers)
    # The gradient of the output layer: summed up in fp32, then in the precision of the weight.
    return float(buffers + share.output * (4 + job.element))
