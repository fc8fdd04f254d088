"""Opens checkpoints of Megatron-LM, Megatron-Bridge, NeMo 2 and NeMo 1 as stores.

Only metadata is read; weights come tensor by tensor when they are asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from nemo_minitron.checkpoint.foreign.megatron_fields import match_family, model_fields
from nemo_minitron.checkpoint.foreign.megatron_sources import Source, find_source
from nemo_minitron.checkpoint.hf_refusals import refuse_adapter_names
from nemo_minitron.checkpoint.lazy import LazyTensor, Store, first_rows, main_dtype
from nemo_minitron.checkpoint.parts import Part
from nemo_minitron.checkpoint.safe_pickle import PICKLE_ERRORS, read_torch_file
from nemo_minitron.checkpoint.tokenizer import (
    TokenizerFiles,
    special_ids,
    tokenizer_files,
    vocabulary_size,
)
from nemo_minitron.checkpoint.torch_dist_read import Checkpoint, open_torch_dist, stored_weights
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.documents import JsonObject
from nemo_minitron.families.latent import LATENT_EPSILON
from nemo_minitron.families.registry import family_of
from nemo_minitron.families.table import Family

_EMBEDDING = "embedding.word_embeddings.weight"
# What weights' names may start with: nothing (Megatron-LM, Bridge), NeMo 2, NeMo 1.
_PREFIXES = ("", "module.", "model.", "module.module.", "model.module.")


@dataclass(frozen=True)
class Found:
    """An opened checkpoint.

    Attributes:
        family: its table.
        config: its sizes; the vocabulary true, without padding.
        store: Megatron names, global shapes.
        tokenizer: files of its tokenizer; empty if it has no tokenizer.
        generation: generation_config.json; empty if it does not exist.
    """

    family: Family
    config: ModelConfig
    store: Store
    tokenizer: TokenizerFiles
    generation: JsonObject


_Weights = tuple[int, Callable[[Family, ModelConfig], Store]]
"""Rows of the embedding, and what makes a store once the sizes are known."""


def _prefix(where: Path, holds: Callable[[str], object]) -> str:
    for prefix in _PREFIXES:
        if holds(prefix + _EMBEDDING):
            return prefix
    raise ValueError(f"{where} holds no {_EMBEDDING}: not a GPT model of Megatron-Core")


# HybridModel and MambaModel call it so, GPTModel final_layernorm.
_HYBRID_NORM = "decoder.final_norm.weight"
_HYBRID_PATTERNS = ("hybrid_layer_pattern", "hybrid_override_pattern")


def _refuse_hybrid(source: Source, checkpoint: Checkpoint, prefix: str) -> None:
    """Refuse half a hybrid model: its layers have other numbers and names than a GPT model's."""
    values = source.stated.values
    says = [f"{name}={values[name]}" for name in _HYBRID_PATTERNS if values.get(name)]
    norm = checkpoint.tensor(prefix + _HYBRID_NORM)
    if says and norm:
        return
    if norm:
        says.append(f"holds {prefix}{_HYBRID_NORM}")
    if says:
        raise ValueError(
            f"{source.where} {', '.join(says)}: a HybridModel (or MambaModel) of Megatron-Core, "
            "whose layers are attention or MLP alone, has both a pattern of its layers and "
            f"{_HYBRID_NORM}, a GPTModel neither. Where it is of a family in docs/families.md, "
            "export it to Hugging Face format with the program that wrote it (Megatron-Bridge) and "
            "set source to that"
        )


def _distributed(source: Source) -> _Weights:
    checkpoint = open_torch_dist(source.weights, source.find)
    refuse_adapter_names(source.weights, map(str, checkpoint.metadata.state_dict_metadata))
    prefix = _prefix(source.weights, checkpoint.tensor)
    _refuse_hybrid(source, checkpoint, prefix)
    rows = checkpoint.metadata.state_dict_metadata[prefix + _EMBEDDING].size[0]  # type: ignore[union-attr]  # `_prefix` found a tensor there
    return rows, partial(stored_weights, checkpoint, prefix=prefix)


