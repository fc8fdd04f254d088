"""Files that lie in a folder or inside an uncompressed tar archive, as ranges of bytes.

A ``.nemo`` archive is a tar of plain files, so whatever reads a range of a file reads it as well
without unpacking anything.
"""

import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from typing_extensions import Buffer

from nemo_minitron.checkpoint.hf_refusals import refuse_pointer
from nemo_minitron.checkpoint.inside import inside
from nemo_minitron.checkpoint.page_cache import let_go, read_ahead

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Part:
    """A range of bytes of a file.

    Attributes:
        path: the file.
        offset: of the first byte.
        size: number of bytes.
    """

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Return all bytes.

        Raises:
            OSError: the file cannot be read.
        """
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


Find = Callable[[str], Part | None]
"""Finds a file by its name relative to some folder; None if it does not exist."""


def piece_of(path: Path, file: Part | None, offset: int, length: int) -> Part:
    """Return the run of bytes of a file that something in a checkpoint names.

    Args:
        path: what to call the file in messages.
        file: the file, None where it was not found.
        offset: where the run starts.
        length: bytes of the run.

    Raises:
        ValueError: the file is not there, or ends before the run does.
    """
    if file is None or file.size < offset + length:
        raise ValueError(f"{path} is missing or truncated")
    return Part(file.path, file.offset + offset, length)


def in_folder(folder: Path) -> Find:
    """Look files up in a folder.

    What leads out of the folder, and what Git LFS keeps elsewhere, is a ``ValueError``.
    """

    def find(name: str) -> Part | None:
        path = inside(folder, name)
        refuse_pointer(path)
        return Part(path, 0, path.stat().st_size) if path.is_file() else None

    return find


def below(parts: dict[str, Part], folder: str) -> Find:
    """Look files of an archive up, relative to one of its folders."""
    return lambda name: parts.get(f"{folder}/{name}")


def archive_parts(path: Path) -> dict[str, Part]:
    """Return files of a tar archive by name, without a leading ``./``; only headers are read.

    Raises:
        ValueError: not a tar archive, compressed, or truncated.
    """
    refuse_pointer(path)
    try:
        with tarfile.open(path, "r:") as tar:
            members = [member for member in tar.getmembers() if member.isreg()]
    except (tarfile.TarError, MemoryError, OverflowError, ValueError) as error:
        # A header may declare more bytes than there are in the world.
        raise ValueError(f"{path} {_why_unreadable(path)}") from error
    size = path.stat().st_size
    for member in members:
        if member.issparse():
            raise ValueError(
                f"{path} holds {member.name} without its zeros (tar --sparse); unpack it "
                "(mkdir model && tar -xf FILE -C model) and set source to that folder"
            )
        if member.offset_data + member.size > size:
            raise ValueError(f"{path} is truncated at {member.name}: {size} bytes")
    return {
        str(PurePosixPath(member.name)): Part(path, member.offset_data, member.size)
        for member in members
    }


def _why_unreadable(path: Path) -> str:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    if packed:
        return (
            "is compressed; unpack it (mkdir model && tar -xzf FILE -C model) and set source to "
            "that folder"
        )
    return "is not a tar archive, or is damaged"


class FileView(io.RawIOBase):
    """A part of an open file, read as if it were a file of its own."""

    def __init__(self, file: io.BufferedReader, offset: int, length: int) -> None:
        super().__init__()
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        """Return true, as of any file that can be read."""
        return True

    def seekable(self) -> bool:
        """Return true, as of any file that can be read."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to an offset, which counts from the start of the part."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        """Return the position at which the next read starts."""
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Read at most the bytes that are left."""
        left = max(0, self._length - self._at)
        return super().read(left if size < 0 else min(size, left)) or b""

    def readinto(self, buffer: Buffer) -> int:
        """Read no further than the end of the part."""
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        self._file.seek(self._offset + self._at)
        count = self._file.readinto(view)
        self._at += count
        return count


def read_into(path: Path, offset: int, target: "Tensor") -> None:
    """Fill a flat tensor with the bytes of a file from ``offset`` on.

    As many bytes again are asked for in advance: whoever reads a tensor in runs of rows works on
    one run while the next comes from the disk. What has been read does not stay in the page cache.

    Raises:
        ValueError: the file ends before that.
    """
    import torch  # files of a folder are also looked up where nothing has imported torch

    buffer = memoryview(target.view(torch.uint8).numpy())  # type: ignore[arg-type]  # arrays are buffers since Python 3.12 only, to mypy
    end, size = offset + len(buffer), len(buffer)
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while buffer:
            count = file.readinto(buffer)
            if not count:
                raise ValueError(f"{path} is truncated")
            buffer = buffer[count:]
        read_ahead(file.fileno(), end, size)
        let_go(file.fileno(), offset, size)
