"""Kept query heads take over what pruned ones had (2407.14679, section 2.3).

With the L heads of a query group in order of importance, of which K stay, and counting from 1,

    head_i <- head_i + (head_i - head_{2K-i+1})    for i = 2K-L+1 .. K,

so the last kept head is paired with the first pruned one, and so on outwards; the other kept heads
stay as they are. (The paper's lower bound K-(L-K) would ask for a head L+1.) With grouped queries
only query heads are merged: rows of W^Q. Where every head has a key and a value of its own the
heads of a layer are ranked together, and their rows of W^K and W^V are merged too. W^O is no part
of a head in the paper's notation, head_i = Attn(X W^Q_i, X W^K_i, X W^V_i): it is only sliced.

A plan carries the result as *terms* ``[kept, head, coefficient]``: query head ``kept`` becomes the
sum of coefficient x head over its terms. So rounds of pruning compose, and every executor applies
the same linear map, before it cuts anything. Torch is imported only where tensors are touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_minitron.config.model import ModelConfig

Terms = list[list[int]]
"""``[kept, head, coefficient]`` of one layer: global query head indices before pruning."""


def merge_pairs(heads: int, kept: int) -> list[tuple[int, int]]:
    """Ranks (from 0, by falling importance) of each kept head that is merged and of its partner.

    Args:
        heads: heads that are ranked together.
        kept: how many of them stay, at least half.
    """
    return [(kept - 1 - i, kept + i) for i in range(heads - kept)]


def merge_terms(
    config: ModelConfig, scores: Sequence[float], groups: Sequence[int], kept: Sequence[int]
) -> Terms:
    """Return terms of one layer.

    Args:
        config: the model before pruning.
        scores: ``[n]`` importance of its query heads.
        groups: query groups that stay.
        kept: query heads that stay, the best of each kept group; none in a layer without attention.
    """
    if not kept:
        return []
    per_group = config.heads_per_group
    pools = [range(group * per_group, (group + 1) * per_group) for group in groups]
    if per_group == 1:
        pools = [range(config.num_attention_heads)]
    terms = []
    for pool in pools:
        # Kept heads first: at equal scores of whole groups the sums decide, not the heads.
        order = sorted(pool, key=lambda head: (head not in kept, -scores[head], head))
        for stays, goes in merge_pairs(len(order), len(set(order) & set(kept))):
            terms += [[order[stays], order[stays], 2], [order[stays], order[goes], -1]]
    return terms


def compose_terms(first: Terms, heads: Sequence[int], second: Terms, kept: Sequence[int]) -> Terms:
    """Return terms of two rounds of pruning in a row, in terms of the model before both.

    Args:
        first: terms of the first round.
        heads: query heads that the first round keeps.
        second: terms of the second round; it counts heads as they are after the first.
        kept: query heads that the second round keeps.
    """
    middle = [_sums(first).get(head, {head: 1}) for head in heads]
    sums = _sums(second)
    terms = []
    for head in kept:
        total: dict[int, int] = {}
        for source, factor in sums.get(head, {head: 1}).items():
            for original, coefficient in middle[source].items():
                total[original] = total.get(original, 0) + factor * coefficient
        if total != {heads[head]: 1}:
            terms += [[heads[head], source, factor] for source, factor in sorted(total.items())]
    return terms


def _sums(terms: Terms) -> dict[int, dict[int, int]]:
    """Return, for each kept head, the coefficient of each head that is merged into it."""
    sums: dict[int, dict[int, int]] = {}
    for kept, head, coefficient in terms:
        sums.setdefault(kept, {})[head] = coefficient
    return sums


def merge_qkv(tensor: Tensor, config: ModelConfig, terms: Terms, first_group: int = 0) -> Tensor:
    """Merge the rows of ``linear_qkv`` (weight or bias), not cut yet.

    Args:
        tensor: ``[rows, ...]`` rows of whole query groups (Megatron's interleaving: per group its
            query heads, key, value), all of them or the contiguous groups of one rank.
        config: the model before pruning.
        terms: of this layer; those of other groups' heads are left out.
        first_group: global index of the first group in ``tensor``. Heads with keys of their own may
            be merged across groups: ``tensor`` must then hold the whole layer.

    Returns:
        A new tensor of the same shape; sums are made in fp32 (fp64 for fp64) and rounded once.
    """
    import torch

    per_group = config.heads_per_group
    merged = tensor.clone()
    # One block: the kv_channels rows of one query head, key or value.
    blocks, out = (x.unflatten(0, (-1, config.kv_channels)) for x in (tensor, merged))
    dtype = torch.promote_types(tensor.dtype, torch.float32)

    def block(head: int, part: int) -> int:
        group, member = divmod(head, per_group)
        place = (member, per_group, per_group + 1)[part]
        return (group - first_group) * (per_group + 2) + place

    for kept, sources in _sums(terms).items():
        if not 0 <= block(kept, 0) < len(blocks):
            continue
        for part in range(3 if per_group == 1 else 1):  # query, key, value
            total = torch.zeros(blocks.shape[1:], dtype=dtype, device=tensor.device)
            for head, factor in sources.items():
                total.add_(blocks[block(head, part)], alpha=factor)
            out[block(kept, part)] = total
    return merged
