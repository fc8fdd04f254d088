"""Tensors that are read when asked for.

A *store* is a dictionary of them by parameter name. Import, prune and export are functions
store -> store followed by one writer, so memory is bounded by the tensors in flight.
"""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class LazyTensor:
    """A tensor on disk, or a function of some.

    Attributes:
        shape: global shape.
        dtype: dtype that ``read`` returns.
        read: reads (or computes) the tensor: CPU, contiguous, owned by the caller. Thread safe.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


Store = dict[str, LazyTensor]


def from_tensor(tensor: Tensor) -> LazyTensor:
    """Wrap a tensor that is already in memory."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def store_nbytes(store: Store) -> int:
    """Bytes of all tensors of a store."""
    return sum(tensor.nbytes for tensor in store.values())


def main_dtype(store: Store) -> torch.dtype:
    """Dtype that most bytes of a store have."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in store.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def on_read(store: Store, visit: Callable[[str, Tensor], None]) -> Store:
    """The same store, calling ``visit(name, tensor)`` after every read, in the reading thread."""

    def visited(name: str, tensor: LazyTensor) -> Callable[[], Tensor]:
        def read() -> Tensor:
            value = tensor.read()
            visit(name, value)
            return value

        return read

    return {name: replace(tensor, read=visited(name, tensor)) for name, tensor in store.items()}


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
    if not tensor.is_floating_point() or torch.isfinite(tensor.sum()):
        return
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise ValueError(
            f"{name} holds {bad} NaN or infinite values of {tensor.numel()}; the weights are "
            f"damaged: set {key} to an intact copy"
        )


def shared_parts(read: Callable[[], Sequence[Tensor]], parts: int) -> list[Callable[[], Tensor]]:
    """Readers of the parts of one split tensor that read the whole only once per round.

    Each part is kept until it has been taken, then dropped; taking one twice reads anew.
    """
    lock = threading.Lock()
    kept: dict[int, Tensor] = {}

    def take(index: int) -> Tensor:
        with lock:
            if index not in kept:
                kept.update(enumerate(read()))
            return kept.pop(index)

    return [lambda index=index: take(index) for index in range(parts)]  # type: ignore[misc]
