"""Keys of the stages that train a model, and of ``teacher_logits``, which runs for one of them."""

from dataclasses import dataclass, field
from typing import NoReturn

from omegaconf import MISSING

from nemo_minitron.config.base import (
    INPUT,
    MAY_CHANGE,
    NEUTRAL,
    StageConfig,
    check_values,
    may_change,
    one_of,
)
from nemo_minitron.config.distillation import TOP_K_LOSSES, DistillationConfig
from nemo_minitron.config.loggers import ExpManagerConfig
from nemo_minitron.config.megatron import (
    ForwardMegatronConfig,
    MegatronConfig,
    check_optimizer,
    merged_recompute,
)
from nemo_minitron.config.parallel import ParallelConfig, TeacherParallelConfig
from nemo_minitron.config.phases import Phase, parse_phases, phases_of
from nemo_minitron.config.training import (
    PRECISION,
    DataConfig,
    OptimConfig,
    TrainerConfig,
)


@dataclass(kw_only=True)
class TrainingStageConfig(StageConfig):
    """Keys that all training stages share."""

    data: DataConfig = field(default_factory=DataConfig, metadata=may_change("blend_changes"))
    parallel: ParallelConfig = field(default_factory=ParallelConfig, metadata=MAY_CHANGE)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    megatron: MegatronConfig = field(default_factory=MegatronConfig)
    exp_manager: ExpManagerConfig = field(default_factory=ExpManagerConfig, metadata=NEUTRAL)

    def __post_init__(self) -> None:
        """Check relations between sections."""
        super().__post_init__()
        if self.trainer.phases is not None:
            self.trainer.phases = parse_phases(self.trainer.phases)
        self.phases()  # refuses phases that do not fit
        if self.optim.lr_warmup_steps >= self.trainer.max_steps:
            raise ValueError(
                f"optim.lr_warmup_steps={self.optim.lr_warmup_steps} must be below "
                f"trainer.max_steps={self.trainer.max_steps}"
            )
        check_optimizer(self.megatron, self.optim)
        merged_recompute(self.trainer, self.megatron)

    def phases(self) -> list[Phase]:
        """Parts of the training, each with its data; one if ``trainer.phases`` is not set."""
        return phases_of(self.data, self.trainer)


