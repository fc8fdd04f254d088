"""The machines a job runs on: section ``cluster``, entries in ``conf/cluster/``."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class ClusterConfig:
    """One kind of node."""

    gpus_per_node: int = 8
    """GPUs of a node, one for each rank; 0: one rank that computes on the CPU."""
    gpu_memory_gb: float = 80.0
    """Memory of each GPU, GiB (of a rank, where there are no GPUs)."""
    reserved_memory_gb: float = 4.0
    """Part of it that tensors cannot have, GiB: CUDA context, NCCL buffers, fragmentation."""
    peak_tflops: float = 989.0
    """Dense bf16 peak of each GPU, 1e12 floating-point operations per second."""

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
