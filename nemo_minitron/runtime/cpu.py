"""Lets Megatron-Core run where there is no CUDA. The only place that patches anything.

Megatron-Core 0.16 assumes CUDA in a few spots: tensor factories with ``device="cuda"``,
``torch.cuda.current_device()``, ``Tensor.type()`` compared with ``torch.cuda.*`` spellings,
streams, and a CUDA random-state tracker. ``install()`` answers each of them on the CPU; with CUDA
present it does nothing.
"""

import contextlib
import ctypes
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_FACTORIES = {
    torch.tensor,
    torch.empty,
    torch.zeros,
    torch.ones,
    torch.full,
    torch.arange,
    torch.rand,
    torch.randn,
    torch.randint,
    torch.empty_like,
    torch.zeros_like,
    torch.ones_like,
    torch.full_like,
    torch.as_tensor,
    torch.linspace,
    torch.Tensor.to,
}
_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.float64: "torch.cuda.DoubleTensor",
}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_CPU = torch.device("cpu")
_installed: list[TorchFunctionMode] = []


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _CudaMeansCpu(TorchFunctionMode):
    """Redirects factories that name a CUDA device, ``Tensor.type()`` and ``Tensor.cuda()``."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return _TYPE_NAMES.get(args[0].dtype) or func(*args)
        if func is torch.Tensor.cuda:
            return args[0]
        if func in _FACTORIES:
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": _CPU}
            elif func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
                args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


class _NoStream:
    """A stream or event on a device that has none: everything is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def _patch_torch() -> None:
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    torch.cuda.Stream = _NoStream  # type: ignore[misc,assignment]
    torch.cuda.Event = _NoStream  # type: ignore[misc,assignment]
    for name in ("current_stream", "default_stream"):
        setattr(torch.cuda, name, lambda *args, **kwargs: _NoStream())
    setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.empty_cache = lambda: None
    setattr(torch.Tensor, "record_stream", lambda self, stream: None)


def _patch_random() -> None:
    """The CUDA generator is the default CPU generator, so Megatron's tracker works as it is."""
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]


def _patch_megatron() -> None:
    from megatron.core.tensor_parallel import random as mcore_random
    from megatron.core.transformer.moe import moe_utils

    mcore_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _keep_freed_memory() -> None:
    """Ask glibc not to give large blocks back to the kernel.

    Every logits-sized temporary would otherwise be mapped and zeroed anew: a third of the time of
    the distillation loss on a CPU.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def install() -> bool:
    """Make Megatron-Core usable on the CPU; idempotent.

    Returns:
        Whether the stand-in is active (False when CUDA is present).
    """
    if torch.cuda.is_available():
        return False
    if not _installed:
        _keep_freed_memory()
        _patch_torch()
        _patch_random()
        _patch_megatron()
        mode = _CudaMeansCpu()
        mode.__enter__()
        _installed.append(mode)
    return True