@dataclass(kw_only=True)
class FinetuneConfig(TrainingStageConfig):
    """Train a model on text: teacher correction, or fine-tuning on generated text."""

    checkpoint: str = field(default=MISSING, metadata=INPUT)
    """Result folder that holds the model to train."""
    chunk_size: int = 256
    """Tokens whose logits are in memory at one time."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size={self.chunk_size} must be at least 1")


@dataclass(kw_only=True)
class DistillConfig(TrainingStageConfig):
    """Train the pruned model to match the original one."""

    student: str = field(default=MISSING, metadata=INPUT)
    """Result folder that holds the model to train."""
    teacher: str | None = field(default=None, metadata=INPUT)
    """Result folder that holds the model that the student learns to imitate."""
    teacher_logits: str | None = field(default=None, metadata=INPUT)
    """Result folder of ``teacher_logits`` instead of ``teacher``: no teacher is built."""
    teacher_parallel: TeacherParallelConfig = field(
        default_factory=TeacherParallelConfig, metadata=MAY_CHANGE
    )
    distillation: DistillationConfig = field(default_factory=DistillationConfig)

    def __post_init__(self) -> None:
        """Check relations between sections."""
        super().__post_init__()
        self._check_teacher()
        if self.distillation.kd_weight == 0 and not self.distillation.intermediate.losses:
            raise ValueError(
                "distillation.kd_weight=0 and distillation.intermediate.losses=[] leave the "
                "teacher nothing to say; set distillation.kd_weight above 0, or train without a "
                "teacher: minitron finetune"
            )

    def _check_teacher(self) -> None:
        if (self.teacher is None) == (self.teacher_logits is None):
            given = "neither" if self.teacher is None else "both"
            raise ValueError(
                "distill needs one of teacher= (a model) and teacher_logits= (its stored outputs); "
                f"{given} is set"
            )
        if self.teacher is not None:
            return self._check_own_ranks()
        if self.trainer.phases is not None:
            raise ValueError(
                "trainer.phases changes the samples, and teacher_logits holds outputs for samples "
                "of one kind; give teacher=, or distil once for each phase"
            )
        if self.teacher_parallel != TeacherParallelConfig():
            raise ValueError("teacher_parallel.* is for a teacher that is built; leave it out here")
        if self.distillation.loss not in TOP_K_LOSSES:
            raise ValueError(
                f"distillation.loss={self.distillation.loss} reads the teacher's whole vocabulary, "
                "of which teacher_logits holds the largest logits; set distillation.loss to "
                f"{' or '.join(TOP_K_LOSSES)}, or give teacher="
            )
        if self.distillation.intermediate.losses:
            raise ValueError(
                f"distillation.intermediate.losses={self.distillation.intermediate.losses} compare "
                "inner states, which teacher_logits does not hold; set it to [], or give teacher="
            )
        if self.distillation.offload_teacher:
            raise ValueError(
                "distillation.offload_teacher=true is for a teacher that is built; leave it out "
                "with teacher_logits"
            )

    def _check_own_ranks(self) -> None:
        """Only final hidden states travel from a teacher on ranks of its own."""
        own = self.teacher_parallel.own_ranks
        if not own:
            return
        if self.distillation.intermediate.losses:
            raise ValueError(
                f"distillation.intermediate.losses={self.distillation.intermediate.losses} compare "
                f"inner states, which a teacher on teacher_parallel.own_ranks={own} does not send; "
                "set it to [], or teacher_parallel.own_ranks=0"
            )
        if self.distillation.offload_teacher:
            raise ValueError(
                "distillation.offload_teacher=true makes room on ranks that train, where a teacher "
                f"on teacher_parallel.own_ranks={own} is not; leave it out"
            )
        replicas = self.teacher_parallel.of(self.parallel).data_parallel_size or 1
        for phase in self.phases():
            with phase.naming():
                _check_served(phase.data, own, replicas)


def refuse_packed(own: int) -> NoReturn:
    """Raise the error for SFT records that share samples, and a teacher on ranks of its own."""
    raise ValueError(
        "data.pack=true lets records share samples, whose borders are not sent to a "
        f"teacher on teacher_parallel.own_ranks={own}; set data.pack=false"
    )


def _check_served(data: DataConfig, own: int, replicas: int) -> None:
    """Refuse samples that cannot be sent to a teacher on ranks of its own, or not evenly."""
    if data.records == "sft" and data.pack:
        refuse_packed(own)
    count = data.global_batch_size // data.micro_batch_size
    if count % replicas:
        raise ValueError(
            f"teacher_parallel.own_ranks={own} make {replicas} replicas of the teacher, which "
            f"must divide the {count} micro-batches of data.global_batch_size="
            f"{data.global_batch_size}; change one of them"
        )


@dataclass(kw_only=True)
class TeacherPassConfig:
    """Which samples the later ``distill`` reads; keys of its ``trainer`` section."""

    max_steps: int = TrainerConfig.max_steps
    """Optimizer steps: ``max_steps`` x ``data.global_batch_size`` training samples are stored."""
    limit_val_batches: int = TrainerConfig.limit_val_batches
    """Global batches per validation, whose samples are stored too; 0 leaves them out."""
    precision: str = field(default=TrainerConfig.precision, metadata=PRECISION)
    """Precision of the teacher's forward pass: ``32`` or ``bf16-mixed``."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.max_steps < 1:
            raise ValueError(f"trainer.max_steps={self.max_steps} must be at least 1")
        if self.limit_val_batches < 0:
            raise ValueError(
                f"trainer.limit_val_batches={self.limit_val_batches} must not be negative"
            )
        check_values(self, "trainer.")


@dataclass(kw_only=True)
class TeacherLogitsConfig(StageConfig):
    """The teacher's largest logits of every sample, stored for ``distill``."""

    checkpoint: str = field(default=MISSING, metadata=INPUT)
    """Result folder that holds the teacher."""
    top_k: int = 64
    """Logits stored of each token, the largest ones; ``distillation.top_k`` may be lower."""
    temperature: float = 1.0
    """Temperature of the normaliser: ``distillation.temperature`` if loss is ``top_k_tail``."""
    dtype: str = field(default="float32", metadata=one_of("float32", "bfloat16"))
    """Of the stored logits: ``float32``, or ``bfloat16``, which takes 6 bytes each instead of 8 and
    loses nothing if ``trainer.precision`` is ``bf16-mixed`` and no soft cap is on the logits."""
    shard_samples: int = 64
    """Samples of a file. A rank holds one file's in memory; a killed run loses at most one."""
    chunk_size: int = field(default=256, metadata=MAY_CHANGE)
    """Tokens whose full logits are in memory at one time."""
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig, metadata=MAY_CHANGE)
    megatron: ForwardMegatronConfig = field(default_factory=ForwardMegatronConfig)
    trainer: TeacherPassConfig = field(default_factory=TeacherPassConfig)

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        for name in ("top_k", "shard_samples", "chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be above 0")
        if self.shard_samples % self.data.micro_batch_size:
            raise ValueError(
                f"shard_samples={self.shard_samples} must be a multiple of data.micro_batch_size="
                f"{self.data.micro_batch_size}; change one of them"
            )
