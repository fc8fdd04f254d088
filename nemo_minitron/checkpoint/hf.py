"""Hugging Face folders: config.json and (sharded) safetensors, read and written lazily.

Everything a user can get wrong in a folder is found from the headers, before any weight is read.
"""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open

from nemo_minitron.checkpoint.fp8 import FP8, QUANTISED, dequantised, fp8_block
from nemo_minitron.checkpoint.hf_checks import DERIVED, check_hf, expected_tensors, hf_names
from nemo_minitron.checkpoint.hf_refusals import (
    refuse_adapter,
    refuse_adapter_names,
    refuse_pointer,
    refuse_quantised,
    way_out_of_dtype,
)
from nemo_minitron.checkpoint.inside import inside, refuse_links_out
from nemo_minitron.checkpoint.lazy import LazyTensor, Store, from_runs, main_dtype
from nemo_minitron.checkpoint.mxfp4 import MXFP4, dequantised_experts, is_mxfp4
from nemo_minitron.checkpoint.safetensors_file import (
    stored_tensor,
    value_places,
    write_safetensors,
)
from nemo_minitron.checkpoint.stacked import stacked, unstacked
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.documents import JsonObject, read_json_object
from nemo_minitron.families.fuse import HF_FORMS, hf_shapes, runs_from_hf, runs_to_hf
from nemo_minitron.families.prediction import copies
from nemo_minitron.families.registry import family_of_hf, read_config
from nemo_minitron.families.table import Family, Row

logger = logging.getLogger(__name__)

CONFIG_JSON = "config.json"
GENERATION_JSON = "generation_config.json"
SAFETENSORS = "model.safetensors"
INDEX_JSON = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Weights in the format of Mistral's own program, which lie beside those of Hugging Face.
_MISTRAL = "consolidated"


def _indexed(folder: Path) -> dict[str, set[str]]:
    """Return files and their tensors, as the index says."""
    index = folder / INDEX_JSON
    refuse_pointer(index)
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} holds no weight_map (tensor -> file); download it again")
    shards: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise ValueError(f"{index}: weight_map gives {name} the file {file!r}, not a name")
        shards.setdefault(file, set()).add(name)
    if SAFETENSORS not in shards and (folder / SAFETENSORS).is_file():
        raise ValueError(
            f"{folder} holds both {SAFETENSORS} and {INDEX_JSON}, which does not list it; remove "
            "the one that is not of this model"
        )
    return shards


def _shard_names(folder: Path) -> dict[str, set[str] | None]:
    """Return safetensors files, each with its tensors by the index (None without an index)."""
    if (folder / INDEX_JSON).is_file():
        return dict(_indexed(folder))
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    files = [name for name in names if not name.startswith(_MISTRAL)]
    if SAFETENSORS in files:
        return {SAFETENSORS: None}
    if len(files) == 1:
        return {files[0]: None}
    if files:
        raise ValueError(f"{folder} holds {len(files)} .safetensors files but no {INDEX_JSON}")
    if names:
        raise ValueError(
            f"{folder} holds {names[0]} alone, which is in the format of Mistral's own program; "
            f"set source to a folder with the {SAFETENSORS} that transformers reads"
        )
    raise ValueError(
        f"{folder} holds no .safetensors file; save the model with safe_serialization=True, or set "
        "source to a folder that has them"
    )


def _open_shard(
    path: Path, expected: set[str] | None, dtypes: Mapping[str, torch.dtype] = DTYPES
) -> Store:
    """Return the store of one safetensors file, from its header."""
    if not path.is_file():
        raise ValueError(f"{path} is missing although {INDEX_JSON} lists it")
    refuse_pointer(path)
    store: Store = {}
    try:
        with safe_open(path, framework="pt") as file:
            names, places = set(file.keys()), value_places(path)
            refuse_adapter_names(path, names)
            for name in names:
                if name.endswith(DERIVED):
                    continue
                view = file.get_slice(name)
                if view.get_dtype() not in dtypes:
                    raise ValueError(
                        f"{path}: {name} is {view.get_dtype()}; supported: {sorted(DTYPES)}; "
                        f"{way_out_of_dtype(view.get_dtype())}"
                    )
                shape, dtype = tuple(view.get_shape()), dtypes[view.get_dtype()]
                store[name] = stored_tensor(path, places[name], shape, dtype)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from error
    if expected is not None and names != expected:
        raise ValueError(
            f"{path} and {INDEX_JSON} disagree: the file lacks {sorted(expected - names)[:5]} and "
            f"holds {sorted(names - expected)[:5]} besides; download both again"
        )
    return store


