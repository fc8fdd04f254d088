"""Megatron's ``torch_dist`` checkpoint format, without Megatron and without a process group.

Files are written and read by torch.distributed.checkpoint's file-system classes, fed with a plan
that names Megatron's keys. The layout is the one ``megatron.core.dist_checkpointing`` calls
homogeneous: one key for all layers, ``decoder.layers.mlp.linear_fc1.weight`` of shape
``[num_layers, ...]`` with a chunk per layer; experts ``[num_layers, num_moe_experts, ...]`` with
a chunk per expert; other parameters under their own name. Norms that
Transformer Engine fuses are stored under the TE name, as Megatron's local spec stores them too. The
vocabulary is stored unpadded. Shapes are global.

No ``_extra_state`` objects are stored (fp8 scales under TE, nothing under the local spec):
Megatron's ``dist_checkpointing.load`` wants them left out of the sharded state dict, as
``models/weights.py`` does, or ``strict="log_unexpected"``.
"""

import json
import logging
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import (
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from nemo_minitron.checkpoint.lazy import LazyTensor, Store, row_blocks
from nemo_minitron.checkpoint.torch_dist_rows import READ_ERRORS, RowReader, read_region
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.table import Family, Row

logger = logging.getLogger(__name__)

FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# What Megatron-Core should pass as ``metadata`` to ``sharded_state_dict`` to get these keys.
CONTENT_METADATA = {"singleton_local_shards": False, "non_homogeneous_layers": False}
FORMAT_JSON = "metadata.json"
COMMON_PT = "common.pt"
_MAX_FILE_BYTES = 2 << 30
# Larger tensors are written in blocks of rows where their source can give rows.
_BLOCK_BYTES = 128 << 20


def disk_key(row: Row) -> str:
    """Key of a row on disk: TE name where there is one, layer and expert number left out."""
    return _stacked_name(row.te_name or row.name).replace("{layer}.", "")


def _stacked_name(name: str) -> str:
    """Megatron stores all experts of a layer under one key, as ``experts.experts``."""
    return re.sub(r"\blocal_experts\.\d+\.", "experts.", name)


def _stack(row: Row, layer: int | None, config: ModelConfig) -> list[tuple[int, int]]:
    """(index, size) of each axis that Megatron puts before a parameter's own: layer, expert."""
    axes = [] if layer is None else [(layer, config.num_layers)]
    if row.expert is not None:
        axes.append((row.expert, config.num_moe_experts or 0))
    return axes


class _Writer(FileSystemWriter):
    """Leaves folder name and random id out of ``.metadata``: equal weights give equal files."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


class _LazySavePlanner(DefaultSavePlanner):
    """Reads a tensor when the writer reaches it."""

    def __init__(self, reads: dict[MetadataIndex, Callable[[], Tensor]]) -> None:
        super().__init__()
        self.reads = reads

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        data = write_item.tensor_data
        assert data is not None
        return self.reads[write_item.index]().reshape(data.chunk.sizes)


def _write_item(
    key: str, shape: tuple[int, ...], axes: list[tuple[int, int]], rows: slice, dtype: torch.dtype
) -> WriteItem:
    size = (*(count for _, count in axes), *shape)
    sizes = (*(1 for _ in axes), rows.stop - rows.start, *shape[1:])
    offsets = torch.Size([*(index for index, _ in axes), rows.start, *(0 for _ in shape[1:])])
    return WriteItem(
        index=MetadataIndex(key, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=torch.Size(sizes)),
            properties=TensorProperties(dtype=dtype),
            size=torch.Size(size),
        ),
    )


def _check_store(store: Store, family: Family, config: ModelConfig) -> None:
    expected = {name: row.shape(config) for name, row, _ in family.parameters(config)}
    missing, extra = sorted(set(expected) - set(store)), sorted(set(store) - set(expected))
    if missing or extra:
        raise ValueError(f"weights do not fit model.yaml: missing {missing}, unexpected {extra}")
    for name, shape in expected.items():
        if store[name].shape != shape:
            raise ValueError(f"{name} has shape {store[name].shape}; model.yaml asks for {shape}")


@dataclass(frozen=True)
class _Piece:
    """What is written as one: a tensor or a block of its rows."""

    item: WriteItem
    read: Callable[[], Tensor]
    nbytes: int
    dtype: torch.dtype


def _pieces(
    key: str, row: Row, layer: int | None, config: ModelConfig, lazy: LazyTensor
) -> list[_Piece]:
    """One piece, or several where the tensor is large and its rows can be read alone."""
    axes = _stack(row, layer, config)
    if lazy.read_rows is None or lazy.nbytes <= _BLOCK_BYTES:
        item = _write_item(key, lazy.shape, axes, slice(0, lazy.shape[0]), lazy.dtype)
        return [_Piece(item, lazy.read, lazy.nbytes, lazy.dtype)]
    return [
        _Piece(
            _write_item(key, lazy.shape, axes, slice(start, stop), lazy.dtype),
            partial(lazy.read_rows, start, stop),
            lazy.nbytes // lazy.shape[0] * (stop - start),
            lazy.dtype,
        )
        for start, stop in row_blocks(lazy, _BLOCK_BYTES)
    ]


def _write_pieces(store: Store, family: Family, config: ModelConfig) -> dict[str, list[_Piece]]:
    """What to write under each key, layers in order."""
    pieces: dict[str, list[_Piece]] = {}
    for name, row, layer in family.parameters(config):
        key, lazy = disk_key(row), store[name]
        group = pieces.setdefault(key, [])
        if group and group[0].dtype != lazy.dtype:
            raise ValueError(
                f"{name} is {lazy.dtype} but its first layer is {group[0].dtype}; convert the "
                "source to one dtype"
            )
        group.extend(_pieces(key, row, layer, config, lazy))
    return pieces


def _files(pieces: dict[str, list[_Piece]]) -> list[SavePlan]:
    """One plan per file, largest first.

    One key per file, as the writer keeps alive the newest tensor of every key of an open file.
    """
    files: list[tuple[int, list[WriteItem]]] = []
    for group in pieces.values():
        size, batch = 0, list[WriteItem]()
        for piece in group:
            if batch and size + piece.nbytes > _MAX_FILE_BYTES:
                files.append((size, batch))
                size, batch = 0, []
            batch.append(piece.item)
            size += piece.nbytes
        files.append((size, batch))
    files.sort(key=lambda file: -file[0])
    return [SavePlan(batch) for _, batch in files]


def _write_file(writer: FileSystemWriter, planner: DefaultSavePlanner, plan: SavePlan) -> list:
    try:
        return writer.write_data(plan, planner).wait()
    except RuntimeError as error:
        # torch.save replaces the cause (disk full) by its own "unexpected pos" on the way out.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, (OSError, ValueError)):
            cause = cause.__context__
        raise (cause or error) from error


def write_torch_dist(
    folder: Path, store: Store, family: Family, config: ModelConfig, *, workers: int
) -> None:
    """Write the weights of a model as a Megatron ``torch_dist`` checkpoint.

    Tensors are read one by one as the files are written; at most two per worker are alive, of large
    ones only a block of rows where ``LazyTensor.read_rows`` allows it.

    Args:
        folder: existing folder; gets ``*.distcp``, ``.metadata``, ``metadata.json``, ``common.pt``.
        store: Megatron names (local spec, with layer numbers), global shapes.
        family: the table that says which parameters there are.
        config: sizes of the model.
        workers: files written at a time.

    Raises:
        ValueError: the store does not fit the config.
        OSError: the folder cannot be written (disk full).
    """
    _check_store(store, family, config)
    pieces = _write_pieces(store, family, config)
    planner = _LazySavePlanner(
        {piece.item.index: piece.read for group in pieces.values() for piece in group}
    )
    writer = _Writer(folder)
    plans, metadata = create_default_global_save_plan(_files(pieces))
    plans = writer.prepare_global_plan(plans)
    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(partial(_write_file, writer, planner), plans))
    torch.save({"content_metadata": CONTENT_METADATA}, folder / COMMON_PT)
    (folder / FORMAT_JSON).write_text(json.dumps(FORMAT))
    writer.finish(metadata, results)


def _open_metadata(folder: Path) -> tuple[FileSystemReader, Metadata]:
    """Metadata of a checkpoint, after checking that every file it names is there in full length."""
    path = folder / FORMAT_JSON
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} is not a Megatron checkpoint: {FORMAT_JSON} is missing"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if found.get("sharded_backend") != "torch_dist":
        raise ValueError(f"{path}: sharded_backend={found.get('sharded_backend')}, not torch_dist")
    reader = FileSystemReader(folder)
    try:
        metadata = reader.read_metadata()
        ends: dict[str, int] = {}
        for info in metadata.storage_data.values():
            end = info.offset + info.length
            ends[info.relative_path] = max(end, ends.get(info.relative_path, 0))
    except (*READ_ERRORS, AttributeError, ImportError, IndexError, TypeError) as error:
        raise ValueError(f"{folder / '.metadata'} is missing or damaged: {error}") from error
    for name, end in sorted(ends.items()):
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file} is missing: the checkpoint is incomplete")
        if file.stat().st_size < end:
            raise ValueError(f"{file} is truncated: {file.stat().st_size} of {end} bytes")
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    return reader, metadata


def _locate(
    row: Row, layer: int | None, metadata: Metadata
) -> tuple[str, TensorStorageMetadata, bool] | None:
    """Key, metadata and whether the key holds all layers; None when the checkpoint lacks it."""
    for name in map(_stacked_name, filter(None, (row.te_name, row.name))):
        for key, stacked in ((name.replace("{layer}.", ""), True), (name, False)):
            if not stacked and layer is not None:
                key = key.format(layer=layer)
            saved = metadata.state_dict_metadata.get(key)
            if isinstance(saved, TensorStorageMetadata):
                return key, saved, stacked and layer is not None
    return None


def _wanted(
    row: Row, layer: int | None, stacked: bool, config: ModelConfig, saved: TensorStorageMetadata
) -> ChunkStorageMetadata | None:
    """Region that holds one parameter; None when the saved shape does not fit the config."""
    sizes = row.shape(config)
    axes = _stack(row, layer if stacked else None, config)
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


def _refuse_unknown(used: set[str], metadata: Metadata, folder: Path) -> None:
    """Optimizer state and other bookkeeping may lie beside the weights; unknown weights may not."""
    for key, saved in metadata.state_dict_metadata.items():
        weight = key.startswith(("embedding.", "decoder.", "output_layer.")) and key not in used
        if weight and isinstance(saved, TensorStorageMetadata):
            raise ValueError(f"{folder} holds {key}, which this model does not have")


def read_torch_dist(folder: Path, family: Family, config: ModelConfig) -> Store:
    """Open the weights of a Megatron ``torch_dist`` checkpoint; nothing is read but the metadata.

    Reads what ``write_torch_dist`` and what Megatron itself wrote, at any layout: chunks may be cut
    anyhow, layers stacked or not, the vocabulary padded.

    Args:
        folder: the checkpoint.
        family: the table that says which parameters there are.
        config: sizes of the model.

    Returns:
        Store of Megatron names (local spec, with layer numbers), global shapes.

    Raises:
        ValueError: files missing or truncated, parameters missing, unknown or of another shape. A
            damaged file is found when its tensor is read.
    """
    reader, metadata = _open_metadata(folder)
    store: Store = {}
    used: set[str] = set()
    starts: dict[tuple[Path, int], int | None] = {}
    for name, row, layer in family.parameters(config):
        found = _locate(row, layer, metadata)
        if found is None:
            raise ValueError(f"{folder} lacks {name}, which a model of this configuration has")
        key, saved, stacked = found
        wanted = _wanted(row, layer, stacked, config, saved)
        if wanted is None:
            raise ValueError(
                f"{folder} holds {key} of shape {tuple(saved.size)}; model.yaml asks for "
                f"{row.shape(config)}{f' in {config.num_layers} layers' if stacked else ''}"
            )
        used.add(key)
        shape = row.shape(config)
        read = partial(read_region, reader, key, saved, wanted, shape)
        rows = RowReader(reader, key, saved, wanted, shape, read, starts)
        store[name] = LazyTensor(shape, saved.properties.dtype, read, rows)
    _refuse_unknown(used, metadata, folder)
    return store
