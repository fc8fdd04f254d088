"""One dataclass per stage: what ``minitron <stage> key=value`` accepts."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from omegaconf import MISSING

from nemo_minitron.config.axes import AXES, NEVER_PRUNED, score_axes, targets
from nemo_minitron.config.base import (
    ADDED,
    INPUT,
    MAY_CHANGE,
    NEUTRAL,
    StageConfig,
    check_values,
    may_change,
    one_of,
    with_earlier_default,
)
from nemo_minitron.config.inference import BenchmarkConfig, EvaluateConfig, GenerateConfig
from nemo_minitron.config.megatron import ForwardMegatronConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.pipeline import PipelineConfig, PlanConfig
from nemo_minitron.config.search import SearchConfig
from nemo_minitron.config.sources import SourcesStageConfig
from nemo_minitron.config.training import CALIBRATION_SAMPLES, DataConfig, OptionalDataConfig
from nemo_minitron.config.training_stages import (
    DistillConfig,
    FinetuneConfig,
    TeacherLogitsConfig,
)
from nemo_minitron.runtime.plugins import added


@dataclass(kw_only=True)
class ImportConfig(StageConfig):
    """Hugging Face folder, GGUF file, or checkpoint of Megatron or NeMo -> Megatron checkpoint."""

    source: str = field(default=MISSING, metadata=INPUT)
    """Hugging Face model folder (config.json + safetensors), a .gguf file, a ``torch_dist``
    checkpoint of Megatron-LM, Megatron-Bridge or NeMo 2, or a .nemo archive of a GPT."""
    tokenizer: str | None = None
    """Folder of the tokenizer, or its tokenizer.json or tokenizer.model, where ``source`` has none
    (or to take another)."""
    vocab_size: int | None = None
    """Number of tokens, where ``source`` pads its embeddings and neither its config nor a
    tokenizer says how many there are; or rows of the embeddings of a Hugging Face model that are
    kept, where those beyond its tokenizer shall go."""
    source_ignore: list[str] = field(default_factory=list, metadata=ADDED)
    """Keys of the source's config.json (or of its GGUF metadata) that ``import`` would refuse as
    unknown, and without which the network is the same."""
    as_hybrid: bool = field(default=False, metadata=ADDED)
    """Whether a GPT model becomes Megatron-Core's ``HybridModel`` (``*-*-``), in which attention
    and MLP are layers of their own, scored and dropped one by one."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        if len(set(self.source_ignore)) < len(self.source_ignore):
            raise ValueError(f"source_ignore={self.source_ignore} names a key twice")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size={self.vocab_size} must be at least 1")


# Axes whose loss can be made up for by what is left.
COMPENSATED_AXES = ("ffn", "head", "hidden")


def check_compensated(key: str, axes: list[str]) -> None:
    """Refuse axes that ``pruning.compensate`` does not know.

    Args:
        key: config key that names them.
        axes: its value.
    """
    if not set(axes) <= set(COMPENSATED_AXES) or len(set(axes)) < len(axes):
        raise ValueError(f"{key}={axes} must name each of {list(COMPENSATED_AXES)} at most once")


LAYER_CRITERIA = ("block_influence", "lm_loss", "block_angular", "block_lm_loss")
# Those that score blocks of contiguous layers, and so need to know how long the blocks are.
BLOCK_CRITERIA = ("block_angular", "block_lm_loss")
_AGGREGATIONS = one_of("mean", "l2", "var")
_CRITERIA = one_of("activation", *added("criteria", ("activation",)))


@dataclass(kw_only=True)
class CalibrationConfig:
    """How activations become scores, the same for every axis."""

    batch_aggregation: str = field(default="l2", metadata=_AGGREGATIONS)
    """How samples are aggregated (2407.14679, section 2.2)."""
    seq_aggregation: str = field(default="mean", metadata=_AGGREGATIONS)
    """How the positions of a sample are aggregated."""
    criterion: str = field(default="activation", metadata={**ADDED, **_CRITERIA})
    """What scores the channels that a linear layer reads (``ffn``, ``head``,
    ``shared_expert_ffn``): ``activation``, their aggregated values, or a criterion that another
    package adds. All else is scored by ``activation``."""
    lm_loss_samples: int = 32
    """Samples for ``lm_loss`` and ``block_lm_loss``, the first ones: each takes a forward pass for
    every layer or block."""

    def __post_init__(self) -> None:
        """Check names and ranges."""
        check_values(self, "scores.")
        if self.lm_loss_samples < 1:
            raise ValueError(f"scores.lm_loss_samples={self.lm_loss_samples} must be at least 1")


