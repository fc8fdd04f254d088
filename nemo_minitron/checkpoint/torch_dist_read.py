"""Opens ``torch_dist`` checkpoints that anybody wrote, and finds the weights of a model in them.

Keys may have a prefix, layers may be stacked or not, the vocabulary padded, and optimizer state may
lie beside the weights. Nothing is read but the metadata; weights are read when asked for.
"""

import math
import os
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)

from nemo_minitron.checkpoint.inside import is_inside
from nemo_minitron.checkpoint.lazy import LazyTensor, Store, from_runs
from nemo_minitron.checkpoint.parts import Find, Part, in_folder
from nemo_minitron.checkpoint.safe_pickle import PICKLE_ERRORS, read_metadata
from nemo_minitron.checkpoint.torch_dist_rows import RowReader, read_region
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.documents import json_value
from nemo_minitron.families.dims import DIMS
from nemo_minitron.families.table import Family, Row

FORMAT_JSON = "metadata.json"
_WEIGHTS = ("embedding.", "decoder.", "output_layer.", "mtp.")
METADATA = ".metadata"


_WAYS_OUT = (
    "Megatron-Core no longer reads any other. Load it with the program that wrote it, in its own "
    "container, and save it as torch_dist: Megatron-LM with --ckpt-format torch_dist; of NeMo 1, "
    "NeMo 2.0's nlp collection does so when it saves, or with TP=1 and PP=1 one model_weights.ckpt"
)


def stacked_name(name: str) -> str:
    """Megatron stores all experts of a layer under one key, as ``experts.experts``."""
    return re.sub(r"\blocal_experts\.\d+\.", "experts.", name)


def stack_axes(row: Row, layer: int | None, config: ModelConfig) -> list[tuple[int, int]]:
    """(index, size) of each axis that Megatron puts before a parameter's own: layer, expert.

    Where layers differ, each has keys of its own and only experts are stacked.
    """
    stacked = layer is not None and config.stacked_layers
    axes = [(layer, config.num_layers)] if stacked and layer is not None else []
    if row.expert is not None:
        axes.append((row.expert, config.num_moe_experts or 0))
    return axes


@dataclass(frozen=True)
class Checkpoint:
    """An opened ``torch_dist`` checkpoint, of which nothing is read but the metadata.

    Attributes:
        where: folder, for messages; inside a ``.nemo`` archive its path continues there.
        reader: reads what the metadata names.
        metadata: keys, shapes, and where every piece lies.
    """

    where: Path
    reader: FileSystemReader
    metadata: Metadata

    def tensor(self, key: str) -> TensorStorageMetadata | None:
        """Return the tensor that is stored under a key; None if it is not a tensor."""
        saved = self.metadata.state_dict_metadata.get(key)
        return saved if isinstance(saved, TensorStorageMetadata) else None


def check_format(where: Path, find: Find) -> None:
    """Refuse a folder that Megatron-Core did not write, or in a format that it no longer reads.

    Args:
        where: the checkpoint's folder, for messages.
        find: looks its files up.

    Raises:
        ValueError: names the file and the way out.
    """
    path, part = where / FORMAT_JSON, find(FORMAT_JSON)
    if part is None:
        raise ValueError(f"{where} is not a Megatron checkpoint: {FORMAT_JSON} is missing")
    try:
        found = json_value(part.read())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    backend = found.get("sharded_backend") if isinstance(found, dict) else None
    if backend != "torch_dist":
        raise ValueError(f"{path}: sharded_backend={backend}, not torch_dist; {_WAYS_OUT}")


