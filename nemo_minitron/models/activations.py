"""The activation of an MLP or expert in the words of Megatron's configuration."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import quick_gelu, squared_relu
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_minitron.config.model import ModelConfig

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "squared_relu": squared_relu,
}


def activation_fields(config: ModelConfig) -> dict[str, Any]:
    """Fields of ``TransformerConfig``: the function, and what is done around a gate."""
    return {
        "gated_linear_unit": config.gated_linear_unit,
        "activation_func": _ACTIVATIONS[config.activation],
        "activation_func_clamp_value": config.activation_func_clamp_value,
        "glu_linear_offset": config.glu_linear_offset,
    }


class _GatedSilu(torch.autograd.Function):
    """``silu(gate) * linear``; the backward pass makes what it needs of them again."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        gate, linear = both.chunk(2, dim=-1)
        return F.silu(gate).mul_(linear)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (both,), (grad,) = ctx.saved_tensors, grads
        (gate, linear), out = both.chunk(2, dim=-1), torch.empty_like(both)
        by_gate, by_linear = out.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=by_linear)
        torch.ops.aten.silu_backward.grad_input(grad * linear, gate, grad_input=by_gate)
        return out


class GatedSilu(torch.nn.Module):
    """The gate of an MLP where no kernel of Megatron's has it: on a CPU.

    Megatron's own operations keep four tensors of the width of the MLP for the backward pass, this
    one the two that it is given, and the values are the same (``config.layers.has_plain_gate``). It
    has the place of Transformer Engine's activation.
    """

    def __init__(self, config: TransformerConfig) -> None:
        """Build it as Megatron asks."""
        super().__init__()

    def forward(self, both: Tensor) -> Tensor:
        """``[..., f]`` of ``[..., 2 f]``: the gate's values, then the others."""
        out: Tensor = _GatedSilu.apply(both)
        return out
