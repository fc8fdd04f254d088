"""Big files read and written once, without leaving them in the page cache.

A checkpoint that is streamed is not looked at again soon. Kept in the cache, it pushes out what
others need, and every page of it is fresh memory: in virtual machines, which give unused memory
back to their host, that takes longer than the disk does. Pages that are let go of are used again
for the next ones (``docs/design/streaming-cost.md``).

Where the system has no ``posix_fadvise``, nothing is said and everything works.
"""

import io
import os

from typing_extensions import Buffer

BLOCK_BYTES = 16 << 20
"""Larger tensors are moved in blocks of rows where their source can give rows.

Few enough bytes for malloc to give the same pages again and again. Pages that come fresh from the
kernel are zeroed first, which takes longer than filling them from a fast disk.
"""
_ADVICE = hasattr(os, "posix_fadvise")
_BEHIND = 2 * BLOCK_BYTES
"""How far back written bytes are looked at again: by then they have reached the disk."""


def let_go(file: int, offset: int, size: int) -> None:
    """Drop a range of an open file from the page cache; what is not on the disk yet starts there.

    Args:
        file: file descriptor.
        offset: of the first byte.
        size: number of bytes.
    """
    if _ADVICE and size:  # none would mean: to the end of the file
        os.posix_fadvise(file, offset, size, os.POSIX_FADV_DONTNEED)


def read_ahead(file: int, offset: int, size: int) -> None:
    """Have a range of an open file read from the disk, without waiting for it."""
    if _ADVICE and size:
        os.posix_fadvise(file, offset, size, os.POSIX_FADV_WILLNEED)


class _WriteBehind(io.FileIO):
    """Asks that a block goes to disk as soon as it is written, and drops it from memory then."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, "wb")
        self._written = self._asked = 0

    def write(self, data: Buffer) -> int:
        """Write, as ``FileIO`` does; only forwards."""
        count = super().write(data)
        self._written += count
        if self._written - self._asked >= BLOCK_BYTES:
            start = max(0, self._asked - _BEHIND)
            let_go(self.fileno(), start, self._written - start)
            self._asked = self._written
        return count


def create(path: str | os.PathLike[str]) -> io.BufferedWriter:
    """Open a new big file that is written from its start to its end.

    Raises:
        OSError: it cannot be created.
    """
    return io.BufferedWriter(_WriteBehind(path))
