"""Layers of Ministral 3: queries are multiplied by a number that grows with their position.

It is 1 within the length that YaRN stretches, and after each further such length a logarithmic
step more. Attention is this package's own, also under Transformer Engine.
"""

from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_minitron.models.attention import LocalAttention, zigzag_positions
from nemo_minitron.models.spec import block_spec as common_spec


def query_scale(positions: Tensor, beta: float, length: int) -> Tensor:
    """Return fp32 of the same shape: what queries at these positions are multiplied by."""
    return 1 + beta * torch.log(1 + torch.floor(positions / length))


class ScaledQueryAttention(LocalAttention):
    """``LocalAttention`` of queries that are multiplied after the rotation."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        values: Any = config  # set by models.build, no fields of Megatron's
        self.beta: float = values.llama_4_scaling_beta
        self.length: int = values.yarn_original_max_position_embeddings

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Run ``LocalAttention``'s forward; a query without a mask follows the cached tokens."""
        length, group = query.size(0), self.cp_group
        if packed_seq_params is not None:
            positions = packed_seq_params.positions(length).t()
        else:
            positions = zigzag_positions(length, group.rank(), group.size(), query.device)[:, None]
        if attn_mask_type == AttnMaskType.no_mask:
            positions = positions + key.size(0) - 1
        scale = query_scale(positions, self.beta, self.length).to(query.dtype)
        return super().forward(
            query * scale[:, :, None, None],
            key,
            value,
            attention_mask,
            attn_mask_type,
            attention_bias,
            packed_seq_params,
        )


def block_spec(config: TransformerConfig, vp_stage: int | None, pp_rank: int) -> Any:
    """Return the spec of this stage's transformer block; see ``models.spec.block_spec``."""
    spec = common_spec(config, vp_stage, pp_rank)
    for layer in getattr(spec, "layer_specs", [spec]):
        layer.submodules.self_attention.submodules.core_attention = ScaledQueryAttention
    return spec
