"""How fast a training computes, and the most memory of a rank: figures for the log."""

import resource
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nemo_minitron.runtime.launch import device
from nemo_minitron.runtime.ranks import teacher_ranks

# Dense rates; from Hopper on NVIDIA's data sheets print those with sparsity, twice as much. Under
# nvidia.com/en-us/data-center: a100 (312), h100 (1,979 sparse; NVL 1,671; PCIe 1,513), h200 (1,979;
# NVL 1,671), grace-hopper-superchip (990), hgx (B200, B300: 36,000 sparse for 8), l40s (362.05),
# gb200-nvl72 and gb300-nvl72 (360,000 sparse for 72). A800 and H800 compute as A100 and H100.
_PEAKS = {
    "GB300": 2500.0,
    "GB200": 2500.0,
    "B300": 2250.0,
    "B200": 2250.0,
    "GH200": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H800 PCIe": 756.0,
    "H800": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
}
"""Part of a GPU's name -> dense bf16 peak, 1e12 operations a second; the first that fits counts."""
_GIB = float(1 << 30)


def peak_tflops(gpu: str) -> float | None:
    """Dense bf16 peak of a GPU by its name as CUDA gives it; None for one that is not known."""
    return next((peak for part, peak in _PEAKS.items() if part in gpu), None)


@dataclass(frozen=True)
class Speed:
    """How many ranks compute, at what peak.

    Attributes:
        ranks: those that train and those of the teacher.
        peak: of a GPU for the arithmetic of this training, 1e12 operations a second, if known.
        memory: whether to look at it.
    """

    ranks: int
    peak: float | None
    memory: bool

    @classmethod
    def of(cls, precision: str, *, memory: bool) -> "Speed":
        """On the ranks of this job, whose GPUs are alike."""
        known = torch.cuda.is_available() and precision == "bf16-mixed"
        peak = peak_tflops(torch.cuda.get_device_name()) if known else None
        return cls(dist.get_world_size() + teacher_ranks(), peak, memory)

    def figures(self, flops: float, seconds: float) -> dict[str, float]:
        """``tflops_per_gpu``, ``mfu`` and ``peak_memory_gib`` of some steps (collective).

        Args:
            flops: of these steps on all ranks together, without what the backward pass does again;
                0 if they were not counted.
            seconds: that they took.
        """
        found: dict[str, float] = {}
        if flops:
            found["tflops_per_gpu"] = flops / seconds / self.ranks / 1e12
        if flops and self.peak:
            found["mfu"] = found["tflops_per_gpu"] / self.peak
        if self.memory:
            found["peak_memory_gib"] = _peak_memory()
        return found


def _peak_memory() -> float:
    """Most memory that tensors (on a CPU: the process) had so far, GiB, of the fullest rank."""
    if torch.cuda.is_available():
        own = float(torch.cuda.max_memory_allocated())
    else:
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    most = torch.tensor(own / _GIB, dtype=torch.float64, device=device())
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=dist.group.WORLD)
    return float(most)
