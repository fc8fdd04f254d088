"""Vocabulary shards: which rows a rank holds, and softmaxes across them.

Torch only. Letters: c tokens of a chunk, v local vocabulary rows without padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup


@dataclass(frozen=True)
class VocabShard:
    """The vocabulary rows of this tensor-parallel rank.

    Attributes:
        group: tensor-parallel group.
        vocab_size: true (unpadded) global vocabulary.
        rows: rows of the local weight, padding included (the same on every rank).
    """

    group: Group
    vocab_size: int
    rows: int

    @property
    def start(self) -> int:
        """Global id of the first local row."""
        return self.group.rank() * self.rows

    @property
    def valid(self) -> int:
        """Local rows that are real vocabulary; may be 0 on the last ranks."""
        return max(0, min(self.rows, self.vocab_size - self.start))

    @property
    def first(self) -> bool:
        """Whether this rank adds the terms that are the same on every rank."""
        return self.group.rank() == 0

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the local columns of global ids, and whether this rank holds them.

        Args:
            ids: int64 of any shape.

        Returns:
            Local column of every id (0 where another rank holds it), and whether it is here.
        """
        column = ids - self.start
        mine = (column >= 0) & (column < self.valid)
        return torch.where(mine, column, 0), mine


def all_reduce(
    tensor: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> Tensor:
    """In-place all-reduce; nothing happens in a group of one."""
    if group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


def _row_max(logits: Tensor) -> Tensor:
    """Return ``[c]`` largest of ``[c, v]``; the lowest finite number where ``v`` is 0."""
    if logits.size(-1):
        return logits.amax(-1)
    return logits.new_full(logits.shape[:1], torch.finfo(logits.dtype).min)


def softmax_(logits: Sequence[Tensor], shard: VocabShard) -> list[Tensor]:
    """Turn local logits of several models into probabilities, in place.

    Args:
        logits: ``[c, v]`` each, fp32 or fp64; ``v`` may be 0.
        shard: the vocabulary shard.

    Returns:
        ``[c, 1]`` log of the denominator over the whole vocabulary, for each model. Two
        collectives in all, whatever the number of models; none in a group of one.
    """
    local_peak = torch.stack([_row_max(x) for x in logits])
    total = torch.stack(
        [x.sub_(m[:, None]).exp_().sum(-1) for x, m in zip(logits, local_peak, strict=True)]
    )
    peak = all_reduce(local_peak.clone(), shard.group, dist.ReduceOp.MAX)
    # Exponentials are relative to the local maximum: the factor brings them to the global one.
    factor = (local_peak - peak).exp_()
    total = all_reduce(total.mul_(factor), shard.group)
    for x, f in zip(logits, factor / total, strict=True):
        x.mul_(f[:, None])
    return list((peak + total.log()).unsqueeze(-1))


def log_normalizer(logits: Tensor, shard: VocabShard) -> Tensor:
    """Return ``[c, 1]`` log of the softmax denominator of ``[c, v]`` local logits, which stay."""
    peak = all_reduce(_row_max(logits), shard.group, dist.ReduceOp.MAX)[:, None]
    total = all_reduce((logits - peak).exp_().sum(-1, keepdim=True), shard.group)
    return peak + total.log()
