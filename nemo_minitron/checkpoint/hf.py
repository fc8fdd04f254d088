"""Hugging Face folders: config.json and (sharded) safetensors, read and written lazily.

Everything a user can get wrong in a folder is found from the headers, before any weight is read.
"""

import json
import logging
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_minitron.checkpoint.lazy import LazyTensor, Store, main_dtype, shared_parts
from nemo_minitron.checkpoint.safetensors_file import write_safetensors
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.fuse import FUSIONS, HF_FORMS, hf_shapes
from nemo_minitron.families.registry import family_of_hf
from nemo_minitron.families.table import Family, Row

logger = logging.getLogger(__name__)

CONFIG_JSON = "config.json"
GENERATION_JSON = "generation_config.json"
INDEX_JSON = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Buffers that old checkpoints hold and that follow from the config.
_DERIVED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return value


def _shard_names(folder: Path) -> dict[str, set[str] | None]:
    """Safetensors files of a folder and the tensors the index puts in each (None: no index)."""
    index = folder / INDEX_JSON
    if index.is_file():
        shards: dict[str, set[str] | None] = {}
        for name, file in _read_json(index).get("weight_map", {}).items():
            members = shards.setdefault(file, set())
            assert members is not None
            members.add(name)
        return shards
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if "model.safetensors" in files:
        return {"model.safetensors": None}
    if len(files) == 1:
        return {files[0]: None}
    if files:
        raise ValueError(f"{folder} holds {len(files)} .safetensors files but no {INDEX_JSON}")
    raise ValueError(
        f"{folder} holds no .safetensors file; save the model with safe_serialization=True, or set "
        "source to a folder that has them"
    )