def _single_file(where: Path, part: Part) -> _Weights:
    """Return the one file that NeMo 1 writes without model parallelism."""
    try:
        found = read_torch_file(part)
    except PICKLE_ERRORS as error:
        raise ValueError(f"{where} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where} holds a {type(found).__name__}, not weights by name")
    # Transformer Engine before 2.0 has a file in memory as its state, since then a tensor of bytes.
    tensors = {
        name: value
        for name, value in found.items()
        if isinstance(value, LazyTensor) and not str(name).endswith("._extra_state")
    }
    refuse_adapter_names(where, map(str, tensors))
    prefix = _prefix(where, tensors.get)
    named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return named[_EMBEDDING].shape[0], partial(_single_store, where, named)


def _single_store(
    where: Path, tensors: dict[str, LazyTensor], family: Family, config: ModelConfig
) -> Store:
    store: Store = {}
    left = dict(tensors)
    for name, row, layer in family.parameters(config):
        names = [n.format(layer=layer) for n in row.names_on_disk]
        found = next((left.pop(n) for n in names if n in left), None)
        if found is None:
            raise ValueError(f"{where} lacks {name}, which a model of this configuration has")
        shape = row.shape(config)
        if row.dims[0] == "vocab" and found.shape[0] > shape[0]:
            found = first_rows(found, shape[0])
        if found.shape != shape:
            raise ValueError(
                f"{where} holds {name} of shape {found.shape}; its config asks for {shape}"
            )
        store[name] = found
    if left:
        raise ValueError(f"{where} holds {sorted(left)[:5]}, which this model does not have")
    return store


def _true_vocabulary(source: Source, rows: int, asked: int | None) -> int:
    """Take the vocabulary size from the key vocab_size, else the config, else the tokenizer."""
    known, by = asked, "vocab_size"
    if known is None and source.vocab_size is not None:
        known, by = source.vocab_size, source.stated.where
    if known is None:
        known, by = vocabulary_size(source.tokenizer), "the tokenizer"
    if known is None:
        raise ValueError(
            f"{source.where} has embeddings of {rows} tokens, some of which may be padding, and no "
            "tokenizer that says how many there are; set tokenizer to the folder that has it, or "
            "vocab_size to the number of tokens"
        )
    if type(known) is not int or not 1 <= known <= rows:
        raise ValueError(
            f"{source.where} has embeddings of {rows} tokens, but {by} says {known}; set "
            "vocab_size to the number of tokens"
        )
    return known


def _family(source: Source, vocab_size: int) -> tuple[Family, ModelConfig]:
    if source.config is not None:
        return family_of(source.config), source.config
    try:
        family, config = match_family(source.stated, model_fields(source.stated, vocab_size))
    except (AttributeError, IndexError, TypeError, ZeroDivisionError) as error:
        raise ValueError(
            f"{source.stated.where} has a value of a type that Megatron does not write there: "
            f"{error}; set source to an intact copy"
        ) from error
    if config.multi_latent and config.layernorm_epsilon != LATENT_EPSILON:
        raise ValueError(
            f"{source.where}: layernorm_epsilon={config.layernorm_epsilon} of a model with "
            f"multi-latent attention is not supported; only {LATENT_EPSILON}, which the norms of "
            "the latents have in every network of Hugging Face"
        )
    config.hf = special_ids(source.tokenizer)
    return family, config


def open_megatron(path: Path, tokenizer: Path | None, vocab_size: int | None) -> Found:
    """Open a checkpoint of any of ``megatron_sources.LAYOUTS``, or a ``.nemo`` archive.

    Args:
        path: folder or archive for which ``megatron_sources.is_megatron``.
        tokenizer: folder of a tokenizer that is not in the checkpoint, or instead of that.
        vocab_size: true vocabulary, where nothing else says it.

    Raises:
        ValueError: a file is missing, damaged or of another format; the config asks for what no
            family has; the weights do not fit it; the true vocabulary cannot be known.
    """
    source = find_source(path)
    if tokenizer is not None:
        source = replace(source, tokenizer=tokenizer_files(tokenizer))
    if source.single is None:
        rows, store_of = _distributed(source)
    else:
        rows, store_of = _single_file(source.where / "model_weights.ckpt", source.single)
    family, config = _family(source, _true_vocabulary(source, rows, vocab_size))
    store = store_of(family, config)
    config.dtype = str(main_dtype(store)).removeprefix("torch.")
    return Found(family, config, store, source.tokenizer, source.generation)
