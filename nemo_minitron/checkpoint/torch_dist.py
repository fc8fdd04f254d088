"""Megatron's ``torch_dist`` checkpoint format, without Megatron and without a process group.

Files are written and read by torch.distributed.checkpoint's file-system classes, fed with a plan
that names Megatron's keys. The layout is the one ``megatron.core.dist_checkpointing`` calls
homogeneous: one key for all layers, ``decoder.layers.mlp.linear_fc1.weight`` of shape
``[num_layers, ...]`` with a chunk per layer; experts ``[num_layers, num_moe_experts, ...]`` with
a chunk per expert; other parameters under their own name. Where layers differ, keys have the
number of the layer, and no axis for layers. Norms that
Transformer Engine fuses are stored under the TE name, as Megatron's local spec stores them too. The
vocabulary is stored unpadded. Shapes are global.

Objects (``objects.py``) lie in a file of their own: empty ``_extra_state`` ones, and what is common
to all ranks, ``common_state``, as Megatron-Core writes it since 0.19; ``common.pt`` says the same
to older ones.
"""

import io
import json
import logging
import os
import pickle
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import (
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from nemo_minitron.checkpoint.common_state import COMMON_KEY, COMMON_PT
from nemo_minitron.checkpoint.lazy import LazyTensor, Store, from_runs, row_blocks
from nemo_minitron.checkpoint.megatron_args import common_state, extra_states, name_on_disk, stored
from nemo_minitron.checkpoint.page_cache import create
from nemo_minitron.checkpoint.parts import in_folder
from nemo_minitron.checkpoint.safe_pickle import read_metadata
from nemo_minitron.checkpoint.torch_dist_read import (
    FORMAT_JSON,
    METADATA,
    open_torch_dist,
    stack_axes,
    stacked_name,
    stored_weights,
)
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.documents import JsonObject
from nemo_minitron.families.dims import DIMS
from nemo_minitron.families.fuse import rows_of_part
from nemo_minitron.families.table import Family, Row
from nemo_minitron.runtime.atomic import atomic_file

logger = logging.getLogger(__name__)

FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# What Megatron-Core should pass as ``metadata`` to ``sharded_state_dict`` to get these keys.
CONTENT_METADATA = {"singleton_local_shards": False, "non_homogeneous_layers": False}
_MAX_FILE_BYTES = 2 << 30


def disk_key(row: Row, layer: int | None = None) -> str:
    """Return the key of a row on disk: TE name where there is one, expert number left out.

    Args:
        row: of the table.
        layer: number of the layer where each has keys of its own, None where one key holds all.
    """
    number = "" if layer is None else f"{layer}."
    return stacked_name(row.te_name or row.name).replace("{layer}.", number)


class _PastThePageCache(FileSystem):
    """Weights do not stay in the page cache."""

    @contextmanager
    def create_stream(
        self, path: str | os.PathLike[str], mode: str
    ) -> Generator[io.IOBase, None, None]:
        with create(path) if mode == "wb" else super().create_stream(path, mode) as stream:
            yield stream


class _Writer(FileSystemWriter):
    """Leaves folder name and random id out of ``.metadata``: equal weights give equal files."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fs = _PastThePageCache()

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


class _LazySavePlanner(DefaultSavePlanner):
    """Reads a tensor when the writer reaches it."""

    def __init__(
        self,
        reads: Mapping[MetadataIndex, Callable[[], Tensor]],
        objects: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__()
        self.reads = reads
        self.objects = objects or {}

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return stored(self.objects[write_item.index.fqn])
        return self.reads[write_item.index]().reshape(_tensor_data(write_item).chunk.sizes)


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


_Piece = tuple[WriteItem, Callable[[], Tensor]]
"""What is written as one, a tensor or a block of its rows, and how it is read."""


def _tensor_data(item: WriteItem) -> TensorWriteData:
    assert item.tensor_data is not None
    return item.tensor_data


def _tensors(
    store: Store, family: Family, config: ModelConfig
) -> Iterator[tuple[str, str, LazyTensor, list[tuple[int, int]]]]:
    """Name, key on disk, values and leading axes of every tensor, layers in order."""
    for name, row, layer in family.parameters(config):
        axes, whole = stack_axes(row, layer, config), store[name]
        key = disk_key(row, None if config.stacked_layers else layer)
        if not row.parts_on_disk:
            yield name, key, whole, axes
        for number, part in enumerate(row.parts_on_disk):
            rows = rows_of_part(DIMS[row.dims[0]], config, number)
            yield name, f"{key}.{part}", from_runs([whole], rows), axes


def _write_pieces(store: Store, family: Family, config: ModelConfig) -> dict[str, list[_Piece]]:
    """List what to write under each key, layers in order; large tensors come in several pieces."""
    pieces: dict[str, list[_Piece]] = {}
    for name, key, lazy, axes in _tensors(store, family, config):
        group = pieces.setdefault(key, [])
        dtype = _tensor_data(group[0][0]).properties.dtype if group else lazy.dtype
        if dtype != lazy.dtype:
            raise ValueError(
                f"{name} is {lazy.dtype} but its first layer is {dtype}; convert the source to one "
                "dtype"
            )
        for start, stop, read in row_blocks(lazy):
            rows = slice(start, stop)
            group.append((_write_item(key, lazy.shape, axes, rows, dtype), read))
    return pieces


def _files(pieces: dict[str, list[_Piece]]) -> list[SavePlan]:
    """Return one plan per file, largest first.

    One key per file, as the writer keeps alive the newest tensor of every key of an open file.
    """
    files: list[tuple[int, list[WriteItem]]] = []
    for group in pieces.values():
        size, batch = 0, list[WriteItem]()
        for item, _ in group:
            data = _tensor_data(item)
            nbytes = data.chunk.sizes.numel() * data.properties.dtype.itemsize
            if batch and size + nbytes > _MAX_FILE_BYTES:
                files.append((size, batch))
                size, batch = 0, []
            batch.append(item)
            size += nbytes
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
    common = {**common_state(config), "content_metadata": CONTENT_METADATA}
    objects: JsonObject = {name_on_disk(*place): None for place in extra_states(family, config)}
    objects[COMMON_KEY] = common
    planner = _LazySavePlanner(
        {item.index: read for group in pieces.values() for item, read in group}, objects
    )
    writer = _Writer(folder)
    object_file = SavePlan(
        [WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO) for name in objects]
    )
    plans, metadata = create_default_global_save_plan([*_files(pieces), object_file])
    plans = writer.prepare_global_plan(plans)
    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(partial(_write_file, writer, planner), plans))
    torch.save(common, folder / COMMON_PT)
    (folder / FORMAT_JSON).write_text(json.dumps(FORMAT))
    writer.finish(metadata, results)


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
    return stored_weights(open_torch_dist(folder), family, config)


def settle_metadata(folder: Path) -> None:
    """Make the ``.metadata`` of a complete checkpoint a function of what the checkpoint holds.

    torch writes a random id and the path of the folder into it, Megatron the plans of its ranks,
    and entries stand in the order in which writers ended. Nobody reads any of that again; but a
    result whose files differ from run to run would have another identity every time.

    Args:
        folder: of a ``torch_dist`` checkpoint that this process may change.
    """
    part = in_folder(folder)(METADATA)
    assert part is not None, folder
    found = read_metadata(part)
    storage = sorted(found.storage_data.items(), key=lambda entry: _place(entry[0]))
    settled = replace(
        found,
        state_dict_metadata=dict(sorted(found.state_dict_metadata.items())),
        storage_data=dict(storage),
        storage_meta=None,
    )
    with atomic_file(folder / METADATA) as draft, draft.open("wb") as file:
        _dump(settled, file)


def _place(index: MetadataIndex) -> tuple[str, tuple[int, ...], int]:
    return index.fqn, tuple(index.offset or ()), index.index or 0


def _dump(metadata: Metadata, file: IO[bytes]) -> None:
    """Write a pickle without references to what came before.

    Those tell which equal strings were one object in memory, which differs from run to run.
    """
    pickler = pickle.Pickler(file, protocol=4)
    pickler.fast = True
    pickler.dump(metadata)
