"""Lists of stages: ``pipeline`` runs them, ``plan`` says what they take."""

from dataclasses import dataclass, field
from typing import Any

from nemo_minitron.config.base import StageConfig
from nemo_minitron.config.cluster import ClusterConfig
from nemo_minitron.config.meaning import NEUTRAL


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
    model: dict[str, Any] = field(default_factory=dict)
    """Sizes of the model that the stages are set up for, keys of ``model.yaml``. ``pipeline`` warns
    of another one; ``plan`` reads them where the model is not at hand."""


@dataclass(kw_only=True)
class PlanConfig(PipelineConfig):
    """Sizes, memory per rank, FLOPs and GPU hours of a pipeline or of one stage; runs nothing."""

    output_dir: str = field(default="runs", metadata=NEUTRAL)
    """Folder of the pipeline; models that are there already are looked at. Nothing is written."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    nodes: int = 1
    """Nodes for the stages that train. Others take as many of them as their batch can fill."""
    mfu: float = 0.4
    """Share of ``cluster.peak_tflops`` that a rank reaches, an assumption; recomputation counts as
    work."""
    json: str | None = None
    """File for the same numbers; ``overwrite=true`` replaces it."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        if self.nodes < 1:
            raise ValueError(f"nodes={self.nodes} must be at least 1")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu={self.mfu} must be above 0 and at most 1")
