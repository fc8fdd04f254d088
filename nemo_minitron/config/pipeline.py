"""Lists of stages for ``pipeline`` and ``plan``, and the machines they run on."""

from dataclasses import dataclass, field
from typing import Any

from nemo_minitron.config.base import ADDED, NEUTRAL, StageConfig, check_values


@dataclass(kw_only=True)
class SlurmConfig:
    """How ``minitron submit`` asks SLURM for nodes, and what its jobs run in."""

    account: str | None = None
    """``sbatch --account``; null: SLURM's own default."""
    partition: str | None = None
    """``sbatch --partition``; null: SLURM's own default."""
    time: str | None = None
    """``sbatch --time`` of every job; null: that of the script in ``launch/``."""
    nodes: int | None = None
    """Nodes of a stage that runs a model, all their GPUs, where ``trainer.num_nodes`` is not set;
    null: as few as the layout needs."""
    min_nodes: int | None = None
    """Nodes that are enough for a stage that trains, where fewer than those above are there at a
    start, as after one has died; null: it waits for all of them."""
    container_image: str | None = None
    """Image for pyxis/enroot, or ``none`` for bare metal; CONTAINER_IMAGE, if set, wins."""
    container_mounts: str | None = None
    """One comma-separated list, ``/host:/container,...``; CONTAINER_MOUNTS, if set, wins."""
    sbatch_args: list[str] = field(default_factory=list)
    """More flags of sbatch for every job, the last word: ``[--qos=high,--exclusive]``."""
    env: dict[str, str] = field(default_factory=dict)
    """Variables of every job, such as ``NCCL_SOCKET_IFNAME``; those in the environment win."""

    def __post_init__(self) -> None:
        """Check ranges and forms."""
        for name in ("nodes", "min_nodes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"cluster.slurm.{name}={value} must be at least 1, or null")
        if self.time is not None and self.time.isdigit():
            raise ValueError(
                f"cluster.slurm.time={self.time} must say hours, minutes and seconds, such as "
                '"12:00:00" in quotes: YAML takes 12:00:00 for the number 43200, which SLURM would '
                "take for minutes"
            )
        wrong = [flag for flag in self.sbatch_args if not flag.startswith("-")]
        if wrong:
            raise ValueError(
                f"cluster.slurm.sbatch_args={self.sbatch_args} must hold flags of sbatch, which "
                f"start with a hyphen; {wrong[0]} does not"
            )


@dataclass(kw_only=True)
class ClusterConfig:
    """One kind of node, and the SLURM that hands them out."""

    gpus_per_node: int = 8
    """GPUs of a node, one for each rank; 0: one rank that computes on the CPU."""
    gpu_memory_gb: float = 80.0
    """Memory of each GPU, GiB (of a rank, where there are no GPUs)."""
    reserved_memory_gb: float = 4.0
    """GPU memory that tensors cannot have, GiB: CUDA context, NCCL buffers, fragmentation."""
    peak_tflops: float = 989.0
    """Dense bf16 peak of each GPU, 1e12 floating-point operations per second."""
    gpu_link_gb_per_s: float = 450.0
    """What each GPU sends to others of its node, 1e9 bytes per second."""
    network_gb_per_s: float = 50.0
    """What each GPU sends to other nodes, 1e9 bytes per second."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    def __post_init__(self) -> None:
        """Check ranges."""
        check_values(self, "cluster.")
        if self.gpus_per_node < 0:
            raise ValueError(f"cluster.gpus_per_node={self.gpus_per_node} must not be negative")
        for name in ("gpu_memory_gb", "peak_tflops", "gpu_link_gb_per_s", "network_gb_per_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"cluster.{name}={getattr(self, name)} must be above 0")
        if not 0 <= self.reserved_memory_gb < self.gpu_memory_gb:
            raise ValueError(
                f"cluster.reserved_memory_gb={self.reserved_memory_gb} must lie between 0 and "
                f"cluster.gpu_memory_gb={self.gpu_memory_gb}"
            )

    @property
    def ranks_per_node(self) -> int:
        """Ranks that run on a node."""
        return self.gpus_per_node or 1


@dataclass(kw_only=True)
class SubmitConfig:
    """Queue a stage, or a pipeline as a chain of jobs, with SLURM."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)


@dataclass(kw_only=True)
class PipelineConfig(StageConfig):
    """A list of stages, each a folder under ``output_dir``; finished ones are skipped."""

    inputs: dict[str, Any] = field(default_factory=dict)
    """Values that items share (model, text, ...): ``${inputs.NAME}`` in an item's config."""
    stages: list[dict[str, Any]] = field(default_factory=list)
    """Items ``{name: folder, stage: stage, config: {key: value}}``; ``${stage:NAME}`` in a value
    is the folder of an earlier item."""
    change: dict[str, Any] = field(default_factory=dict, metadata=ADDED)
    """Keys for the items of ``stages``, by their names, that win over those of their ``config``:
    ``{NAME: {key: value}}``. So an experiment of your own extends one that it takes over."""
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
    """Nodes for stages that train. Other stages take as many of them as their batch can fill."""
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
