"""Whether the tensors of a Hugging Face model are those that its config.json asks for."""

import re

import torch

from nemo_minitron.checkpoint.lazy import LazyTensor, Store, main_dtype, row_blocks
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.fuse import hf_shapes
from nemo_minitron.families.prediction import LEFT_OUT, copies, differs, lacking
from nemo_minitron.families.table import Family, Row

_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
# Buffers that old checkpoints hold and that follow from the config.
DERIVED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
_LAYERS_KEYS = ("num_hidden_layers", "n_layer")
# What programs put into the names of a model that they wrap.
_WRAPPERS = {
    "base_model.model.": "PEFT wrote them: merge the adapter (merge_and_unload) and save the model",
    "_orig_mod.": "torch.compile adds it: save model._orig_mod",
    "_fsdp_wrapped_module.": "FSDP adds it: save a full state dict",
    "_checkpoint_wrapped_module.": "activation checkpointing adds it",
    "module.": "data parallel training adds it: save model.module",
    "language_model.": "a model of text and images has it: save its language model alone",
    "text_model.": "a model of text and images has it: save its language model alone",
}


def hf_names(row: Row, layer: int | None) -> list[str]:
    """Return Hugging Face names of a row, with the number of its layer (``families.letters``)."""
    pair = None if layer is None else layer // 2
    return [name.format(layer=layer, pair=pair) for name in row.hf]


def expected_tensors(family: Family, config: ModelConfig) -> dict[str, tuple[tuple[int, ...], Row]]:
    """Return Hugging Face name of every tensor that the model has -> its shape and its row."""
    return {
        name: (shape, row)
        for _, row, layer in family.parameters(config)
        for name, shape in zip(hf_names(row, layer), hf_shapes(row, config), strict=True)
    }


def check_hf(family: Family, config: ModelConfig, store: Store) -> None:
    """Compare names, shapes and dtypes with the table.

    Args:
        family: the table.
        config: sizes, as config.json gives them.
        store: under Hugging Face names.

    Raises:
        ValueError: a tensor is missing, unexpected, not of the shape that the config asks for, or
            of another dtype than the tensors around it, or tied embeddings or copies differ; names
            file, tensor and what was expected.
    """
    expected = expected_tensors(family, config)
    _check_names(family, config, store, set(expected))
    for name, (shape, row) in expected.items():
        if store[name].shape != shape:
            raise ValueError(
                f"{_at(store, name)} has shape {store[name].shape}; config.json asks for {shape} "
                f"({', '.join(row.dims)})"
            )
    _check_dtypes(family, config, store)
    _check_tied(family, config, store)
    _check_copies(config, store)


def _at(store: Store, name: str) -> str:
    """Return a tensor and its file."""
    origin = store[name].origin
    return f"{origin}: {name}" if origin else name


def _check_names(family: Family, config: ModelConfig, store: Store, expected: set[str]) -> None:
    missing = sorted(expected - set(store))
    if missing:
        _refuse_wrapped(family, missing, store)
        tied = " (tied models set tie_word_embeddings=true)" if "lm_head.weight" in missing else ""
        why = lacking(config, missing) or _other_depth(family, config, store)
        raise ValueError(
            f"{len(missing)} tensors that config.json asks for are missing: {missing[:5]}{tied}"
            f"{why}"
        )
    # Tied models may hold a copy of the embedding under the name an untied one would use.
    copied = _tied_copies(family, config) | {*copies(config)}
    extra = [
        name
        for name in store
        if name not in expected and name not in copied and not name.endswith(DERIVED)
    ]
    if extra:
        extra.sort()
        files = sorted({store[name].origin for name in extra} - {""})
        where = f" (in {', '.join(files[:3])})" if files else ""
        apart = all(_left_out(family, name) for name in extra)
        why = LEFT_OUT if apart else _other_depth(family, config, store)
        raise ValueError(
            f"{len(extra)} tensors have no row in the table of family '{family.name}': {extra[:5]}"
            f"{where}{why}"
        )


