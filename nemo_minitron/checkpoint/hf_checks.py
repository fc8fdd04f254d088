"""Whether the tensors of a Hugging Face model are those that its config.json asks for."""

import re

import torch

from nemo_minitron.checkpoint.lazy import Store, main_dtype
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.fuse import hf_shapes
from nemo_minitron.families.table import Family, Row

# Buffers that old checkpoints hold and that follow from the config.
DERIVED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
_LAYERS_KEYS = ("num_hidden_layers", "n_layer")


def hf_names(row: Row, layer: int | None) -> list[str]:
    """Hugging Face names of a row, with the number of its layer."""
    return [name.format(layer=layer) for name in row.hf]


def check_hf(family: Family, config: ModelConfig, store: Store) -> None:
    """Names, shapes and dtypes against the table.

    Args:
        family: the table.
        config: sizes, as config.json gives them.
        store: under Hugging Face names.

    Raises:
        ValueError: a tensor is missing, unexpected, not of the shape that the config asks for, or
            of another dtype than the tensors around it; names file, tensor and what was expected.
    """
    expected = {
        name: (shape, row)
        for _, row, layer in family.parameters(config)
        for name, shape in zip(hf_names(row, layer), hf_shapes(row, config), strict=True)
    }
    _check_names(family, config, store, set(expected))
    for name, (shape, row) in expected.items():
        if store[name].shape != shape:
            raise ValueError(
                f"{_at(store, name)} has shape {store[name].shape}; config.json asks for {shape} "
                f"({', '.join(row.dims)})"
            )
    _check_dtypes(family, config, store)


def _at(store: Store, name: str) -> str:
    """A tensor and its file."""
    origin = store[name].origin
    return f"{origin}: {name}" if origin else name


def _check_names(family: Family, config: ModelConfig, store: Store, expected: set[str]) -> None:
    missing = sorted(expected - set(store))
    if missing:
        tied = " (tied models set tie_word_embeddings=true)" if "lm_head.weight" in missing else ""
        raise ValueError(
            f"{len(missing)} tensors that config.json asks for are missing: {missing[:5]}{tied}"
            f"{_other_depth(family, config, store)}"
        )
    # Tied models may hold a copy of the embedding under the name an untied one would use.
    tied_names = {name for row in family.rows if not row.when(config) for name in row.hf}
    extra = [
        name
        for name in store
        if name not in expected and name not in tied_names and not name.endswith(DERIVED)
    ]
    if extra:
        extra.sort()
        files = sorted({store[name].origin for name in extra} - {""})
        where = f" (in {', '.join(files[:3])})" if files else ""
        raise ValueError(
            f"{len(extra)} tensors have no row in the table of family '{family.name}': {extra[:5]}"
            f"{where}{_other_depth(family, config, store)}"
        )


def _other_depth(family: Family, config: ModelConfig, store: Store) -> str:
    """What to add when the weights are of a deeper or a shallower model than the config."""
    starts = {name.split("{layer}")[0] for row in family.rows if row.per_layer for name in row.hf}
    pattern = re.compile(rf"(?:{'|'.join(map(re.escape, sorted(starts)))})(\d+)\.")
    found = [int(match[1]) for match in map(pattern.match, store) if match]
    layers = max(found, default=-1) + 1
    if layers == config.num_layers:
        return ""
    written = family.to_hf(config)
    key = next(key for key in _LAYERS_KEYS if key in written)
    return (
        f"; {key}={config.num_layers} in config.json, but the weights are of {layers} layers: take "
        "both from one model"
    )


def _check_dtypes(family: Family, config: ModelConfig, store: Store) -> None:
    """One dtype, and float32 where a half-precision model keeps something whole (norms, routers).

    What becomes one tensor of Megatron's has to be of one dtype in any case.
    """
    main = main_dtype(store)
    way_out = "convert the source to one dtype"
    for _, row, layer in family.parameters(config):
        names = hf_names(row, layer)
        first = store[names[0]].dtype
        for name in names:
            dtype = store[name].dtype
            if dtype not in (main, torch.float32):
                raise ValueError(
                    f"{_at(store, name)} is {dtype} although most weights are {main}; {way_out}"
                )
            if dtype != first:
                raise ValueError(
                    f"{_at(store, name)} is {dtype} but {names[0]}, which it is joined with, is "
                    f"{first}; {way_out}"
                )
