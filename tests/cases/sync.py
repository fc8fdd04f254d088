"""Tasks for the rank pool: where a distillation step would make the host wait for a GPU."""

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from tests.cases.kd import batches, loaded, model_cfg, wrap, zero_gradients

# Operators whose result has a size or a Python value that only the device knows, and the one that
# makes a tensor of Python numbers: copying it to a GPU waits for the stream.
_WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "_unique2",
    "unique_dim",
    "lift_fresh",
    "repeat_interleave.Tensor",
)
_PACKAGES = ("nemo_minitron", "megatron")
# What these lines of Megatron wait for is in host memory: a count of tokens that starts at 0, the
# number that a mask is filled with, and states of the CPU's random generator that are compared.
_HARMLESS = (
    "megatron/core/pipeline_parallel/schedules.py",
    "megatron/core/tensor_parallel/layers.py",
    "megatron/core/tensor_parallel/random.py",
)
_STAND_IN = ("runtime", "cpu.py")  # every call passes through it where there is no CUDA


def _by_mask(args: tuple[Any, ...]) -> bool:
    """Whether an index operator counts what a mask selects; filling with one value does not."""
    indices = args[1] if isinstance(args[1], list | tuple) else []
    masks = any(index is not None and index.dtype == torch.bool for index in indices)
    return masks and not (len(args) > 2 and args[2].numel() == 1)


def _caller() -> str:
    """``file:line`` of the innermost frame of our package or Megatron."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        parts = Path(frame.f_code.co_filename).parts
        for package in _PACKAGES:
            if package in parts and parts[-2:] != _STAND_IN:
                return f"{'/'.join(parts[parts.index(package) :])}:{frame.f_lineno}"
        frame = frame.f_back
    return "torch"


class Waits(TorchDispatchMode):
    """Counts the calls that would wait, by operator and place."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, then run."""
        name = str(func).removeprefix("aten.")
        if name.startswith(_WAITING) or (name.startswith("index") and _by_mask(args)):
            place = _caller()
            if not place.startswith(_HARMLESS):
                self.found[f"{name} at {place}"] += 1
        return func(*args, **(kwargs or {}))


def waits(
    student: tuple[ModelConfig, str],
    teacher: tuple[ModelConfig, str],
    parallel: ParallelConfig,
    over: dict[str, Any],
    counts: tuple[int, ...],
) -> list[dict[str, int]]:
    """For each number of micro-batches: the waits from the teacher's pass to the last backward."""
    from nemo_minitron.runtime.launch import init_model_parallel

    init_model_parallel(parallel)
    model = loaded(model_cfg(student[0], teacher[0], parallel, **over), student, teacher)
    wrap(model)
    model.train()
    found = []
    for count in counts:
        zero_gradients(model)
        micro_batches = batches(count, 16, student[0].vocab_size)
        with Waits() as mode:
            model.forward_backward(micro_batches)
        found.append(dict(mode.found))
    return found
