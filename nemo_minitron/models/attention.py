"""Causal attention for the local spec: CPUs and GPUs without Transformer Engine.

Megatron's local ``DotProductAttention`` refuses context parallelism; this one gathers keys and
values over the context-parallel group and knows Megatron's zigzag order (rank r of N holds chunks
r and 2N-1-r of 2N). Shape letters: s local sequence, b micro-batch, n local heads, g local query
groups, d head dim.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor


def zigzag_positions(
    local_length: int, rank: int, size: int, device: torch.device | None = None
) -> Tensor:
    """Global positions of the tokens a context-parallel rank holds.

    Args:
        local_length: tokens on this rank, two equal chunks.
        rank: rank in the context-parallel group.
        size: ranks in the group.
        device: of the result; None is the CPU.

    Returns:
        ``[local_length]`` int64 global positions, in local order.
    """
    if size == 1:
        return torch.arange(local_length, device=device)
    half = local_length // 2
    first = torch.arange(rank * half, (rank + 1) * half, device=device)
    mirror = 2 * size - 1 - rank
    second = torch.arange(mirror * half, (mirror + 1) * half, device=device)
    return torch.cat([first, second])


class _GatherSequence(torch.autograd.Function):
    """All-gather along dim 0; the gradient is reduce-scattered."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        ctx.group = group
        out = [torch.empty_like(local) for _ in range(group.size())]
        torch.distributed.all_gather(out, local.contiguous(), group=group)
        return torch.cat(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous()
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad.chunk(ctx.group.size())[ctx.group.rank()].contiguous(), None


def gather_sequence(local: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """Tokens of all context-parallel ranks, ``[s, ...]`` to ``[s * cp, ...]``, differentiable."""
    if group.size() == 1:
        return local
    out: Tensor = _GatherSequence.apply(local, group)
    return out


def causal_mask(
    local_length: int,
    group: torch.distributed.ProcessGroup,
    device: torch.device | None = None,
    window: int | None = None,
) -> Tensor:
    """``[s, s * cp]`` boolean mask of this rank's queries over all keys in gathered order.

    It is made where it is used: copying it to a GPU would have the host wait in every layer.

    Args:
        local_length: tokens on this rank.
        group: the context-parallel group.
        device: of the result; None is the CPU.
        window: tokens that a query sees, itself and those before it; None is all of them.
    """
    size = group.size()
    queries = zigzag_positions(local_length, group.rank(), size, device)
    keys = torch.cat([zigzag_positions(local_length, rank, size, device) for rank in range(size)])
    distance = queries[:, None] - keys[None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


class LocalAttention(torch.nn.Module):
    """Scaled dot-product attention: causal, windows, grouped queries, context parallelism."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        assert pg_collection is not None
        assert attn_mask_type == AttnMaskType.causal, attn_mask_type
        self.cp_group = pg_collection.cp
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale
        size, layers = config.window_size, config.window_attn_skip_freq
        windowed = is_layer_window_attention(size, layers, layer_number)
        self.window = size[0] + 1 if windowed and size is not None else None

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
        """``[s, b, n, d]`` query and ``[s, b, g, d]`` key, value -> ``[s, b, n * d]``.

        With a KV cache Megatron says ``no_mask`` for the one query that follows the cached keys.
        """
        assert attention_bias is None
        assert packed_seq_params is None
        mask, causal = None, attn_mask_type != AttnMaskType.no_mask
        assert causal or query.size(0) == 1, query.shape
        if not causal and self.window is not None:
            key, value = key[-self.window :], value[-self.window :]
        hides = causal and self.window is not None and self.window < query.size(0)
        if self.cp_group.size() > 1 or hides:
            mask = causal_mask(query.size(0), self.cp_group, query.device, self.window)
            key = gather_sequence(key, self.cp_group)
            value = gather_sequence(value, self.cp_group)
        # [s, b, n, d] -> [b, n, s, d]
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal and mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.size(1) != key.size(1),
        )
        # [b, n, s, d] -> [s, b, n * d]
        return out.permute(2, 0, 1, 3).flatten(2).contiguous()
