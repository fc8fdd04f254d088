"""Files of a tokenizer: found, copied or built from a GGUF file, and asked for what they say."""

import json
import logging
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from nemo_minitron.checkpoint.hf_refusals import refuse_pointer
from nemo_minitron.checkpoint.inside import inside
from nemo_minitron.checkpoint.parts import Part, in_folder
from nemo_minitron.documents import JsonObject, json_value

logger = logging.getLogger(__name__)

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SENTENCEPIECE = "tokenizer.model"
AUTO_MAP = "auto_map"
"""Key of a config that names classes in Python files beside it."""
AS_READ = "as_read"
"""Folder in the tokenizer's of a result; see ``tokenizer_read``."""
_PATTERNS = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "tokenizer.model.*",
    "*.tiktoken",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
_NOT_AS_MEANT = (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError)
"""What values of other types than a file should have, and SentencePiece, raise."""
TokenizerFiles = dict[str, Part]
"""Name as in a Hugging Face folder -> where its bytes are."""
_VOCAB_JSON = "vocab.json"
# One of them makes a tokenizer; the others go with it.
_CORE = (TOKENIZER_JSON, _VOCAB_JSON, "vocab.txt", "tekken.json", ".model", ".tiktoken")
_BY_SUFFIX = {".json": TOKENIZER_JSON, ".model": SENTENCEPIECE}
# Kinds of tokens in tokenizer.ggml.token_type
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(use_regex: bool = True) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


# tokenizer.ggml.pre -> how text is cut before byte-pair merging
_PRE_TOKENIZERS: dict[str, list[Any]] = {
    "default": [_byte_level()],
    "gpt-2": [_byte_level()],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), _byte_level()],
    "llama-bpe": [pre_tokenizers.Split(Regex(_LLAMA3), "isolated"), _byte_level(use_regex=False)],
}


def names_in(folder: Path) -> list[str]:
    """Return names of the tokenizer's files in a Hugging Face folder, chat templates included."""
    found = {path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder).as_posix() for path in found)


def check_same_tokens(one: Path, other: Path) -> None:
    """Refuse a student and a teacher whose tokenizers give the same id to different tokens.

    Args:
        one: tokenizer folder of the student.
        other: that of the teacher. Nothing is compared when a folder has no tokenizer.json.

    Raises:
        ValueError: names an id and its two tokens.
    """
    files = [tokenizer_json(folder) for folder in (one, other)]
    if not all(file.is_file() for file in files):
        return
    parts = [Part(file, 0, file.stat().st_size) for file in files]
    if parts[0].read() == parts[1].read():
        return
    ours, theirs = map(tokens_by_id, parts)
    different = sorted(index for index in ours if ours[index] != theirs.get(index, ours[index]))
    if different:
        index = different[0]
        raise ValueError(
            f"student and teacher have different vocabularies: {len(different)} ids stand for "
            f"other tokens, such as {index}: {ours[index]!r} and {theirs[index]!r}; set student "
            "and teacher to models of one tokenizer"
        )


def tokenizer_json(folder: Path) -> Path:
    """The tokenizer.json that says which ids a text gets: as it was read at import, if kept."""
    kept = folder / AS_READ / TOKENIZER_JSON
    return kept if kept.is_file() else folder / TOKENIZER_JSON


def tokens_by_id(file: Part) -> dict[int, str]:
    """Return the id -> token of a tokenizer.json.

    Raises:
        ValueError: it is damaged, or something else.
    """
    try:
        values = json_value(file.read())
        vocab = values["model"].get("vocab", {})
        if isinstance(vocab, list):  # Unigram: pairs of token and score, in the order of the ids
            vocab = {pair[0]: index for index, pair in enumerate(vocab)}
        added = {token["content"]: token["id"] for token in values.get("added_tokens", [])}
        return {int(index): token for token, index in {**vocab, **added}.items()}
    except _NOT_AS_MEANT as error:
        raise ValueError(f"{file.path} is damaged, or not a tokenizer: {error!r}") from error


_WAY_OUT = (
    "set tokenizer to a folder with the tokenizer.json or tokenizer.model of this model, or source "
    "to its Hugging Face folder"
)


def _check_kind(path: Path, get: Callable[..., Any]) -> None:
    """Refuse tokenizers that are no byte-level BPE, or cut text by rules not known here."""
    kind, pre = get("tokenizer.ggml.model", None), get("tokenizer.ggml.pre", "default")
    if kind != "gpt2":
        raise ValueError(
            f"{path}: tokenizer.ggml.model={kind} is not supported; supported: gpt2 (byte-level "
            f"BPE); {_WAY_OUT}"
        )
    if not isinstance(pre, str) or pre not in _PRE_TOKENIZERS:
        raise ValueError(
            f"{path}: tokenizer.ggml.pre={pre} is not supported; supported: "
            f"{sorted(_PRE_TOKENIZERS)}; {_WAY_OUT}"
        )


def _added_tokens(tokens: list[str], kinds: list[int]) -> list[AddedToken]:
    return [
        AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]


def _template(tokens: dict[str, tuple[str, int]], bos: bool, eos: bool) -> Any:
    """Return a post-processor that adds beginning- and end-of-text tokens."""
    pieces = [name for name, wanted in (("bos", bos), ("A", True), ("eos", eos)) if wanted]
    single = " ".join("$A" if piece == "A" else tokens[piece][0] for piece in pieces)
    pair = single + " " + single.replace("$A", "$B:1")
    used = [tokens[name] for name, wanted in (("bos", bos), ("eos", eos)) if wanted]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=used)


