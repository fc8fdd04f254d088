"""Causal attention for the local spec: CPUs and GPUs without Transformer Engine.

Megatron's local ``DotProductAttention`` refuses context parallelism; this one gathers keys and
values over the context-parallel group and knows Megatron's zigzag order (rank r of N holds chunks
r and 2N-1-r of 2N). Shape letters: s local sequence, b micro-batch, n local heads, g local query
groups, d head dim (of values e, where multi-latent attention gives them another one).
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor


def zigzag_positions(
    local_length: int, rank: int, size: int, device: torch.device | None = None
) -> Tensor:
    """Return global positions of the tokens a context-parallel rank holds.

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


def gathered_positions(local_length: int, size: int, device: torch.device | None = None) -> Tensor:
    """Return ``[s * cp]`` global positions of gathered tokens, those of the first rank first."""
    ranks = [zigzag_positions(local_length, rank, size, device) for rank in range(size)]
    return torch.cat(ranks)


def gather_sequence(local: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """Return tokens of all context-parallel ranks, ``[s, ...]`` to ``[s * cp, ...]``.

    Each rank gets its part of the summed gradient: sequence parallelism does the same.
    """
    if group.size() == 1:
        return local
    out: Tensor = gather_from_sequence_parallel_region(local, group=group)
    return out


def causal_mask(
    local_length: int,
    group: torch.distributed.ProcessGroup,
    device: torch.device | None = None,
    window: int | None = None,
) -> Tensor:
    """Return ``[s, s * cp]`` boolean mask of this rank's queries over all keys in gathered order.

    It is made where it is used: copying it to a GPU would have the host wait in every layer.

    Args:
        local_length: tokens on this rank.
        group: the context-parallel group.
        device: of the result; None is the CPU.
        window: tokens that a query sees, itself and those before it; None is all of them.
    """
    size = group.size()
    queries = zigzag_positions(local_length, group.rank(), size, device)
    keys = gathered_positions(local_length, size, device)
    distance = queries[:, None] - keys[None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def capped(x: Tensor, cap: float | None) -> Tensor:
    """Return ``x`` without a cap, else values that come near the cap and never exceed it."""
    return x if cap is None else torch.tanh(x / cap) * cap


def attend_with_sinks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float | None = None,
    dropout: float = 0.0,
    cap: float | None = None,
) -> Tensor:
    """Attention in which every head may have one more score, of a key that has no value.

    Args:
        query: ``[b, n, s, d]``.
        key: ``[b, g, t, d]``.
        value: ``[b, g, t, d]``.
        mask: ``[s, t]`` or ``[b, 1, s, t]``, true where a query sees a key; None where all see
            all.
        sinks: ``[n]``, the scores; None without such keys.
        scale: of the other scores; None is ``d ** -0.5``.
        dropout: probability that a weight is 0.
        cap: what no other score exceeds; None for scores as they are.

    Returns:
        ``[b, n, s, d]``.
    """
    heads, width = query.size(1), query.size(3)
    key, value = (x.repeat_interleave(heads // x.size(1), dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (width**-0.5 if scale is None else scale)
    scores = capped(scores, cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is None:
        weights = scores.softmax(-1, dtype=torch.float32)
        return F.dropout(weights.to(value.dtype), dropout) @ value
    sink = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, sink], -1).softmax(-1, dtype=torch.float32)[..., :-1]
    return F.dropout(weights.to(value.dtype), dropout) @ value


def _of_its_own(x: Tensor) -> Tensor:
    """A tensor that is not a view of a larger one, which the backward pass would keep with it."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


class LocalAttention(torch.nn.Module):
    """Scaled dot-product attention: causal, with windows, sinks, soft caps and grouped queries.

    ``softmax_offset`` holds the sinks of this rank's heads, under Megatron-Core's name.
    """

    softmax_offset: torch.nn.Parameter | None

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        """Build it as Megatron asks; the channels are those of the tensors that it is given."""
        super().__init__()
        assert pg_collection is not None
        assert attn_mask_type == AttnMaskType.causal, attn_mask_type
        self.cp_group = pg_collection.cp
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale
        size, layers = config.window_size, config.window_attn_skip_freq
        windowed = is_layer_window_attention(size, layers, layer_number)
        self.window = size[0] + 1 if windowed and size is not None else None
        self.cap: float | None = config.attn_logit_softcapping  # set by models.build
        assert config.softmax_type in ("vanilla", "learnable"), config.softmax_type
        # The norms of queries and keys keep the whole projection anyway.
        self.normed = config.qk_layernorm
        self.tp_group, sinks = pg_collection.tp, None
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // self.tp_group.size()
            sinks = torch.nn.Parameter(torch.zeros(heads))
            set_tensor_model_parallel_attributes(sinks, is_parallel=True, dim=0, stride=1)
        self.register_parameter("softmax_offset", sinks)

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
        """``[s, b, n * e]`` of ``[s, b, n, d]`` query, ``[s, b, g, d]`` key and ``[.., e]`` value.

        With a KV cache Megatron says ``no_mask`` for the one query that follows the cached keys.
        Samples that documents share bring their mask (``models.documents.SharedSamples``).
        """
        assert attention_bias is None
        mask, causal = None, attn_mask_type != AttnMaskType.no_mask
        assert causal or query.size(0) == 1, query.shape
        if not causal and self.window is not None:
            key, value = key[-self.window :], value[-self.window :]
        hides = causal and self.window is not None and self.window < query.size(0)
        sinks = self.softmax_offset
        eager = sinks is not None or self.cap is not None
        if packed_seq_params is not None:
            mask = packed_seq_params.mask(query.size(0), self.window)
        elif self.cp_group.size() > 1 or hides or (causal and eager):
            mask = causal_mask(query.size(0), self.cp_group, query.device, self.window)
        if mask is not None:
            key = gather_sequence(key, self.cp_group)
            value = gather_sequence(value, self.cp_group)
        if torch.is_grad_enabled() and not (self.normed or eager):  # eager attention copies them
            query, key, value = map(_of_its_own, (query, key, value))
        # [s, b, n, d] -> [b, n, s, d]
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        if eager:
            scale = self.softmax_scale
            out = attend_with_sinks(query, key, value, mask, sinks, scale, dropout, self.cap)
            return out.permute(2, 0, 1, 3).flatten(2).contiguous()
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=causal and mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.size(1) != key.size(1),
        )
        # [b, n, s, d] -> [s, b, n * d]
        return out.permute(2, 0, 1, 3).flatten(2).contiguous()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Return the sinks as Megatron stores a tensor that is split along its first dim."""
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return state
