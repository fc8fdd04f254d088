"""One dataclass per stage: what ``minitron <stage> key=value`` accepts."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.training import DataConfig, OptimConfig, TrainerConfig


@dataclass(kw_only=True)
class StageConfig:
    """Keys every stage has."""

    output_dir: str = MISSING
    """Folder of the result. It appears, complete, when the stage ends well."""
    overwrite: bool = False
    """Replace a complete result; without it a complete result is an error."""
    verify_inputs: str = "full"
    """Check of input folders: ``full`` hashes every file, ``size`` compares sizes only."""
    workers: int = 2
    """Threads for tensor and file work."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.verify_inputs not in ("full", "size"):
            raise ValueError(f"verify_inputs={self.verify_inputs} must be full or size")
        if self.workers < 1:
            raise ValueError(f"workers={self.workers} must be at least 1")


@dataclass(kw_only=True)
class ImportConfig(StageConfig):
    """Hugging Face folder or GGUF file -> Megatron checkpoint."""

    source: str = MISSING
    """Hugging Face model folder (config.json + safetensors) or a .gguf file."""


@dataclass(kw_only=True)
class ScoreConfig:
    """How activations become scores."""

    axes: list[str] = field(default_factory=lambda: ["hidden", "ffn", "head", "layer"])
    """Axes to score."""
    batch_aggregation: str = "l2"
    """Over samples: ``mean``, ``l2`` or ``var`` (2407.14679, section 2.2)."""
    seq_aggregation: str = "mean"
    """Over positions of a sample: ``mean``, ``l2`` or ``var``."""

    def __post_init__(self) -> None:
        """Check names."""
        known = ["hidden", "ffn", "head", "layer"]
        bad = [a for a in self.axes if a not in known]
        if bad or not self.axes:
            raise ValueError(f"scores.axes={self.axes} must be a non-empty list out of {known}")
        for name in ("batch_aggregation", "seq_aggregation"):
            if getattr(self, name) not in ("mean", "l2", "var"):
                raise ValueError(f"scores.{name}={getattr(self, name)} must be mean, l2 or var")


@dataclass(kw_only=True)
class ImportanceConfig(StageConfig):
    """Forward-only activation statistics over a calibration set."""

    checkpoint: str = MISSING
    """Result folder of import, prune, distill or finetune."""
    data: DataConfig = field(default_factory=lambda: DataConfig(num_samples=1024))
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    scores: ScoreConfig = field(default_factory=ScoreConfig)


@dataclass(kw_only=True)
class TargetConfig:
    """Sizes after pruning; null keeps the size."""

    num_layers: int | None = None
    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_query_groups: int | None = None


@dataclass(kw_only=True)
class PruningConfig:
    """What to cut."""

    target: TargetConfig = field(default_factory=TargetConfig)
    drop_layers: list[int] | None = None
    """Layers to drop, 1-indexed as in NeMo's ``--drop_layers``; excludes target.num_layers."""


@dataclass(kw_only=True)
class PruneConfig(StageConfig):
    """Scores -> plan -> smaller checkpoint."""

    checkpoint: str = MISSING
    """Result folder that holds the model to prune."""
    importance: str | None = None
    """Result folder of ``importance``; not needed for ``drop_layers`` alone."""
    pruning: PruningConfig = field(default_factory=PruningConfig)


@dataclass(kw_only=True)
class DistillationConfig:
    """The losses between teacher and student."""

    loss: str = "forward_kl"
    """``forward_kl``: KL(teacher || student) (2407.14679, section 3)."""
    temperature: float = 1.0
    """Divides both logits; the loss is not multiplied by its square."""
    chunk_size: int = 256
    """Tokens whose logits exist at one time."""
    ce_weight: float = 0.0
    """Weight of the language-model loss added to the distillation loss."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.loss != "forward_kl":
            raise ValueError(f"distillation.loss={self.loss} must be forward_kl")
        if self.temperature <= 0:
            raise ValueError(f"distillation.temperature={self.temperature} must be above 0")
        if self.chunk_size < 1:
            raise ValueError(f"distillation.chunk_size={self.chunk_size} must be at least 1")
        if self.ce_weight < 0:
            raise ValueError(f"distillation.ce_weight={self.ce_weight} must not be negative")


@dataclass(kw_only=True)
class DistillConfig(StageConfig):
    """Train the pruned model to match the original one."""

    student: str = MISSING
    """Result folder that holds the model to train."""
    teacher: str = MISSING
    """Result folder that holds the model to imitate."""
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)

    def __post_init__(self) -> None:
        """Check relations between sections."""
        super().__post_init__()
        if self.optim.lr_warmup_steps >= self.trainer.max_steps:
            raise ValueError(
                f"optim.lr_warmup_steps={self.optim.lr_warmup_steps} must be below "
                f"trainer.max_steps={self.trainer.max_steps}"
            )


@dataclass(kw_only=True)
class EvaluateConfig(StageConfig):
    """Language-model loss and perplexity on held-out data."""

    checkpoint: str = MISSING
    """Result folder that holds the model."""
    data: DataConfig = field(default_factory=lambda: DataConfig(split_name="test"))
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


@dataclass(kw_only=True)
class ExportConfig(StageConfig):
    """Megatron checkpoint -> Hugging Face folder."""

    checkpoint: str = MISSING
    """Result folder that holds the model."""
    max_shard_size: str = "5GB"
    """Largest safetensors file."""


@dataclass(kw_only=True)
class PipelineConfig(StageConfig):
    """A list of stages, each a folder under ``output_dir``; finished ones are skipped."""

    inputs: dict[str, Any] = field(default_factory=dict)
    """Values that items share (model, text, ...): ``${inputs.NAME}`` in an item's config."""
    stages: list[dict[str, Any]] = field(default_factory=list)
    """Items ``{name: folder, stage: stage, config: {key: value}}``; ``${stage:NAME}`` in a value
    is the folder of an earlier item."""
    report: dict[str, Any] = field(default_factory=dict)
    """Which results the final table compares: ``{rows: [{label, evaluate}], ...}``."""


STAGE_CONFIGS: dict[str, type[StageConfig]] = {
    "import": ImportConfig,
    "importance": ImportanceConfig,
    "prune": PruneConfig,
    "distill": DistillConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "pipeline": PipelineConfig,
}