def checked_metadata(where: Path, find: Find, *, strict: bool = False) -> Metadata:
    """Return the metadata of a checkpoint, in which every size and place is a number that can be.

    Args:
        where: the checkpoint's folder, for messages.
        find: looks its files up.
        strict: refuse names of functions and classes that no checkpoint needs.

    Raises:
        ValueError: it is missing or damaged, or says what cannot be.
    """
    try:
        part = find(METADATA)
        if part is None:
            raise FileNotFoundError(METADATA)
        metadata = read_metadata(part, strict=strict)
        sizes = {
            (key, chunk.offsets): _chunk_bytes(key, saved, chunk)
            for key, saved in metadata.state_dict_metadata.items()
            if isinstance(saved, TensorStorageMetadata)
            for chunk in saved.chunks
        }
        for index, info in metadata.storage_data.items():
            _check_place(info, sizes.get((index.fqn, index.offset), 0))
    except PICKLE_ERRORS as error:
        raise ValueError(f"{where / METADATA} is missing or damaged: {error}") from error
    return metadata


def _chunk_bytes(key: str, saved: TensorStorageMetadata, chunk: ChunkStorageMetadata) -> int:
    places = list(zip(chunk.offsets, chunk.sizes, saved.size, strict=True))
    if not all(start >= 0 and size >= 0 and start + size <= whole for start, size, whole in places):
        raise ValueError(f"{key} has a piece {chunk.offsets} of {chunk.sizes} in {saved.size}")
    return math.prod(chunk.sizes) * saved.properties.dtype.itemsize


def _check_place(info: _StorageInfo, needed: int) -> None:
    name, offset, length = info.relative_path, info.offset, info.length
    if not (isinstance(name, str) and is_inside(name)):
        raise ValueError(f"it names the file {name!r}, which does not lie in the folder")
    if not (isinstance(offset, int) and isinstance(length, int) and offset >= 0 and length >= 0):
        raise ValueError(f"a piece of {name} has {length} bytes from {offset} on")
    if needed > length and not getattr(info, "transform_descriptors", None):
        raise ValueError(f"a tensor of {needed} bytes cannot lie in {length} bytes of {name}")


def _ends(metadata: Metadata) -> dict[str, int]:
    """Return the length that every file it names must have at least."""
    ends: dict[str, int] = {}
    for info in metadata.storage_data.values():
        end = info.offset + info.length
        ends[info.relative_path] = max(end, ends.get(info.relative_path, 0))
    return ends


def open_torch_dist(where: Path, find: Find | None = None) -> Checkpoint:
    """Open a checkpoint, after checking that every file it names is there in full length.

    Args:
        where: the checkpoint's folder.
        find: looks its files up, where they do not simply lie in that folder.

    Raises:
        ValueError: a file is missing, damaged or truncated, or of another format.
    """
    find = find or in_folder(where)
    check_format(where, find)
    metadata = checked_metadata(where, find)
    places: dict[str, Part] = {}
    for name, end in sorted(_ends(metadata).items()):
        file, part = where / name, find(name)
        if part is None:
            raise ValueError(f"{file} is missing: the checkpoint is incomplete")
        if part.size < end:
            raise ValueError(f"{file} is truncated: {part.size} of {end} bytes")
        places[name] = part
    root = next((part.path.parent for part in places.values()), where)
    names = {name: os.path.relpath(part.path, root) for name, part in places.items()}
    metadata.storage_data = {
        index: replace(
            info,
            relative_path=names[info.relative_path],
            offset=info.offset + places[info.relative_path].offset,
        )
        for index, info in metadata.storage_data.items()
    }
    reader = FileSystemReader(root)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    return Checkpoint(where, reader, metadata)


def _locate(
    row: Row, layer: int | None, checkpoint: Checkpoint, prefix: str, part: str
) -> tuple[str, TensorStorageMetadata, bool] | None:
    """Return key, metadata and whether the key holds all layers; None without the key."""
    for name in map(stacked_name, row.names_on_disk):
        for key, stacked in ((name.replace("{layer}.", ""), True), (name, False)):
            if not stacked and layer is not None:
                key = key.format(layer=layer)
            key = prefix + key + part
            saved = checkpoint.tensor(key)
            if saved is not None:
                return key, saved, stacked and layer is not None
    return None


