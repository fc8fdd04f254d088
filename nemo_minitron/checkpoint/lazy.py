"""Tensors that are read when asked for.

A *store* is a dictionary of them by parameter name. Import, prune and export are functions
store -> store followed by one writer, so memory is bounded by the tensors in flight.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from nemo_minitron.checkpoint.page_cache import BLOCK_BYTES
from nemo_minitron.families.dims import Run


@dataclass(frozen=True)
class LazyTensor:
    """A tensor on disk, or a function of some.

    Attributes:
        shape: global shape.
        dtype: dtype that ``read`` returns.
        read: reads (or computes) the tensor: CPU, contiguous, owned by the caller. Thread safe.
        read_rows: ``(start, stop)`` -> these rows of dim 0, at the cost of little more than them;
            None where the whole tensor would have to be read.
        origin: file it is read from, for messages.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    read_rows: Callable[[int, int], Tensor] | None = None
    origin: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


Store = dict[str, LazyTensor]


def from_tensor(tensor: Tensor) -> LazyTensor:
    """Wrap a tensor that is already in memory."""
    return LazyTensor(
        tuple(tensor.shape), tensor.dtype, lambda: tensor, lambda start, stop: tensor[start:stop]
    )


def row_blocks(tensor: LazyTensor) -> Iterator[tuple[int, int, Callable[[], Tensor]]]:
    """``(start, stop, read)``: runs of rows of at most ``BLOCK_BYTES`` (one row at least).

    The whole tensor is one where it is small, or where its rows cannot be read alone.
    """
    rows = tensor.shape[0] if tensor.shape else 1
    if tensor.read_rows is None or tensor.nbytes <= BLOCK_BYTES:
        yield 0, rows, tensor.read
        return
    step = max(1, BLOCK_BYTES * rows // tensor.nbytes)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield start, stop, partial(tensor.read_rows, start, stop)


def from_runs(parts: Sequence[LazyTensor], runs: Sequence[Run]) -> LazyTensor:
    """The tensor that is made of runs of rows of others, equal but in their number of rows."""
    first = parts[0]
    ends = [0]
    for _, start, stop in runs:
        ends.append(ends[-1] + stop - start)
    shape = (ends[-1], *first.shape[1:])

    def read() -> Tensor:
        wholes = [part.read() for part in parts]
        return torch.cat([wholes[part][start:stop] for part, start, stop in runs])

    def read_rows(start: int, stop: int) -> Tensor:
        found = []
        for (part, begin, end), place in zip(runs, ends, strict=False):
            low, high = max(start - place, 0) + begin, min(stop - place + begin, end)
            if low < high:
                found.append(parts[part].read_rows(low, high))  # type: ignore[misc]  # given out only where all parts can
        return found[0] if len(found) == 1 else torch.cat(found)

    if any(part.read_rows is None for part in parts):
        return LazyTensor(shape, first.dtype, read)
    return LazyTensor(shape, first.dtype, partial(read_rows, 0, ends[-1]), read_rows)


def first_rows(tensor: LazyTensor, count: int) -> LazyTensor:
    """The first rows of a tensor, such as an embedding without the padding of its vocabulary."""
    rows = tensor.read_rows or (lambda start, stop: tensor.read()[start:stop].contiguous())
    return LazyTensor((count, *tensor.shape[1:]), tensor.dtype, lambda: rows(0, count), rows)


def store_nbytes(store: Store) -> int:
    """Return bytes of all tensors of a store."""
    return sum(tensor.nbytes for tensor in store.values())


def main_dtype(store: Store) -> torch.dtype:
    """Return the dtype that most bytes of a store have."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in store.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _after_read(store: Store, after: Callable[[str, Tensor, bool], None]) -> Store:
    """Return a store that calls ``after(name, part, is_last)`` after every read."""

    def wrapped(name: str, tensor: LazyTensor) -> LazyTensor:
        def read() -> Tensor:
            value = tensor.read()
            after(name, value, True)
            return value

        def read_rows(start: int, stop: int) -> Tensor:
            assert tensor.read_rows is not None
            value = tensor.read_rows(start, stop)
            after(name, value, stop == tensor.shape[0])
            return value

        rows = None if tensor.read_rows is None else read_rows
        return replace(tensor, read=read, read_rows=rows)

    return {name: wrapped(name, tensor) for name, tensor in store.items()}


def on_read(store: Store, visit: Callable[[str, Tensor], None]) -> Store:
    """Return a store that calls ``visit(name, part)`` after every read, in the reading thread.

    ``part`` is the whole tensor or the rows that were read of it.
    """
    return _after_read(store, lambda name, part, _: visit(name, part))


def on_done(store: Store, done: Callable[[], None]) -> Store:
    """Return a store that calls ``done()`` when a tensor, or its last row, has been read."""
    return _after_read(store, lambda _, __, is_last: done() if is_last else None)


def refuse_nonfinite(name: str, tensor: Tensor, key: str = "source") -> None:
    """A visitor for ``on_read`` that refuses weights no model can run with.

    Args:
        name: of the tensor.
        tensor: what was read.
        key: config key that named where it was read from, for the message.

    Raises:
        ValueError: the tensor holds NaN or infinity.
    """
    # One sum is several times faster than isfinite; it can overflow, so it only acquits.
    if not tensor.is_floating_point() or math.isfinite(tensor.sum()):
        return
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise ValueError(
            f"{name} holds {bad} NaN or infinite values of {tensor.numel()}; the weights are "
            f"damaged: set {key} to an intact copy"
        )
