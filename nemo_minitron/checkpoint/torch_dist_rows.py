"""Reads regions of the tensors in a ``torch_dist`` checkpoint, or some of their rows.

Torch's own reader loads whatever was saved as one piece, which can be a whole embedding. Pieces
are ``torch.save`` archives, zip files with the values uncompressed inside, so rows can be read from
where they lie. Where that does not hold, the piece is loaded whole.
"""

import math
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from nemo_minitron.checkpoint.parts import FileView, read_into

READ_ERRORS = (RuntimeError, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError)
"""What torch raises on damaged files."""
_LOCAL_HEADER = 30  # bytes of a zip member's header before its name


class _IntoTensor(DefaultLoadPlanner):
    """Puts what is read into the regions of one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        view = self.target
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            view = view.narrow(dim, start, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


def read_region(
    reader: FileSystemReader,
    key: str,
    saved: TensorStorageMetadata,
    wanted: ChunkStorageMetadata,
    shape: tuple[int, ...],
) -> Tensor:
    """Read one region of a key, out of however many chunks it was saved in."""
    items = create_read_items_for_chunk_list(key, saved, [wanted])
    target = torch.empty(wanted.sizes, dtype=saved.properties.dtype)
    covered = sum(item.lengths.numel() for item in items)
    if covered != target.numel():
        raise ValueError(
            f"{reader.path}: {key} at {tuple(wanted.offsets)} has {covered} of {target.numel()} "
            "elements; the checkpoint is incomplete"
        )
    planner = _IntoTensor(target)
    for item in items:  # one by one, so that an error can name the file
        try:
            _check_piece(reader, item)
            reader.read_data(LoadPlan([item]), planner)
        except (*READ_ERRORS, AssertionError, AttributeError, zipfile.BadZipFile) as error:
            file = reader.storage_data[item.storage_index].relative_path
            raise ValueError(f"{Path(reader.path) / file} is damaged at {key}: {error}") from error
    return target.view(shape)


def _check_piece(reader: FileSystemReader, item: ReadItem) -> None:
    info = reader.storage_data[item.storage_index]
    with (Path(reader.path) / info.relative_path).open("rb") as file:
        view = FileView(file, info.offset, info.length)
        if not getattr(info, "transform_descriptors", None):
            with zipfile.ZipFile(view) as archive:
                refuse_packed(archive.infolist(), info.length)


@dataclass(frozen=True)
class RowReader:
    """Reads rows of one parameter.

    Attributes:
        reader: of the checkpoint.
        key: on disk.
        saved: what lies under the key.
        wanted: region of the key that holds the parameter.
        shape: global shape of the parameter; the key may have leading dims of size 1 besides.
        read_whole: reads the parameter the ordinary way.
        starts: where the values of each saved piece start, as far as known; of one checkpoint.
    """

    reader: FileSystemReader
    key: str
    saved: TensorStorageMetadata
    wanted: ChunkStorageMetadata
    shape: tuple[int, ...]
    read_whole: Callable[[], Tensor]
    starts: dict[tuple[Path, int], int | None]

    @property
    def _lead(self) -> int:
        return len(self.wanted.sizes) - len(self.shape)

    def __call__(self, start: int, stop: int) -> Tensor:
        """Return rows ``[start, stop)`` of dim 0: CPU, contiguous, owned by the caller.

        Raises:
            ValueError: a file is damaged.
        """
        items = self._items(start, stop)
        found = [self._piece(item) for item in items]
        pieces = [piece for piece in found if piece is not None]
        shape = (stop - start, *self.shape[1:])
        if sum(piece.numel() for piece in pieces) != math.prod(shape):
            return self.read_whole()[start:stop].contiguous()
        if len(pieces) == 1 and pieces[0].shape == shape:
            return pieces[0].contiguous()
        target = torch.empty(shape, dtype=self.saved.properties.dtype)
        for item, piece in zip(items, pieces, strict=True):
            view = target
            for dim, first in enumerate(item.dest_offsets[self._lead :]):
                view = view.narrow(dim, first, item.lengths[self._lead + dim])
            view.copy_(piece)
        return target

    @cached_property
    def _here(self) -> TensorStorageMetadata:
        """Return the metadata without chunks of other layers; torch scans all chunks for each read.

        Torch compares places of chunks, never their numbers.
        """
        chunks = [chunk for chunk in self.saved.chunks if _overlap(chunk, self.wanted)]
        return replace(self.saved, chunks=chunks)

    def _items(self, start: int, stop: int) -> list[ReadItem]:
        offsets, sizes = list(self.wanted.offsets), list(self.wanted.sizes)
        offsets[self._lead] += start
        sizes[self._lead] = stop - start
        region = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        return create_read_items_for_chunk_list(self.key, self._here, [region])

    def _piece(self, item: ReadItem) -> Tensor | None:
        """One item read from where its rows lie; None when the saved piece does not allow it."""
        sizes = self._chunk_sizes(item)
        lead, dtype = self._lead, self.saved.properties.dtype
        info = self.reader.storage_data[item.storage_index]
        path = Path(self.reader.path) / info.relative_path
        if math.prod(sizes[:lead]) != 1 or getattr(info, "transform_descriptors", None):
            return None
        place = (path, info.offset)
        try:
            if place not in self.starts:
                self.starts[place] = _values_start(*place, info.length, sizes, dtype)
        except (*READ_ERRORS, struct.error, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is damaged at {self.key}: {error}") from error
        start = self.starts[place]
        if start is None:
            return None
        row = math.prod(sizes[lead + 1 :])
        first, count = item.storage_offsets[lead], item.lengths[lead]
        flat = torch.empty(count * row, dtype=dtype)
        read_into(path, start + first * row * dtype.itemsize, flat)
        out = flat.view(count, *sizes[lead + 1 :])
        for dim in range(1, out.dim()):
            out = out.narrow(dim, item.storage_offsets[lead + dim], item.lengths[lead + dim])
        return out

    def _chunk_sizes(self, item: ReadItem) -> torch.Size:
        offset = item.storage_index.offset
        return next(chunk.sizes for chunk in self._here.chunks if chunk.offsets == offset)


def _overlap(one: ChunkStorageMetadata, other: ChunkStorageMetadata) -> bool:
    """Whether two regions of a key share an element."""
    return all(
        start < begin + length and begin < start + size
        for start, size, begin, length in zip(
            one.offsets, one.sizes, other.offsets, other.sizes, strict=True
        )
    )


def _values_start(
    path: Path, offset: int, length: int, sizes: torch.Size, dtype: torch.dtype
) -> int | None:
    """Return the offset of one saved piece in a file; None if its values are not stored plainly."""
    with path.open("rb") as file:
        view = FileView(file, offset, length)
        with zipfile.ZipFile(view) as archive:
            members = archive.infolist()
            refuse_packed(members, length)
            if not in_native_order(archive):  # nor can torch look at it without its bytes
                return None
        view.seek(0)
        piece = torch.load(cast("IO[bytes]", view), map_location="meta", weights_only=True)
        plain = piece.is_contiguous() and piece.storage_offset() == 0
        if not plain or piece.shape != sizes or piece.dtype != dtype:
            return None
        (member,) = [m for m in members if "/data/" in m.filename]
        if member.file_size != piece.nbytes:
            return None
        return offset + member_start(view, member)


def refuse_packed(members: Iterable[zipfile.ZipInfo], size: int) -> None:
    """Refuse a zip file of ``size`` bytes with compressed members: torch.save never compresses.

    Raises:
        ValueError: names the member.
    """
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or not 0 <= member.file_size <= size:
            raise ValueError(f"its member {member.filename} is compressed, or larger than the file")


def in_native_order(archive: zipfile.ZipFile) -> bool:
    """Whether the numbers in an open file of torch.save are in the byte order of this machine."""
    said = [name for name in archive.namelist() if name.partition("/")[2] == "byteorder"]
    # Versions of torch before 2.1 do not say it.
    return all(archive.read(name) == sys.byteorder.encode() for name in said)


def member_start(view: FileView, member: zipfile.ZipInfo) -> int:
    """Return the offset of the bytes of an uncompressed member in an open zip file."""
    view.seek(member.header_offset + _LOCAL_HEADER - 4)
    name, extra = struct.unpack("<HH", view.read(4))
    return member.header_offset + _LOCAL_HEADER + name + extra
