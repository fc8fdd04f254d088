"""Lets Megatron-Core run where there is no CUDA. The only place that patches anything.

Megatron-Core 0.16 assumes CUDA in a few spots: tensor factories with ``device="cuda"``,
``torch.cuda.current_device()``, ``Tensor.type()`` compared with ``torch.cuda.*`` spellings,
streams, and a CUDA random-state tracker. ``install()`` answers each of them on the CPU, and sees to
memory: gloo's copies, what a compiler would fuse, blocks that malloc keeps. With CUDA present it
does nothing but define a name that Megatron-Core forgets without Transformer Engine.
"""

import contextlib
import ctypes
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
import torch.utils._device
from torch import Tensor

from nemo_minitron.runtime.extensions import before_megatron

_FACTORIES = (
    "tensor",
    "empty",
    "zeros",
    "ones",
    "full",
    "arange",
    "rand",
    "randn",
    "randint",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
    "as_tensor",
    "linspace",
)
_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.float64: "torch.cuda.DoubleTensor",
}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_GIVEN_BACK = 1 << 24
_CPU = torch.device("cpu")


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Return a factory (or ``Tensor.to``) that takes a CUDA device for the CPU."""

    @wraps(factory)
    def make(*args: object, **kwargs: object) -> Any:
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = _CPU
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return make


def _patch_factories() -> None:
    """Replace functions, one by one.

    A ``TorchFunctionMode`` would see every call into torch and cost each of them 2 us: 6 % of a
    forward pass of SmolLM2-135M. What knows the factories by identity has to know both.
    """
    torch.utils._device._device_constructors()  # kept from now on, with the originals
    for name in _FACTORIES:
        made = _on_cpu(getattr(torch, name))
        setattr(torch, name, made)
        torch.jit._builtins._register_builtin(made, f"aten::{name}")


def _patch_tensor() -> None:
    """Patch ``Tensor.to``, ``Tensor.type()`` and ``Tensor.cuda()``."""
    to = _on_cpu(torch.Tensor.to)
    type_of: Callable[..., Any] = torch.Tensor.type

    def move(tensor: Tensor, *args: object, **kwargs: object) -> Tensor:
        if args and _is_cuda(args[0]):
            args = (_CPU, *args[1:])
        return to(tensor, *args, **kwargs)

    def name_type(tensor: Tensor, *args: object, **kwargs: object) -> Any:
        if args or kwargs:
            return type_of(tensor, *args, **kwargs)
        return _TYPE_NAMES.get(tensor.dtype) or type_of(tensor)

    setattr(torch.Tensor, "to", wraps(to)(move))
    setattr(torch.Tensor, "type", wraps(type_of)(name_type))
    setattr(torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor)


class _NoStream:
    """A stream or event on a device that has none: everything is already in order."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def _patch_torch() -> None:
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]  # a device in place of a number
    torch.cuda.Stream = _NoStream  # type: ignore[misc,assignment]  # a stand-in
    torch.cuda.Event = _NoStream  # type: ignore[misc,assignment]  # a stand-in
    for name in ("current_stream", "default_stream"):
        setattr(torch.cuda, name, lambda *args, **kwargs: _NoStream())
    setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.empty_cache = lambda: None
    setattr(torch.Tensor, "record_stream", lambda self, stream: None)


