"""Layers of Granite: attention and MLP multiply what they add, the last norm divides the logits.

The logits are a linear function of the output of the last norm, so that is what is divided: every
loss that starts from it sees the model's own logits.
"""

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TENorm, TERowParallelLinear
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_minitron.models.spec import HAVE_TE, LocalNorm
from nemo_minitron.models.spec import block_spec as common_spec
from nemo_minitron.runtime.megatron import mlp_submodules

_Row: Any = TERowParallelLinear if HAVE_TE else RowParallelLinear
_Norm: Any = TENorm if HAVE_TE else LocalNorm


class ScaledRowParallelLinear(_Row):
    """A row-parallel linear layer whose output is multiplied."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: object
    ) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.multiplier: float = config.multipliers["residual"]  # set by models.build

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        """``[s, b, w / tp]`` -> ``[s, b, h]`` (s split under sequence parallelism)."""
        out, bias = super().forward(x, *args, **kwargs)
        return out * self.multiplier, bias


class LastNorm:
    """The norm before the output layer, its output divided by ``logits``."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5) -> torch.nn.Module:  # type: ignore[misc]  # it makes a norm, as Megatron's wrapper does
        """Build the norm the way Megatron's spec system asks for one."""
        divisor = config.multipliers["logits"]
        norm: torch.nn.Module = _Norm(config=config, hidden_size=hidden_size, eps=eps)
        norm.register_forward_hook(lambda module, inputs, out: out / divisor)
        return norm


def block_spec(config: TransformerConfig, vp_stage: int | None, pp_rank: int) -> Any:
    """Return the spec of this stage's transformer block; see ``models.spec.block_spec``."""
    spec = common_spec(config, vp_stage, pp_rank)
    count = get_num_layers_to_build(config, vp_stage, pp_rank)
    layers = getattr(spec, "layer_specs", [spec] * count)
    for layer in layers:
        layer.submodules.self_attention.submodules.linear_proj = ScaledRowParallelLinear
        mlp_submodules(layer.submodules.mlp).linear_fc2 = ScaledRowParallelLinear
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=LastNorm)
