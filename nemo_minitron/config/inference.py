"""Config of the stages that run a finished model: evaluation, generation, measurements."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from nemo_minitron.config.base import StageConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.training import OptionalDataConfig


@dataclass(kw_only=True)
class LmEvalConfig:
    """How lm-eval runs its tasks; its own names."""

    num_fewshot: int | None = None
    """Examples before each question; null: as many as the task says."""
    limit: int | None = None
    """Documents of each task, the first ones; null: all."""
    batch_size: int = 8
    """Requests of one forward pass on one data-parallel rank."""
    max_length: int | None = None
    """Tokens of the longest request; longer ones lose their beginning, as lm-eval has it. null:
    ``max_position_embeddings`` of the model."""
    bootstrap_iters: int = 1000
    """Resamplings for the standard errors that have no formula; 0: no standard errors at all."""

    def __post_init__(self) -> None:
        """Check ranges."""
        least = {"num_fewshot": 0, "limit": 1, "batch_size": 1, "max_length": 2}
        for name, value in {**least, "bootstrap_iters": 0}.items():
            found = getattr(self, name)
            if found is not None and found < value:
                raise ValueError(f"lm_eval.{name}={found} must be at least {value}")


@dataclass(kw_only=True)
class EvaluateConfig(StageConfig):
    """Language-model loss on held-out data, and tasks of lm-eval."""

    checkpoint: str = MISSING
    """Result folder that holds the model; for ``tasks`` also one of ``export``."""
    data: OptionalDataConfig = field(default_factory=lambda: OptionalDataConfig(split_name="test"))
    tasks: list[str] = field(default_factory=list)
    """Tasks, groups or tags of lm-eval (``pip install nemo_minitron[eval]``)."""
    tasks_path: str | None = None
    """Folder of task files (YAML) beside those that lm-eval brings."""
    lm_eval: LmEvalConfig = field(default_factory=LmEvalConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