@dataclass(kw_only=True)
class ScoreConfig(CalibrationConfig):
    """Which axes are scored, and how."""

    axes: list[str] = field(
        default_factory=score_axes, metadata=with_earlier_default(score_axes(earlier=True))
    )
    """Axes to score; those that the model lacks (experts, or a dense ffn) are left out."""
    layer_criteria: list[str] = field(default_factory=lambda: ["block_influence"])
    """How to score layers, any of ``block_influence`` (1 - cosine of a layer's input and output),
    ``lm_loss`` (LM loss without the layer), ``block_angular`` (angle between input and output of
    a block of contiguous layers) and ``block_lm_loss`` (LM loss without the block).
    ``pruning.layer_criterion`` picks one of those that were scored."""
    moments: list[str] = field(default_factory=list)
    """Axes whose second moments ``pruning.compensate`` will want, any of ``ffn``, ``head`` and
    ``hidden``. A matrix per layer (``hidden``: per norm) of the squared size in fp32: 26 GB for the
    ffn of Llama-3.1-8B, in memory over all ranks of a replica, and on disk."""
    block_sizes: list[int] = field(default_factory=list)
    """Lengths of the blocks that ``block_angular`` and ``block_lm_loss`` score: how many layers
    are to go (num_layers - pruning.target.num_layers)."""

    def __post_init__(self) -> None:
        """Check names and lengths."""
        super().__post_init__()
        bad = [a for a in self.axes if a not in score_axes()]
        if bad or not self.axes:
            raise ValueError(
                f"scores.axes={self.axes} must be a non-empty list out of {score_axes()}"
            )
        if not self.layer_criteria or not set(self.layer_criteria) <= set(LAYER_CRITERIA):
            raise ValueError(
                f"scores.layer_criteria={self.layer_criteria} must be a non-empty list out of "
                f"{list(LAYER_CRITERIA)}"
            )
        if "layer" not in self.axes and self.layer_criteria != ["block_influence"]:
            raise ValueError(
                f"scores.layer_criteria={self.layer_criteria} score layers, but scores.axes="
                f"{self.axes} leaves them out; add layer to scores.axes"
            )
        check_compensated("scores.moments", self.moments)
        self._check_blocks()

    def _check_blocks(self) -> None:
        blocks = [name for name in self.layer_criteria if name in BLOCK_CRITERIA]
        if blocks and not self.block_sizes:
            raise ValueError(
                f"scores.layer_criteria={self.layer_criteria} score blocks of layers; set "
                "scores.block_sizes=[n], n = num_layers - pruning.target.num_layers"
            )
        if self.block_sizes and not blocks:
            raise ValueError(
                f"scores.block_sizes={self.block_sizes} is for {' and '.join(BLOCK_CRITERIA)}; add "
                "one of them to scores.layer_criteria, or leave scores.block_sizes out"
            )
        if any(size < 1 for size in self.block_sizes):
            raise ValueError(f"scores.block_sizes={self.block_sizes} must be at least 1 each")

    def layers_by(self, criterion: str) -> bool:
        """Whether layers are scored by ``criterion``."""
        return "layer" in self.axes and criterion in self.layer_criteria


# A calibration adds samples up in another order then, and starts over; the scores are the same.
BATCHES = may_change("global_batch_size")