def _read_tensor(path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged at {name}: {error}") from error


def _read_rows(path: Path, name: str, start: int, stop: int) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_slice(name)[start:stop]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged at {name}: {error}") from error


def _open_shard(path: Path, expected: set[str] | None) -> Store:
    """Store of one safetensors file, from its header."""
    if not path.is_file():
        raise ValueError(f"{path} is missing although {INDEX_JSON} lists it")
    store: Store = {}
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for name in names:
                if name.endswith(_DERIVED):
                    continue
                view = file.get_slice(name)
                if view.get_dtype() not in DTYPES:
                    raise ValueError(
                        f"{path}: {name} is {view.get_dtype()}; supported: {sorted(DTYPES)}"
                    )
                store[name] = LazyTensor(
                    tuple(view.get_shape()),
                    DTYPES[view.get_dtype()],
                    partial(_read_tensor, path, name),
                    partial(_read_rows, path, name),
                )
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from error
    if expected is not None and names != expected:
        raise ValueError(
            f"{path} and {INDEX_JSON} disagree: the file lacks {sorted(expected - names)[:5]} and "
            f"holds {sorted(names - expected)[:5]} besides; download both again"
        )
    return store


def open_hf(folder: Path) -> tuple[dict[str, Any], Store]:
    """Open a Hugging Face model folder; only headers are read.

    Args:
        folder: holds config.json and safetensors files.

    Returns:
        config.json, and the store under Hugging Face names, rows in Hugging Face order.

    Raises:
        ValueError: a file is missing, damaged, or disagrees with the index; a tensor is of a dtype
            that no model computes in.
    """
    if not (folder / CONFIG_JSON).is_file():
        raise ValueError(f"{folder} is not a Hugging Face model folder: {CONFIG_JSON} is missing")
    config = _read_json(folder / CONFIG_JSON)
    if config.get("quantization_config"):
        raise ValueError(
            f"{folder} holds quantised weights (quantization_config in {CONFIG_JSON}); set source "
            "to the unquantised model"
        )
    family_of_hf(config)
    store: Store = {}
    for file, names in _shard_names(folder).items():
        store.update(_open_shard(folder / file, names))
    return config, store


def model_config(hf_config: dict[str, Any], hf_store: Store) -> tuple[Family, ModelConfig]:
    """Family and sizes of an opened Hugging Face model (or GGUF).

    ``dtype`` is that of the weights themselves, whatever config.json says.

    Raises:
        ValueError: unknown architecture, a size is missing, or the table cannot hold the model.
    """
    family = family_of_hf(hf_config)
    try:
        config = family.from_hf(hf_config)
    except KeyError as error:
        raise ValueError(f"{CONFIG_JSON} lacks {error}") from error
    config.dtype = str(main_dtype(hf_store)).removeprefix("torch.")
    declared = hf_config.get("torch_dtype") or hf_config.get("dtype") or config.dtype
    if declared != config.dtype:
        logger.warning("weights are %s although config.json says %s", config.dtype, declared)
    return family, config


def _hf_names(row: Row, layer: int | None) -> list[str]:
    return [name.format(layer=layer) for name in row.hf]


def _known(family: Family, config: ModelConfig) -> Iterable[tuple[str, tuple[int, ...]]]:
    for _, row, layer in family.parameters(config):
        yield from zip(_hf_names(row, layer), hf_shapes(row, config), strict=True)


def _check_hf(family: Family, config: ModelConfig, store: Store) -> None:
    """Names and shapes against the table."""
    expected = dict(_known(family, config))
    missing = [name for name in expected if name not in store]
    if missing:
        tied = " (tied models set tie_word_embeddings=true)" if "lm_head.weight" in missing else ""
        raise ValueError(
            f"{len(missing)} tensors that {CONFIG_JSON} asks for are missing: {missing[:5]}{tied}"
        )
    # Tied models may hold a copy of the embedding under the name an untied one would use.
    tied_names = {name for row in family.rows if not row.when(config) for name in row.hf}
    extra = [
        name
        for name in store
        if name not in expected and name not in tied_names and not name.endswith(_DERIVED)
    ]
    if extra:
        raise ValueError(
            f"{len(extra)} tensors have no row in the table of family '{family.name}': {extra[:5]}"
        )
    for name, shape in expected.items():
        if store[name].shape != shape:
            raise ValueError(
                f"{name} has shape {store[name].shape}; {CONFIG_JSON} asks for {shape}"
            )


def _fused(row: Row, config: ModelConfig, parts: list[LazyTensor]) -> LazyTensor:
    if row.hf_form is not None:
        (part,), form = parts, HF_FORMS[row.hf_form]
        return LazyTensor(
            row.shape(config), part.dtype, lambda: form.to_megatron(config, part.read())
        )
    if len(parts) == 1:
        return parts[0]
    dtypes = {part.dtype for part in parts}
    if len(dtypes) > 1:
        raise ValueError(f"{row.hf} have dtypes {dtypes}; convert the source to one dtype")
    fuse = FUSIONS[row.dims[0]].fuse

    def read() -> Tensor:
        return fuse(config, [part.read() for part in parts])

    return LazyTensor(row.shape(config), dtypes.pop(), read)


def _prefixed(family: Family, store: Store) -> Store:
    """The same store with the prefix that checkpoints of the bare model leave out."""
    prefix = family.hf_prefix
    if not prefix or any(name.startswith(prefix) for name in store):
        return store
    known = {name for row in family.rows for name in row.hf if not name.startswith(prefix)}
    return {name if name in known else prefix + name: tensor for name, tensor in store.items()}


def to_megatron(family: Family, config: ModelConfig, hf_store: Store) -> Store:
    """Hugging Face names and row order -> Megatron's. Exact; dtypes are kept.

    Args:
        family: the table.
        config: sizes, from ``model_config``.
        hf_store: store under Hugging Face names.

    Returns:
        Store under Megatron names (local spec, with layer numbers), global shapes.

    Raises:
        ValueError: a tensor is missing, unexpected, or not of the shape the config asks for.
    """
    hf_store = _prefixed(family, hf_store)
    _check_hf(family, config, hf_store)
    return {
        name: _fused(row, config, [hf_store[part] for part in _hf_names(row, layer)])
        for name, row, layer in family.parameters(config)
    }


def _reformed(row: Row, config: ModelConfig, whole: LazyTensor) -> LazyTensor:
    """The one Hugging Face tensor of a row."""
    if row.hf_form is None:
        return whole
    (shape,), form = hf_shapes(row, config), HF_FORMS[row.hf_form]
    return LazyTensor(shape, whole.dtype, lambda: form.to_hf(config, whole.read()))


def to_hf(family: Family, config: ModelConfig, store: Store) -> Store:
    """Inverse of ``to_megatron``; tied models get no output embedding."""
    result: Store = {}
    for name, row, layer in family.parameters(config):
        whole, names, shapes = store[name], _hf_names(row, layer), hf_shapes(row, config)
        if len(names) == 1:
            result[names[0]] = _reformed(row, config, whole)
            continue
        split = FUSIONS[row.dims[0]].split
        reads = shared_parts(
            lambda whole=whole, split=split: split(config, whole.read()),  # type: ignore[misc]
            len(names),
        )
        for part, shape, read in zip(names, shapes, reads, strict=True):
            result[part] = LazyTensor(shape, whole.dtype, read)
    return result


def split_shards(store: Store, max_shard_size: str) -> StateDictSplit:
    """File of every tensor, as ``save_pretrained`` would choose.

    Raises:
        ValueError: max_shard_size is not a size.
    """
    try:
        return split_state_dict_into_shards_factory(
            store,
            get_storage_size=lambda tensor: tensor.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise ValueError(
            f"max_shard_size={max_shard_size} must be a number with KB, MB, GB or TB, like 5GB"
        ) from error


def write_hf(
    folder: Path, store: Store, config: dict[str, Any], max_shard_size: str, workers: int = 1
) -> list[str]:
    """Write config.json and safetensors; a tensor per worker is in memory at a time.

    Args:
        folder: existing folder.
        store: store under Hugging Face names.
        config: config.json, from ``Family.to_hf``.
        max_shard_size: largest file, like ``5GB``.
        workers: files written at a time.

    Returns:
        Names of the safetensors files.

    Raises:
        ValueError: max_shard_size is not a size.
        OSError: the folder cannot be written (disk full).
    """
    split = split_shards(store, max_shard_size)
    (folder / CONFIG_JSON).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    def write(file: str) -> None:
        names = set(split.filename_to_tensors[file])
        # In the order of the store: parts of one fused tensor are neighbours there.
        write_safetensors(folder / file, {name: store[name] for name in store if name in names})

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(write, split.filename_to_tensors))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_JSON).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return list(split.filename_to_tensors)


def copy_generation_config(source: Path, folder: Path) -> bool:
    """Carry generation_config.json over, if there is one."""
    if not (source / GENERATION_JSON).is_file():
        return False
    shutil.copyfile(source / GENERATION_JSON, folder / GENERATION_JSON)
    return True