def open_hf(folder: Path) -> tuple[JsonObject, Store]:
    """Open a Hugging Face model folder; only headers are read.

    Args:
        folder: holds config.json and safetensors files.

    Returns:
        config.json (of the dequantised model, where weights are FP8 or MXFP4 with scales of
        blocks), and the store under Hugging Face names, rows in Hugging Face order.

    Raises:
        ValueError: a file is missing, damaged, or disagrees with the index; a tensor is of a dtype
            that no model computes in.
    """
    refuse_adapter(folder)
    if not (folder / CONFIG_JSON).is_file():
        raise ValueError(f"{folder} is not a Hugging Face model folder: {CONFIG_JSON} is missing")
    refuse_links_out(folder)
    refuse_pointer(folder / CONFIG_JSON)
    config = read_json_object(folder / CONFIG_JSON)
    block, packed = fp8_block(config), is_mxfp4(config)
    if block is not None or packed:
        config = {key: value for key, value in config.items() if key != QUANTISED}
    refuse_quantised(folder / CONFIG_JSON, config)
    family_of_hf(config)
    store: Store = {}
    dtypes = DTYPES | ({} if block is None else FP8) | (MXFP4 if packed else {})
    for file, names in _shard_names(folder).items():
        store.update(_open_shard(inside(folder, file), names, dtypes))
    if block is not None:
        store = dequantised(store, block)
    if packed:
        store = dequantised_experts(store)
    if not store:
        raise ValueError(f"{folder}: the .safetensors files hold no tensor; download them again")
    return config, store


def model_config(
    hf_config: JsonObject, hf_store: Store, passed_over: Sequence[str] = ()
) -> tuple[Family, ModelConfig]:
    """Return the family and sizes of an opened Hugging Face model (or GGUF).

    ``dtype`` is that of the weights themselves, whatever config.json says.

    Raises:
        ValueError: see ``families.registry.read_config``.
    """
    family, config = read_config(hf_config, passed_over)
    config.dtype = str(main_dtype(hf_store)).removeprefix("torch.")
    declared = hf_config.get("dtype") or hf_config.get("torch_dtype") or config.dtype
    if declared != config.dtype:
        logger.warning("weights are %s although config.json says %s", config.dtype, declared)
    return family, config


def _fused(row: Row, config: ModelConfig, hf_store: Store, names: list[str]) -> LazyTensor:
    parts = [hf_store[name] for name in names]
    if row.hf_form is not None:
        (part,), form = parts, HF_FORMS[row.hf_form]
        return LazyTensor(
            row.shape(config), part.dtype, lambda: form.to_megatron(config, part.read())
        )
    if len(parts) == 1:
        return parts[0]
    return from_runs(parts, runs_from_hf(row, config))


def _prefixed(family: Family, config: ModelConfig, store: Store) -> Store:
    """Return the store with the prefix that checkpoints of the bare model leave out.

    As transformers does it: a name that the model has not gets the prefix if it then has it.
    """
    expected = expected_tensors(family, config)

    def full(name: str) -> str:
        longer = family.hf_prefix + name
        known = name in expected or longer not in expected or longer in store
        return name if known else longer

    return {full(name): tensor for name, tensor in store.items()}


def to_megatron(family: Family, config: ModelConfig, hf_store: Store) -> Store:
    """Return Hugging Face names and row order -> Megatron's. Exact; dtypes are kept.

    Args:
        family: the table.
        config: sizes, from ``model_config``.
        hf_store: store under Hugging Face names.

    Returns:
        Store under Megatron names (local spec, with layer numbers), global shapes.

    Raises:
        ValueError: see ``check_hf``.
    """
    hf_store = _prefixed(family, config, unstacked(family, hf_store))
    check_hf(family, config, hf_store)
    return {
        name: _fused(row, config, hf_store, hf_names(row, layer))
        for name, row, layer in family.parameters(config)
    }


def _reformed(row: Row, config: ModelConfig, whole: LazyTensor) -> LazyTensor:
    """Return the one Hugging Face tensor of a row."""
    if row.hf_form is None:
        return whole
    (shape,), form = hf_shapes(row, config), HF_FORMS[row.hf_form]
    return LazyTensor(shape, whole.dtype, lambda: form.to_hf(config, whole.read()))


def to_hf(family: Family, config: ModelConfig, store: Store) -> Store:
    """Inverse of ``to_megatron``; tied models get no output embedding, other copies are written."""
    result: Store = {}
    for name, row, layer in family.parameters(config):
        whole, names = store[name], hf_names(row, layer)
        if len(names) == 1:
            result[names[0]] = _reformed(row, config, whole)
            continue
        for number, part in enumerate(names):
            result[part] = from_runs([whole], runs_to_hf(row, config, number))
    found = stacked(result)
    return found | {copy: found[original] for copy, original in copies(config).items()}


def split_shards(store: Store, max_shard_size: str) -> StateDictSplit:
    """Return the file of every tensor, as ``save_pretrained`` would choose.

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
    folder: Path, store: Store, config: JsonObject, max_shard_size: str, workers: int = 1
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
    (folder / CONFIG_JSON).write_text(json.dumps(config, indent=2) + "\n")

    def write(file: str) -> None:
        names = set(split.filename_to_tensors[file])
        # In the order of the store: parts of one fused tensor lie side by side there.
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
