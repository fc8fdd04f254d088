"""Files of a tokenizer wherever they lie, and what can be learnt from them without loading it."""

from pathlib import Path
from typing import Any

from nemo_minitron.checkpoint.hf_refusals import refuse_pointer
from nemo_minitron.checkpoint.parts import Part, in_folder
from nemo_minitron.checkpoint.tokenizer import (
    SENTENCEPIECE,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    names_in,
    tokens_by_id,
)
from nemo_minitron.documents import json_value

TokenizerFiles = dict[str, Part]
"""Name as in a Hugging Face folder -> where its bytes are."""
_VOCAB_JSON = "vocab.json"
# One of them makes a tokenizer; the others go with it.
_CORE = (TOKENIZER_JSON, _VOCAB_JSON, "vocab.txt", "tekken.json", ".model", ".tiktoken")
_BY_SUFFIX = {".json": TOKENIZER_JSON, ".model": SENTENCEPIECE}


def tokenizer_files(place: Path) -> TokenizerFiles:
    """Files of the tokenizer that a folder holds or a file is; empty without a tokenizer.

    Raises:
        ValueError: one of them is kept elsewhere by Git LFS.
    """
    names = names_in(place) if place.is_dir() else []
    for path in (place, *(place / name for name in names)):
        refuse_pointer(path)
    if place.is_file():
        name = _BY_SUFFIX.get(place.suffix)
        return {name: Part(place, 0, place.stat().st_size)} if name else {}
    find = in_folder(place)
    found = {name: part for name in names if (part := find(name)) is not None}
    return found if any(name.endswith(_CORE) for name in found) else {}


def write_tokenizer(files: TokenizerFiles, folder: Path) -> None:
    """Put the files into an existing folder."""
    for name, part in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(part.read())


def _sentencepiece(files: TokenizerFiles) -> Any:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ValueError(
            f"{files[SENTENCEPIECE].path} is a SentencePiece model, and the package sentencepiece "
            "is not installed; install it, or set vocab_size"
        ) from error
    return SentencePieceProcessor(model_proto=files[SENTENCEPIECE].read())


def vocabulary_size(files: TokenizerFiles) -> int | None:
    """Highest token id + 1; None when there is no tokenizer."""
    if TOKENIZER_JSON in files:
        return max(tokens_by_id(files[TOKENIZER_JSON].read())) + 1
    if SENTENCEPIECE in files:
        return int(_sentencepiece(files).get_piece_size())
    if _VOCAB_JSON in files:
        return int(max(json_value(files[_VOCAB_JSON].read()).values())) + 1
    return None


def special_ids(files: TokenizerFiles) -> dict[str, int]:
    """``bos_token_id`` and ``eos_token_id``, as far as the tokenizer has them."""
    if TOKENIZER_JSON in files and TOKENIZER_CONFIG in files:
        config = json_value(files[TOKENIZER_CONFIG].read())
        ids = {token: index for index, token in tokens_by_id(files[TOKENIZER_JSON].read()).items()}
        return {
            f"{name}_token_id": ids[token]
            for name in ("bos", "eos")
            if (token := _content(config.get(f"{name}_token"))) in ids
        }
    if SENTENCEPIECE in files:
        model = _sentencepiece(files)
        found = {"bos_token_id": model.bos_id(), "eos_token_id": model.eos_id()}
        return {name: index for name, index in found.items() if index >= 0}
    return {}


def _content(token: object) -> object:
    """A special token of tokenizer_config.json, which may be a dictionary that describes it."""
    return token.get("content") if isinstance(token, dict) else token
