"""Frozen weights that wait in host memory while they are not used.

A storage is emptied and filled again in place, so whatever shares it (tied embeddings, views) goes
on sharing it and no tensor changes its identity. Torch only.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class HostWeights:
    """Moves the storages of some tensors between their device and host memory.

    The weights are frozen: they are copied to the host once, in pinned memory where they come from
    a GPU, and from then on only back. The copies are asynchronous and ordered by the current CUDA
    stream; the host never waits for them.
    """

    def __init__(self, tensors: Iterable[Tensor], keep: Iterable[Tensor] = ()) -> None:
        """Look at the tensors; nothing moves yet.

        Args:
            tensors: those to move, on any device; several may share a storage.
            keep: tensors whose storages stay where they are.
        """
        kept = {_address(tensor) for tensor in keep}
        found = {_address(t): t for t in tensors if _address(t) not in kept}
        self._tensors = [tensor for tensor in found.values() if tensor.untyped_storage().nbytes()]
        self._sizes = [tensor.untyped_storage().nbytes() for tensor in self._tensors]
        self._host: list[Tensor] = []
        self.resident = True

    @property
    def nbytes(self) -> int:
        """Bytes that are freed on the device of this rank by ``release``."""
        return sum(self._sizes)

    @torch.no_grad()
    def release(self) -> None:
        """Free the device memory; the tensors must not be read until ``fetch``."""
        if not self.resident:
            return
        if not self._host:
            self._host = [_host_copy(tensor) for tensor in self._tensors]
        for tensor in self._tensors:
            tensor.untyped_storage().resize_(0)
        self.resident = False

    @torch.no_grad()
    def fetch(self) -> None:
        """Allocate the device memory again and fill it."""
        if self.resident:
            return
        for tensor, size, host in zip(self._tensors, self._sizes, self._host, strict=True):
            tensor.untyped_storage().resize_(size)
            _bytes(tensor).copy_(host, non_blocking=True)
        self.resident = True

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Keep the weights on the device inside, and on the host after."""
        self.fetch()
        try:
            yield
        finally:
            self.release()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(tensor: Tensor) -> Tensor:
    """Return the whole storage of a tensor as uint8."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _host_copy(tensor: Tensor) -> Tensor:
    source = _bytes(tensor)
    host = torch.empty_like(source, device="cpu", pin_memory=source.is_cuda)
    # Not asynchronous: it happens once, and the storage is emptied right after.
    return host.copy_(source)
