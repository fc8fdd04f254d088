"""Opening what ``import`` is given: a Hugging Face folder, a GGUF file or a Megatron checkpoint."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_minitron.checkpoint.foreign.megatron_sources import is_megatron
from nemo_minitron.checkpoint.gguf import open_gguf
from nemo_minitron.checkpoint.hf import (
    CONFIG_JSON,
    GENERATION_JSON,
    copy_generation_config,
    model_config,
    open_hf,
    to_megatron,
)
from nemo_minitron.checkpoint.hf_checks import without_prediction_layers
from nemo_minitron.checkpoint.lazy import Store, first_rows, on_read, refuse_nonfinite
from nemo_minitron.checkpoint.tokenizer import (
    TokenizerFiles,
    gguf_tokenizer,
    save_tokenizer,
    tokenizer_files,
    vocabulary_size,
    write_tokenizer,
)
from nemo_minitron.checkpoint.tokenizer_read import keep_as_read
from nemo_minitron.config.model import MODEL_YAML, ModelConfig
from nemo_minitron.documents import read_json_object
from nemo_minitron.families.letters import in_letters, name_of_pair
from nemo_minitron.families.prediction import MTP_LAYERS
from nemo_minitron.families.registry import family_of
from nemo_minitron.families.table import Family


@dataclass(frozen=True)
class Opened:
    """The model that ``source`` names; only its headers have been read.

    Attributes:
        family: its table.
        config: its sizes.
        store: Megatron names. Reading a tensor with NaN or infinity raises a ValueError that names
            it as the source does.
        save_extras: puts tokenizer and generation config into a folder.
    """

    family: Family
    config: ModelConfig
    store: Store
    save_extras: Callable[[Path], None]


def open_source(
    source: str,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    source_ignore: Sequence[str] = (),
    as_hybrid: bool = False,
) -> Opened:
    """Open what ``source`` names; only headers are read.

    Args:
        source: Hugging Face folder, .gguf file, Megatron or NeMo checkpoint.
        tokenizer: folder of the tokenizer, or its file, instead of what the source has.
        vocab_size: true vocabulary, for sources that pad it.
        source_ignore: keys of config.json, or of GGUF metadata, that are not looked at.
        as_hybrid: whether a GPT model becomes a HybridModel of Megatron-Core.

    Raises:
        ValueError: the source is missing, damaged, incomplete or of an unknown architecture.
    """
    opened = _opened(source, tokenizer, vocab_size, source_ignore)
    if not as_hybrid or opened.config.hybrid_layer_pattern is not None:
        return opened
    config = in_letters(opened.config)
    family = family_of(config)
    names = [name for name, *_ in family.parameters(config)]
    store = {name: opened.store[name_of_pair(name)] for name in names}
    return replace(opened, family=family, config=config, store=store)


def _opened(
    source: str, tokenizer: str | None, vocab_size: int | None, source_ignore: Sequence[str]
) -> Opened:
    path = Path(source)
    if not path.is_dir() and not path.is_file():
        why = "is neither a folder nor a file" if path.exists() else "does not exist"
        raise ValueError(
            f"source={source} {why}; give a Hugging Face model folder (config.json and "
            ".safetensors files), a .gguf file, a Megatron or NeMo checkpoint, or a .nemo archive "
            "on this machine"
        )
    if tokenizer is not None and not tokenizer_files(Path(tokenizer)):
        raise ValueError(
            f"tokenizer={tokenizer} is not a folder with tokenizer.json, tokenizer.model or "
            "another vocabulary of a tokenizer, and no such file"
        )
    try:
        _refuse_results(path)
        if not (path / CONFIG_JSON).is_file() and is_megatron(path):
            if source_ignore:
                raise ValueError(f"{path} has no config.json; leave source_ignore out")
            return _open_megatron(path, tokenizer, vocab_size)
        opened = _open_hf(path, tokenizer, source_ignore)
        if vocab_size is None or vocab_size == opened.config.vocab_size:
            return opened
        return _without_padding(opened, vocab_size, tokenizer_files(Path(tokenizer or path)))
    except ValueError as error:
        raise ValueError(f"source: {error}") from error


def _refuse_results(path: Path) -> None:
    ours = (path / "checkpoint" / MODEL_YAML).is_file()
    if ours or ((path / MODEL_YAML).is_file() and (path / "metadata.json").is_file()):
        raise ValueError(
            f"{path} is a result of minitron; give it to the next stage (checkpoint=, student=, "
            "teacher=) as it is"
        )


def _open_hf(path: Path, tokenizer: str | None, source_ignore: Sequence[str]) -> Opened:
    tokenizer_files(path)  # refuses those that Git LFS keeps elsewhere
    if path.is_dir():
        hf_config, hf_store = open_hf(path)
        family, config = model_config(hf_config, hf_store, source_ignore)
        if MTP_LAYERS in source_ignore:
            hf_store = without_prediction_layers(family, config, hf_store)
    else:
        hf_config, hf_store = open_gguf(path, source_ignore)
        if tokenizer is None:
            gguf_tokenizer(path)  # refuses those that cannot be rebuilt
        family, config = model_config(hf_config, hf_store)
    store = to_megatron(family, config, on_read(hf_store, refuse_nonfinite))

    def save_extras(folder: Path) -> None:
        if tokenizer is None:
            save_tokenizer(path, folder)
        else:
            write_tokenizer(tokenizer_files(Path(tokenizer)), folder)
        keep_as_read(folder, read_json_object(path / CONFIG_JSON) if path.is_dir() else hf_config)
        copy_generation_config(path, folder)

    return Opened(family, config, store, save_extras)


def _without_padding(opened: Opened, vocab_size: int, tokenizer: TokenizerFiles) -> Opened:
    """Leave the rows of the embeddings out that no token of the tokenizer has.

    Models of one tokenizer may be padded to different numbers of rows (Qwen2.5 7B and 3B are);
    distillation needs equal ones.
    """
    rows, tokens = opened.config.vocab_size, vocabulary_size(tokenizer)
    if vocab_size > rows or (tokens is not None and vocab_size < tokens):
        raise ValueError(
            f"vocab_size={vocab_size} must be between the number of tokens of the tokenizer "
            f"({'which has none' if tokens is None else tokens}) and the {rows} rows of the "
            "embeddings; change vocab_size, or leave it out"
        )
    config = replace(opened.config, vocab_size=vocab_size)
    store = {
        name: first_rows(opened.store[name], vocab_size)
        if row.dims[0] == "vocab"
        else opened.store[name]
        for name, row, _ in opened.family.parameters(config)
    }
    return replace(opened, config=config, store=store)


def _open_megatron(path: Path, tokenizer: str | None, vocab_size: int | None) -> Opened:
    from nemo_minitron.checkpoint.foreign.megatron_open import open_megatron  # a second to import

    found = open_megatron(path, Path(tokenizer) if tokenizer else None, vocab_size)
    written = found.family.to_hf(found.config)  # refuses what config.json cannot say

    def save_extras(folder: Path) -> None:
        write_tokenizer(found.tokenizer, folder)
        keep_as_read(folder, written)
        if found.generation:
            text = json.dumps(found.generation, indent=2, sort_keys=True) + "\n"
            (folder / GENERATION_JSON).write_text(text)

    store = on_read(found.store, refuse_nonfinite)
    return Opened(found.family, found.config, store, save_extras)