@dataclass(kw_only=True)
class ImportanceConfig(StageConfig):
    """Forward-only activation statistics over a calibration set."""

    checkpoint: str = field(default=MISSING, metadata=INPUT)
    """Result folder of import, prune, distill or finetune."""
    data: DataConfig = field(
        default_factory=lambda: DataConfig(num_samples=CALIBRATION_SAMPLES), metadata=BATCHES
    )
    parallel: ParallelConfig = field(default_factory=ParallelConfig, metadata=MAY_CHANGE)
    megatron: ForwardMegatronConfig = field(default_factory=ForwardMegatronConfig)
    scores: ScoreConfig = field(default_factory=ScoreConfig)
    save_every_n_samples: int = field(default=64, metadata=NEUTRAL)
    """Samples between saved states, from which a killed calibration goes on; 0 saves none."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        check_save_every(self.save_every_n_samples)


def check_save_every(value: int) -> None:
    """Refuse a negative ``save_every_n_samples``."""
    if value < 0:
        raise ValueError(f"save_every_n_samples={value} must be at least 1, or 0 to save none")


class TargetConfig(dict[str, int | None]):
    """Sizes after pruning, one key for each (``config.axes.targets``); null keeps the size."""

    def __init__(self, *sizes: Mapping[str, int | None], **named: int | None) -> None:
        """Take sizes as ``dict`` does; those that are not given are kept.

        Raises:
            ValueError: a key is no size that can be pruned.
        """
        super().__init__(dict.fromkeys(targets()))
        known = list(self)
        self.update(*sizes, **named)
        for name in list(self)[len(known) :]:
            why = f": {NEVER_PRUNED[name]}" if name in NEVER_PRUNED else ""
            raise ValueError(
                f"pruning.target.{name} is not a size that can be pruned{why}; only "
                f"{', '.join(known)}"
            )


@dataclass(kw_only=True)
class PruningConfig:
    """Which sizes and layers to prune, and how."""

    target: dict[str, int | None] = field(
        default_factory=TargetConfig,
        metadata=with_earlier_default({a.size: None for a in AXES.values() if not a.later}),
    )
    drop_layers: list[int] | None = None
    """Layers to drop, 1-indexed as in NeMo's ``--drop_layers``; excludes target.num_layers."""
    layer_criterion: str = field(default="block_influence", metadata=one_of(*LAYER_CRITERIA))
    """Which scores choose the layers that target.num_layers drops; see ``scores.layer_criteria``.
    Layers one by one: ``block_influence``, ``lm_loss`` (2407.14679, section 2.2). One contiguous
    block: ``block_angular``, ``block_lm_loss`` (2408.11796, section 4)."""
    merge_heads: bool = False
    """Add to kept query heads what pruned ones of their group had (2407.14679, section 2.3)."""
    compensate: list[str] = field(default_factory=list)
    """Axes whose cut channels the kept ones stand in for as well as least squares can make them,
    any of ``ffn``, ``head`` and ``hidden``; ``importance`` needs their ``scores.moments``."""
    ridge: float = 1e-3
    """Ridge of these least squares, as a multiple of the mean squared channel."""
    iterations: int = 1
    """Rounds of scoring and pruning on the way to the target (2407.14679, section 2.2); the rounds
    that ``importance`` does not serve calibrate on ``data.path``."""

    def __post_init__(self) -> None:
        """Check names and ranges."""
        self.target = dict(TargetConfig(self.target))  # OmegaConf takes no kinds of dict
        check_values(self, "pruning.")
        check_compensated("pruning.compensate", self.compensate)
        if not self.ridge > 0:
            raise ValueError(f"pruning.ridge={self.ridge} must be above 0; 1e-3 is usual")
        if self.compensate and self.merge_heads and "head" in self.compensate:
            raise ValueError(
                "pruning.merge_heads=true changes the heads that pruning.compensate="
                f"{self.compensate} would refit; leave one of the two out"
            )
        if self.compensate and self.iterations > 1:
            raise ValueError(
                f"pruning.compensate={self.compensate} needs the moments of the model that is cut, "
                f"and pruning.iterations={self.iterations} cuts several; use 1"
            )
        if self.iterations < 1:
            raise ValueError(f"pruning.iterations={self.iterations} must be at least 1")


@dataclass(kw_only=True)
class PruneConfig(StageConfig):
    """Choose what to keep by the scores, and write the smaller checkpoint."""

    checkpoint: str = field(default=MISSING, metadata=INPUT)
    """Result folder that holds the model to prune."""
    importance: str | None = field(default=None, metadata=INPUT)
    """Result folder of ``importance``: scores of the first round. Not needed for ``drop_layers``
    alone, nor with ``data.path``."""
    pruning: PruningConfig = field(default_factory=PruningConfig)
    data: OptionalDataConfig = field(
        default_factory=lambda: OptionalDataConfig(num_samples=CALIBRATION_SAMPLES),
        metadata=BATCHES,
    )
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    megatron: ForwardMegatronConfig = field(default_factory=ForwardMegatronConfig)
    scores: CalibrationConfig = field(default_factory=CalibrationConfig)
    save_every_n_samples: int = field(default=64, metadata=NEUTRAL)
    """Samples between saved states, from which a killed calibration goes on; 0 saves none."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        check_save_every(self.save_every_n_samples)


@dataclass(kw_only=True)
class ExportConfig(StageConfig):
    """Write a Megatron checkpoint as a Hugging Face folder."""

    checkpoint: str = field(default=MISSING, metadata=INPUT)
    """Result folder that holds the model."""
    max_shard_size: str = "5GB"
    """Size that no safetensors file of the export exceeds."""


STAGE_CONFIGS: dict[str, type[StageConfig]] = {
    "import": ImportConfig,
    "data": SourcesStageConfig,
    "importance": ImportanceConfig,
    "prune": PruneConfig,
    "search": SearchConfig,
    "teacher_logits": TeacherLogitsConfig,
    "distill": DistillConfig,
    "finetune": FinetuneConfig,
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
    "benchmark": BenchmarkConfig,
    "export": ExportConfig,
    "pipeline": PipelineConfig,
    "plan": PlanConfig,
}
