"""The machines a job runs on: section ``cluster``, entries in ``conf/cluster/``."""

from dataclasses import dataclass, field


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
        if self.nodes is not None and self.nodes < 1:
            raise ValueError(f"cluster.slurm.nodes={self.nodes} must be at least 1, or null")
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
    """Part of it that tensors cannot have, GiB: CUDA context, NCCL buffers, fragmentation."""
    peak_tflops: float = 989.0
    """Dense bf16 peak of each GPU, 1e12 floating-point operations per second."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.gpus_per_node < 0:
            raise ValueError(f"cluster.gpus_per_node={self.gpus_per_node} must not be negative")
        for name in ("gpu_memory_gb", "peak_tflops"):
            if getattr(self, name) <= 0:
                raise ValueError(f"cluster.{name}={getattr(self, name)} must be above 0")
        if not 0 <= self.reserved_memory_gb < self.gpu_memory_gb:
            raise ValueError(
                f"cluster.reserved_memory_gb={self.reserved_memory_gb} must lie between 0 and "
                f"cluster.gpu_memory_gb={self.gpu_memory_gb}"
            )

    @property
    def ranks_per_node(self) -> int:
        """Ranks of a node."""
        return self.gpus_per_node or 1


@dataclass(kw_only=True)
class SubmitConfig:
    """Queue a stage, or a pipeline as a chain of jobs, with SLURM."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