def _patch_random() -> None:
    """Make the CPU generator the CUDA generator, so that Megatron's tracker works as it is."""
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]  # it returns a generator


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Return a reduce-scatter or an all-gather that is a copy, or nothing, in a group of one.

    Gloo makes a second tensor of the whole buffer for it and copies there and back.
    """

    @wraps(collective)
    def call(
        output: Tensor,
        given: Tensor,
        *args: object,
        group: torch.distributed.ProcessGroup,
        **kwargs: object,
    ) -> Any:
        if group.size() > 1:
            return collective(output, given, *args, group=group, **kwargs)
        if output.data_ptr() != given.data_ptr():
            output.copy_(given)
        return None

    return call


def _patch_megatron() -> None:
    from megatron.core.distributed import param_and_grad_buffer as buffers
    from megatron.core.fusions import fused_bias_swiglu as swiglu
    from megatron.core.tensor_parallel import random as mcore_random

    mcore_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(buffers, name, _unless_alone(getattr(buffers, name)))
    for name, function in [*vars(swiglu).items()]:
        # As it is written: torch.compile would look for a C++ compiler.
        setattr(swiglu, name, getattr(function, "_torchdynamo_orig_callable", function))


@cache
def _define_missing_name() -> None:
    """Define a name that 0.16's router reads and defines only where Transformer Engine is.

    Its multi-latent attention believes that Transformer Engine is there, and asks for a class of
    it. Both are as wrong on a GPU without Transformer Engine as on a CPU.
    """
    before_megatron()
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    if not isinstance(multi_latent_attention.TELinear, type):
        multi_latent_attention.HAVE_TE = False
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _keep_freed_memory() -> None:
    """Ask glibc to keep freed blocks, but for those of 16 MB and more.

    Its defaults give back the end of the heap, too, so that activations are mapped and zeroed anew
    in every step. Giving back every block of a megabyte makes a step a quarter longer. Keeping all
    leaves holes, as glibc 2.36 fits an aligned block into about half of those of its own size: two
    stages of a model with 220M parameters held 8.1 GB in place of 5.4.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _GIVEN_BACK)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


@cache
def install_mamba() -> None:
    """Let Megatron-Core's ``MambaMixer`` run where its CUDA kernels are not; idempotent.

    Does nothing where ``mamba_ssm`` is installed, or where there is a GPU, for which plain torch
    would be a poor answer.
    """
    from megatron.core.ssm import mamba_mixer
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    from nemo_minitron.runtime import mamba

    if mamba_mixer.HAVE_MAMBA_SSM or torch.cuda.is_available():
        return

    class ExtendedRMSNorm(mamba.GatedRMSNorm):
        """The norm of the mixer with its sharded state, as Megatron-Core defines it."""

        def sharded_state_dict(
            self,
            prefix: str = "",
            sharded_offsets: tuple[tuple[int, int, int], ...] = (),
            metadata: Any = None,
        ) -> Any:
            return make_sharded_tensors_for_checkpoint(
                self.state_dict(prefix="", keep_vars=True),
                prefix,
                {"weight": 0},
                sharded_offsets,
                tp_group=self.tp_group,
                dp_cp_group=metadata["dp_cp_group"],
            )

    mamba_mixer.HAVE_MAMBA_SSM = True
    mamba_mixer.ExtendedRMSNorm = ExtendedRMSNorm
    mamba_mixer.mamba_chunk_scan_combined = mamba.mamba_chunk_scan_combined
    mamba_mixer.mamba_split_conv1d_scan_combined = mamba.mamba_split_conv1d_scan_combined
    # Without it a step of decoding takes Megatron-Core's own path in torch.
    mamba_mixer.causal_conv1d_update = None
    mamba_mixer.selective_state_update = mamba.selective_state_update


@cache
def install_delta_net() -> None:
    """Let Megatron-Core's ``GatedDeltaNet`` run where its CUDA kernels are not; idempotent.

    Does nothing where ``fla`` is installed, or where there is a GPU.
    """
    from megatron.core.ssm.gated_delta_net import common, gdn

    from nemo_minitron.runtime import delta

    if common.HAVE_FLA or torch.cuda.is_available():
        return
    common.HAVE_FLA = True
    common.l2norm = delta.l2norm
    gdn.causal_conv1d = delta.causal_conv1d
    gdn.chunk_gated_delta_rule = delta.chunk_gated_delta_rule


@cache
def _patch_all() -> None:
    _keep_freed_memory()
    _patch_torch()
    _patch_random()
    _patch_factories()
    _patch_tensor()
    _patch_megatron()


def install() -> bool:
    """Make Megatron-Core usable on the CPU, and without Transformer Engine; idempotent.

    Returns:
        Whether the stand-in is active (False when CUDA is present).
    """
    active = not torch.cuda.is_available()
    if active:
        _patch_all()
    _define_missing_name()
    return active