def _wanted(
    row: Row,
    axes: list[tuple[int, int]],
    sizes: tuple[int, ...],
    saved: TensorStorageMetadata,
) -> ChunkStorageMetadata | None:
    """Return region that holds one parameter; None when the saved shape does not fit the config."""
    rows = list(saved.size)
    if rows[: len(axes)] != [count for _, count in axes]:
        return None
    rows = rows[len(axes) :]
    if len(rows) != len(sizes):
        return None
    for dim, have, want in zip(row.dims, rows, sizes, strict=True):
        # Megatron pads the vocabulary to a multiple of the tensor-parallel size; the pad is cut.
        if have != want and not (dim == "vocab" and have > want):
            return None
    return ChunkStorageMetadata(
        offsets=torch.Size([*(index for index, _ in axes), *(0 for _ in sizes)]),
        sizes=torch.Size([*(1 for _ in axes), *sizes]),
    )


def _refuse_unknown(used: set[str], checkpoint: Checkpoint, prefix: str) -> None:
    """Optimizer state and other bookkeeping may lie beside the weights; unknown weights may not."""
    weights = tuple(prefix + name for name in _WEIGHTS)
    for key in checkpoint.metadata.state_dict_metadata:
        if key.startswith(weights) and key not in used and checkpoint.tensor(key):
            raise ValueError(f"{checkpoint.where} holds {key}, which this model does not have")


@dataclass(frozen=True)
class _Place:
    """A tensor on disk: a parameter, or a part of one (``Row.parts_on_disk``)."""

    name: str
    row: Row
    layer: int | None
    shape: tuple[int, ...]
    part: str = ""


def _stored(
    place: _Place,
    checkpoint: Checkpoint,
    config: ModelConfig,
    prefix: str,
    used: set[str],
    starts: dict[tuple[Path, int], int | None],
) -> LazyTensor:
    """Return one tensor of a checkpoint, read when asked for; its key is added to ``used``."""
    row, layer, shape = place.row, place.layer, place.shape
    found = _locate(row, layer, checkpoint, prefix, place.part)
    if found is None:
        raise ValueError(
            f"{checkpoint.where} lacks {place.name}{place.part}, which a model of this "
            "configuration has"
        )
    key, saved, stacked = found
    wanted = _wanted(row, stack_axes(row, layer if stacked else None, config), shape, saved)
    if wanted is None:
        raise ValueError(
            f"{checkpoint.where} holds {key} of shape {tuple(saved.size)}; its config asks for "
            f"{shape}{f' in {config.num_layers} layers' if stacked else ''}"
        )
    used.add(key)
    read = partial(read_region, checkpoint.reader, key, saved, wanted, shape)
    rows = RowReader(checkpoint.reader, key, saved, wanted, shape, read, starts)
    return LazyTensor(shape, saved.properties.dtype, read, rows)


def stored_weights(
    checkpoint: Checkpoint, family: Family, config: ModelConfig, *, prefix: str = ""
) -> Store:
    """Return weights of an opened checkpoint; nothing is read yet.

    Args:
        checkpoint: from ``open_torch_dist``.
        family: the table that says which parameters there are.
        config: sizes of the model.
        prefix: what the names of its weights start with on disk.

    Returns:
        Store of Megatron names (local spec, with layer numbers), global shapes.

    Raises:
        ValueError: parameters missing, unknown or of another shape. A damaged file is found when
            its tensor is read.
    """
    store: Store = {}
    used: set[str] = set()
    starts: dict[tuple[Path, int], int | None] = {}
    for name, row, layer in family.parameters(config):
        shape = row.shape(config)
        if not row.parts_on_disk:
            place = _Place(name, row, layer, shape)
            store[name] = _stored(place, checkpoint, config, prefix, used, starts)
            continue
        dim = DIMS[row.dims[0]]
        places = [
            _Place(name, row, layer, (rows, *shape[1:]), f".{part}")
            for part, rows in zip(row.parts_on_disk, dim.part_sizes(config), strict=True)
        ]
        parts = [_stored(place, checkpoint, config, prefix, used, starts) for place in places]
        store[name] = from_runs(parts, list(dim.runs(config)))
    _refuse_unknown(used, checkpoint, prefix)
    return store
