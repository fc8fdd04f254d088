"""Layers with gated delta nets, Megatron-Core's own module, beside layers with attention.

Transformer Engine's where it is installed; elsewhere the same of Megatron's local modules, under
the names that Transformer Engine's have in checkpoints.
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules, common
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from nemo_minitron.config.layers import LINEAR, kinds_of
from nemo_minitron.models.spec import HAVE_TE, local_block
from nemo_minitron.runtime import cpu


class HeadNorm(torch.nn.Module):
    """RMSNorm of each head's output, with one weight for all heads.

    Every tensor-parallel rank has heads of its own, so the gradients of the weight are summed;
    Megatron does that under sequence parallelism alone. The weight is not the distance from 1,
    whatever the other norms have.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        """Make the weight.

        Args:
            config: Megatron's configuration.
            hidden_size: channels of a head.
            eps: added to the mean of squares.
        """
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        self.group: dist.ProcessGroup | None = None  # the ranks that share out the heads

    def forward(self, x: Tensor) -> Tensor:
        """``[tokens and heads, e]`` -> the same shape and dtype."""
        weight = self.weight
        if self.group is not None:
            weight = copy_to_tensor_model_parallel_region(weight, group=self.group)
        return weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


class DeltaNet(GatedDeltaNet):
    """Megatron-Core's gated delta net, also where its kernels are not installed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.out_norm.group = self.tp_group

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Run Megatron's forward pass; on a CPU its small functions are not compiled."""
        cuda = torch.cuda.is_available()
        with nullcontext() if cuda else torch.compiler.set_stance("force_eager"):
            out: tuple[Tensor, Tensor | None] = super().forward(*args, **kwargs)
            return out


def block_spec(config: TransformerConfig, vp_stage: int | None, pp_rank: int) -> Any:
    """Return the spec of this stage's transformer block; see ``models.spec.block_spec``.

    Raises:
        ValueError: there is a GPU, but no kernels for gated delta nets.
    """
    cpu.install_delta_net()
    if not common.HAVE_FLA:
        raise ValueError(
            "gated delta nets on a GPU need the package flash-linear-attention; pip install "
            "flash-linear-attention"
        )
    if HAVE_TE:
        return _te_block(config, vp_stage, pp_rank)
    spec = local_block(config, vp_stage, pp_rank)
    first = get_transformer_layer_offset(config, vp_stage, pp_rank)
    count = get_num_layers_to_build(config, vp_stage, pp_rank)
    for layer, kinds in zip(spec.layer_specs, kinds_of(config)[first : first + count], strict=True):
        if LINEAR in kinds:
            _use_delta_net(layer.submodules)
    return spec


def _use_delta_net(layer: Any) -> None:
    """Put a gated delta net into a layer that Megatron made for attention."""
    layer.self_attention = ModuleSpec(
        module=DeltaNet,
        submodules=GatedDeltaNetSubmodules(
            in_proj=ColumnParallelLinear, out_norm=HeadNorm, out_proj=RowParallelLinear
        ),
    )
    layer.sharded_state_dict_keys_map = {
        **layer.sharded_state_dict_keys_map,
        "input_layernorm.": "self_attention.in_proj.layer_norm_",
    }


def _te_block(config: TransformerConfig, vp_stage: int | None, pp_rank: int) -> Any:
    """Return Megatron's own layers of Transformer Engine."""
    from megatron.core.models.gpt import experimental_attention_variant_module_specs as own

    spec = own.get_transformer_block_with_experimental_attention_variant_spec(
        config, vp_stage, pp_rank
    )
    for layer in spec.layer_specs:
        attention = layer.submodules.self_attention
        if attention.module is GatedDeltaNet:
            attention.module = DeltaNet
            attention.submodules.out_norm = HeadNorm
    return spec
