"""Rows of sharded tensors travel to their new owners. ``torch.distributed`` only, no Megatron.

Everything follows from two facts that every rank knows: which rows each rank owns and which it is
to own. So no sizes are negotiated, and a row that stays with its rank never enters a message.
Ranks are numbered inside the process group given.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Traffic:
    """Counts of the bytes that this rank sent to other ranks."""

    bytes_sent: int = 0
    messages: int = 0


@dataclass(frozen=True)
class Transfer:
    """Rows that go from one rank to another, or stay (``source == target``).

    Attributes:
        source: rank that owns them.
        target: rank that is to own them.
        take: ``[rows]`` their positions in the source's local tensor, or None for all of it.
        put: ``[rows]`` their positions in the target's local tensor, or None for all of it.
    """

    source: int
    target: int
    take: Tensor | None = None
    put: Tensor | None = None


@dataclass(frozen=True)
class Move:
    """How one tensor changes hands.

    Attributes:
        dim: dim of the tensor that rows are counted along.
        transfers: all of them, also those between other ranks; the same on every rank.
    """

    dim: int
    transfers: Sequence[Transfer]


def equal_shares(indices: Tensor, ranks: int, blocks: Sequence[int] | None = None) -> list[Tensor]:
    """Contiguous shares of a dim, one per tensor-parallel rank.

    Args:
        indices: ``[n]`` global indices in the order they are stored.
        ranks: tensor-parallel ranks; must divide each block.
        blocks: sizes of the blocks that are shared out one by one (gate and up); one if None.

    Returns:
        Per rank the ``[n / ranks]`` global indices it holds, in its local order.
    """
    shares = [block.view(ranks, -1) for block in indices.split(list(blocks or [len(indices)]))]
    return [torch.cat([block[rank] for block in shares]) for rank in range(ranks)]


def plan_transfers(owned: Mapping[int, Tensor], wanted: Mapping[int, Tensor]) -> list[Transfer]:
    """List which rank sends which rows to which rank.

    Args:
        owned: rank -> global indices it holds, in local order; no index twice.
        wanted: rank -> global indices it is to hold, in local order.

    Raises:
        ValueError: nobody owns a wanted index.
    """
    everything = torch.cat([*owned.values(), *wanted.values()])
    size = int(everything.max()) + 1 if len(everything) else 0
    owner, position = torch.full((2, size), -1)
    for rank, indices in owned.items():
        owner[indices] = rank
        position[indices] = torch.arange(len(indices))
    transfers = []
    for target, indices in wanted.items():
        sources = owner[indices]
        if (sources < 0).any():
            raise ValueError(f"no rank owns rows {indices[sources < 0].tolist()}")
        for source in sources.unique().tolist():
            put = (sources == source).nonzero().flatten()
            transfers.append(Transfer(source, target, position[indices[put]], put))
    return transfers


def travel_order(sources: Sequence[int], targets: Sequence[int]) -> list[int]:
    """Order of work in which no pipeline rank holds much more than before or after.

    Layers that stay shrink first. Of those that go to a later stage the last goes first, of those
    that go to an earlier stage the first: a stage gives before it is given.

    Args:
        sources: virtual stage (number of the model chunk along the pipeline) of each kept layer
            before; the plain stage would not do, an interleaved pipeline visits it several times.
        targets: the same after.

    Returns:
        Positions of the kept layers.
    """
    positions = range(len(sources))
    stay = [p for p in positions if sources[p] == targets[p]]
    later = [p for p in reversed(positions) if sources[p] < targets[p]]
    earlier = [p for p in positions if sources[p] > targets[p]]
    return stay + later + earlier


def redistribute(
    local: Mapping[str, Tensor],
    out: Mapping[str, Tensor],
    moves: Mapping[str, Move],
    group: dist.ProcessGroup,
    traffic: Traffic,
) -> None:
    """Move the rows of several tensors at once: one batch of sends and receives.

    Called by every rank that is a source or a target; other ranks of the group need not. At least
    one collective must have run on ``group`` before (NCCL makes its connections there).

    Args:
        local: what this rank holds, for the tensors it is a source of.
        out: uninitialised tensors to fill, for those it is a target of.
        moves: all tensors, in the same order on every rank.
        group: the ranks that transfers name.
        traffic: this rank's counter.
    """
    me = group.rank()
    operations: list[dist.P2POp] = []
    arriving: list[tuple[Tensor, int, Tensor, Tensor]] = []
    for tag, (name, move) in enumerate(moves.items()):
        for transfer in move.transfers:
            if transfer.source == me:
                rows = _take(local[name], move.dim, transfer.take)
                if transfer.target == me:
                    _put(out[name], move.dim, transfer.put, rows)
                else:
                    rows = rows.contiguous()
                    peer = dist.get_global_rank(group, transfer.target)
                    operations.append(dist.P2POp(dist.isend, rows, peer, group, tag))
                    traffic.bytes_sent += rows.nbytes
                    traffic.messages += 1
            elif transfer.target == me:
                rows = _landing(out[name], move.dim, transfer.put)
                peer = dist.get_global_rank(group, transfer.source)
                operations.append(dist.P2POp(dist.irecv, rows, peer, group, tag))
                if transfer.put is not None:
                    arriving.append((out[name], move.dim, transfer.put, rows))
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    for target, dim, put, rows in arriving:
        _put(target, dim, put, rows)


def _take(tensor: Tensor, dim: int, positions: Tensor | None) -> Tensor:
    if positions is None:
        return tensor
    return tensor.index_select(dim, positions.to(tensor.device))


def _put(tensor: Tensor, dim: int, positions: Tensor | None, rows: Tensor) -> None:
    if positions is None:
        tensor.copy_(rows)
    else:
        tensor.index_copy_(dim, positions.to(tensor.device), rows)


def _landing(out: Tensor, dim: int, positions: Tensor | None) -> Tensor:
    """Return the buffer for received rows: the tensor itself if they are all of its rows."""
    if positions is None:
        return out
    shape = list(out.shape)
    shape[dim] = len(positions)
    return out.new_empty(shape)