def _tied_copies(family: Family, config: ModelConfig) -> set[str]:
    """Return where an untied model keeps its output embedding; nothing if this one is untied."""
    if not config.share_embeddings_and_output_weights:
        return set()
    return {name for row in family.rows if row.name == _OUTPUT for name in row.hf}


def _check_tied(family: Family, config: ModelConfig, store: Store) -> None:
    """Refuse an output embedding that differs from the input embedding it is tied to.

    transformers warns, and takes both.
    """
    (embedding,) = next(row.hf for row in family.rows if row.name == _EMBEDDING)
    for name in _tied_copies(family, config) & set(store):
        if not _equal(store[embedding], store[name]):
            raise ValueError(
                f"{_at(store, name)} is not equal to {embedding}, although config.json ties them "
                "(tie_word_embeddings=true, or its default); set tie_word_embeddings to false in a "
                "copy of config.json, or take the tensor out of the file if it is a stale one"
            )


def _check_copies(config: ModelConfig, store: Store) -> None:
    """Refuse layers for multi-token prediction with embeddings of their own."""
    for copy, original in copies(config).items():
        if copy in store and not _equal(store[original], store[copy]):
            raise ValueError(differs(_at(store, copy), original))


def _equal(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether two tensors hold the same numbers; some megabytes are in memory at a time."""
    if one.shape != other.shape:
        return False
    for start, stop, read in row_blocks(one):
        rows = other.read_rows(start, stop) if other.read_rows else other.read()[start:stop]
        if not torch.equal(read().float(), rows.float()):
            return False
    return True


def _refuse_wrapped(family: Family, missing: list[str], store: Store) -> None:
    """Refuse names that would be right without a prefix, which transformers would not find either.

    Raises:
        ValueError: names the prefix and, where it is known, who adds it.
    """
    bare = {name.removeprefix(family.hf_prefix) for name in missing}
    for wrapper, why in _WRAPPERS.items():
        unwrapped = {name.replace(wrapper, "") for name in store if wrapper in name}
        if len(bare & {name.removeprefix(family.hf_prefix) for name in unwrapped}) * 2 > len(bare):
            raise ValueError(
                f"{len(unwrapped)} names of tensors contain '{wrapper}' ({_first(store, wrapper)}),"
                f" without which they would be those of this model; {why}, and set source to that"
            )
    for name in store:
        prefix = name.removesuffix(missing[0])
        if prefix != name and all(prefix + other in store for other in missing):
            raise ValueError(
                f"the names of tensors start with '{prefix}' ({name}), which those of this model "
                f"do not; save them without it and set source to that"
            )


def _first(store: Store, part: str) -> str:
    """Return the first name that contains ``part``."""
    return next(name for name in sorted(store) if part in name)


def _layers(family: Family, store: Store) -> dict[str, int]:
    """Return the number of the layer of every tensor that is in one."""
    starts = {name.split("{layer}")[0] for row in family.rows if row.per_layer for name in row.hf}
    pattern = re.compile(rf"(?:{'|'.join(map(re.escape, sorted(starts)))})(\d+)\.")
    return {name: int(found[1]) for name in store if (found := pattern.match(name))}


def without_prediction_layers(family: Family, config: ModelConfig, store: Store) -> Store:
    """A store without layers of multi-token prediction, which stand after those of the model."""
    layers = _layers(family, store)
    return {
        name: tensor
        for name, tensor in store.items()
        if layers.get(name, 0) < config.num_layers and not _left_out(family, name)
    }


def _left_out(family: Family, name: str) -> bool:
    """Whether a tensor is one that the table does not hold, of multi-token prediction."""
    return bool(family.left_out) and name.startswith(family.left_out)


def _other_depth(family: Family, config: ModelConfig, store: Store) -> str:
    """Return a hint for weights of a model with another number of layers than the config."""
    layers = max(_layers(family, store).values(), default=-1) + 1
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
