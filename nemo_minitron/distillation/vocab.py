"""Vocabulary shards: which rows a rank holds, and softmax denominators across them.

Torch only.
"""

from dataclasses import dataclass
from typing import Any

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

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Local column of every global id (0 where another rank holds it) and whether it is here.

        Args:
            ids: int64 global ids of any shape.
        """
        column = ids - self.start
        mine = (column >= 0) & (column < self.valid)
        return torch.where(mine, column, 0), mine


def all_reduce(tensor: Tensor, group: Group, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """In-place all-reduce; nothing happens in a group of one."""
    if group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


def row_max(logits: Tensor) -> Tensor:
    """``[c]`` largest of ``[c, v]`` local logits; the lowest finite number where ``v`` is 0."""
    if logits.size(-1):
        return logits.amax(-1)
    return logits.new_full(logits.shape[:1], torch.finfo(logits.dtype).min)


def log_normalizers(logits: list[Tensor], shard: VocabShard) -> list[Tensor]:
    """Log of the softmax denominators over the whole vocabulary.

    Args:
        logits: ``[c, v]`` fp32 local logits of several models; ``v`` may be 0.
        shard: the vocabulary shard.

    Returns:
        ``[c, 1]`` for each model. Two collectives in all, whatever the number of models.
    """
    peak = torch.stack([row_max(x) for x in logits])
    all_reduce(peak, shard.group, dist.ReduceOp.MAX)
    total = torch.stack(
        [(x - m[:, None]).exp_().sum(-1) for x, m in zip(logits, peak, strict=True)]
    )
    all_reduce(total, shard.group)
    return list((peak + total.log()).unsqueeze(-1))