def gguf_tokenizer(path: Path) -> tuple[Tokenizer, JsonObject]:
    """Return tokenizer and tokenizer_config.json of a GGUF file.

    Raises:
        ValueError: not byte-level BPE, cut by rules not known here, or damaged.
    """
    from nemo_minitron.checkpoint.gguf import fields_of

    get = fields_of(path)
    _check_kind(path, get)
    try:
        return _build_from_gguf(get)
    except Exception as error:  # of tokenizers, which has no class of its own for it
        raise ValueError(
            f"{path}: the tokenizer (tokenizer.ggml) is damaged: {error}; {_WAY_OUT}"
        ) from error


def _build_from_gguf(get: Callable[..., Any]) -> tuple[Tokenizer, JsonObject]:
    from nemo_minitron.checkpoint.gguf import special_token

    tokens, pre = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.pre", "default")
    merges = [tuple(merge.split(" ", 1)) for merge in get("tokenizer.ggml.merges")]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_PRE_TOKENIZERS[pre])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(_added_tokens(tokens, get("tokenizer.ggml.token_type")))
    special: dict[str, tuple[str, int]] = {}
    for name in ("bos", "eos", "unk", "pad"):
        index = special_token(get, name, len(tokens))
        if index is not None:
            special[name] = (tokens[index], index)
    # As llama.cpp has it: Llama 3 begins every text with this token unless the file says otherwise.
    bos = get("tokenizer.ggml.add_bos_token", pre == "llama-bpe") and "bos" in special
    eos = get("tokenizer.ggml.add_eos_token", False) and "eos" in special
    if bos or eos:
        tokenizer.post_processor = _template(special, bos, eos)
    config: JsonObject = {
        # Not LlamaTokenizer: transformers would rebuild the cutting rules of Llama 2.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        # transformers 4.x would add token_type_ids, which no Llama takes
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": get("llama.context_length"),
        "add_bos_token": bos,
        "add_eos_token": eos,
        **{f"{name}_token": token for name, (token, _) in special.items()},
    }
    template = get("tokenizer.chat_template", None)
    return tokenizer, config if template is None else {**config, "chat_template": template}


def save_tokenizer(source: Path, folder: Path) -> list[str]:
    """Put the tokenizer of a model into ``folder``.

    Args:
        source: Hugging Face folder (files are copied) or .gguf file (the tokenizer is built).
        folder: existing folder.

    Returns:
        Names of the files written; empty when a Hugging Face folder has no tokenizer.

    Raises:
        ValueError: the GGUF tokenizer is of a kind that cannot be rebuilt.
    """
    if source.is_dir():
        names = names_in(source)
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(inside(source, name), folder / name)
        return names
    tokenizer, config = gguf_tokenizer(source)
    tokenizer.save(str(folder / TOKENIZER_JSON))
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / TOKENIZER_CONFIG).write_text(text, encoding="utf-8")
    return [TOKENIZER_JSON, TOKENIZER_CONFIG]


def tokenizer_files(place: Path) -> TokenizerFiles:
    """Return files of the tokenizer that a folder holds or a file is; empty without a tokenizer.

    Raises:
        ValueError: one of them is kept elsewhere by Git LFS.
    """
    names = names_in(place) if place.is_dir() else []
    for path in (place, *(place / name for name in names)):
        refuse_pointer(path)
    if place.is_file():
        own = place.name in _CORE or place.suffix == ".tiktoken"
        name = place.name if own else _BY_SUFFIX.get(place.suffix)
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
    try:
        return SentencePieceProcessor(model_proto=files[SENTENCEPIECE].read())
    except _NOT_AS_MEANT as error:
        raise ValueError(f"{files[SENTENCEPIECE].path} is damaged: {error}") from error


def vocabulary_size(files: TokenizerFiles) -> int | None:
    """Return the highest token id + 1, added tokens too; None where no file says it.

    Raises:
        ValueError: a file is damaged, or something else.
    """
    if TOKENIZER_JSON in files:
        size = max(tokens_by_id(files[TOKENIZER_JSON]), default=-1) + 1
    elif SENTENCEPIECE in files:
        size = int(_sentencepiece(files).get_piece_size())
    elif _VOCAB_JSON in files:
        size = _end(files, _VOCAB_JSON, lambda values: values.values())
    else:
        return None
    added = _end(files, "added_tokens.json", lambda values: values.values())
    named = _end(files, TOKENIZER_CONFIG, lambda values: values.get("added_tokens_decoder", {}))
    return max(size, added, named)


def _end(files: TokenizerFiles, name: str, ids: Callable[[Any], Iterable[Any]]) -> int:
    """Return the highest id in a JSON file + 1; 0 without any."""
    if name not in files:
        return 0
    try:
        return max(map(int, ids(json_value(files[name].read()))), default=-1) + 1
    except _NOT_AS_MEANT as error:
        raise ValueError(f"{files[name].path} is damaged: {error!r}") from error


def special_ids(files: TokenizerFiles) -> dict[str, int]:
    """Return ``bos_token_id`` and ``eos_token_id``, as far as the tokenizer has them."""
    if TOKENIZER_JSON in files and TOKENIZER_CONFIG in files:
        config = json_value(files[TOKENIZER_CONFIG].read())
        ids = {token: index for index, token in tokens_by_id(files[TOKENIZER_JSON]).items()}
        tokens = {name: _content(config.get(f"{name}_token")) for name in ("bos", "eos")}
        return {f"{name}_token_id": ids[token] for name, token in tokens.items() if token in ids}
    if SENTENCEPIECE in files:
        model = _sentencepiece(files)
        found = {"bos_token_id": model.bos_id(), "eos_token_id": model.eos_id()}
        return {name: index for name, index in found.items() if index >= 0}
    return {}


def _content(token: object) -> str:
    """A special token of tokenizer_config.json, which may be a dictionary that describes it."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else ""
