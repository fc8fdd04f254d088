"""The tokenizer of a model as ``AutoTokenizer`` of transformers reads its folder.

Besides tokenizer.json, the class named in tokenizer_config.json, its switches, the tokens of three
more files and the architecture in config.json decide which ids a text gets. So import reads the
folder once with ``AutoTokenizer`` and keeps what came out in ``as_read/``, as one tokenizer.json
that needs no other file. Training data, prompts and tasks use that one; exports get the untouched
files. No code of a model runs: tokenizers that are Python files are refused.
"""

import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nemo_minitron.checkpoint.inside import inside
from nemo_minitron.checkpoint.tokenizer import (
    AS_READ,
    AUTO_MAP,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    names_in,
)
from nemo_minitron.documents import JsonObject, read_json_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

_WAY_OUT = (
    "import again with tokenizer= set to a folder that AutoTokenizer opens to a fast tokenizer, or "
    "set data.path to .npy token ids or a Megatron .bin/.idx prefix"
)


def keep_as_read(folder: Path, config: JsonObject) -> None:
    """Read the tokenizer files in ``folder`` and keep the result in ``as_read/`` inside it.

    What cannot be read is named in a warning: a model is of use without its tokenizer.

    Args:
        folder: the tokenizer's files, untouched.
        config: the model's config.json, whose architecture decides too.
    """
    try:
        tokenizer = _read(folder, config)
    except ValueError as error:
        logger.warning("%s. Stages that read or write text will refuse this model", error)
        return
    tokenizer.init_kwargs.pop("fast_tokenizer_files", None)  # there will be one file
    tokenizer.save_pretrained(str(folder / AS_READ))
    if not _is_kept(folder, tokenizer):
        shutil.rmtree(folder / AS_READ)  # every stage then reads the files anew


def _is_kept(folder: Path, tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Whether what was stored gives the ids of the tokenizer."""
    try:
        stored = _stored(folder)
    except ValueError:
        return False
    same = stored.all_special_ids == tokenizer.all_special_ids
    return same and ids_of(stored) == ids_of(tokenizer)


def ids_of(tokenizer: "PreTrainedTokenizerFast") -> tuple[str, bool]:
    """Return all that decides which ids a text gets."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend.to_str(), bool(tokenizer.split_special_tokens)


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """Return the tokenizer of a result, as ``AutoTokenizer`` read it when the model was imported.

    Args:
        folder: ``checkpoint/tokenizer`` of a result. Those of earlier versions have no
            ``as_read/``; their files are read now.

    Raises:
        ValueError: no usable tokenizer is there; the message names what is.
    """
    if has_as_read(folder):
        return _stored(folder)
    return _read(folder, _config_beside(folder))


def has_as_read(folder: Path) -> bool:
    """Whether import kept the tokenizer as it was read."""
    return (folder / AS_READ / TOKENIZER_JSON).is_file()


def _stored(folder: Path) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    try:
        found = PreTrainedTokenizerFast.from_pretrained(
            str(folder / AS_READ), local_files_only=True
        )
    except Exception as error:  # of tokenizers, which has no class of its own for it
        raise ValueError(
            f"{folder / AS_READ} cannot be read ({error}); import the model again"
        ) from error
    return cast("PreTrainedTokenizerFast", found)


def _config_beside(folder: Path) -> JsonObject:
    """Return the config.json of the model whose tokenizer it is, as an export would have it."""
    from nemo_minitron.config.model import MODEL_YAML, ModelConfig
    from nemo_minitron.families.registry import family_of

    if not (folder.parent / MODEL_YAML).is_file():
        return {}
    config = ModelConfig.load(folder.parent)
    return family_of(config).to_hf(config)


def _read(folder: Path, config: JsonObject) -> "PreTrainedTokenizerFast":
    """Load the files with ``AutoTokenizer``, with the model's config.json beside them.

    Raises:
        ValueError: the files are missing, are not those of a fast tokenizer, or need code.
    """
    names = names_in(folder)
    if not names:
        raise ValueError(
            f"{folder} holds no tokenizer.json and no other tokenizer: the model was imported "
            f"without a tokenizer; {_WAY_OUT}"
        )
    what = f"the tokenizer files {', '.join(names)} of {folder}"
    if AUTO_MAP in _tokenizer_config(folder):
        return _without_code(folder, names, config, what)
    return _opened(folder, names, config, what)


def _tokenizer_config(folder: Path) -> JsonObject:
    path = folder / TOKENIZER_CONFIG
    return read_json_object(path) if path.is_file() else {}


def _without_code(
    folder: Path, names: list[str], config: JsonObject, what: str
) -> "PreTrainedTokenizerFast":
    """Return a tokenizer whose config names Python files, if transformers reads it without them.

    ``auto_map`` may be stale: the class is one of transformers by now. It is not where transformers
    reads the folder only with the files, or otherwise than an export, which has none of them.
    """
    found = _opened(folder, names, config, what)
    dropped = {key: v for key, v in _tokenizer_config(folder).items() if key != AUTO_MAP}
    if ids_of(found) != ids_of(_opened(folder, names, config, what, dropped)):
        raise ValueError(
            f"{what}: {TOKENIZER_CONFIG} names Python files (auto_map), without which transformers "
            f"gives other ids; take auto_map out of it, or {_WAY_OUT}"
        )
    return found


def _opened(
    folder: Path,
    names: list[str],
    config: JsonObject,
    what: str,
    tokenizer_config: JsonObject | None = None,
) -> "PreTrainedTokenizerFast":
    """``AutoTokenizer`` on a folder of links to the files, with config.json and no Python file."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="minitron-") as scratch:
        for name in names:
            link = Path(scratch, name)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(inside(folder, name).resolve())
        plain = {key: value for key, value in config.items() if key != AUTO_MAP}
        Path(scratch, "config.json").write_text(json.dumps(plain))
        if tokenizer_config is not None:
            Path(scratch, TOKENIZER_CONFIG).unlink()
            Path(scratch, TOKENIZER_CONFIG).write_text(json.dumps(tokenizer_config))
        _check_names(Path(scratch))
        try:
            found = AutoTokenizer.from_pretrained(
                scratch, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # each class of transformers raises what it likes
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"{what} cannot be opened by AutoTokenizer without code of the model "
                f"({first.replace(scratch, str(folder))}); {_WAY_OUT}"
            ) from error
    if not found.is_fast:
        raise ValueError(f"{what} are not a fast tokenizer ({type(found).__name__}); {_WAY_OUT}")
    return cast("PreTrainedTokenizerFast", found)


def _check_names(folder: Path) -> None:
    """Refuse names of files that lie elsewhere."""
    named = _tokenizer_config(folder).get("fast_tokenizer_files")
    outside = [name for name in named or [] if Path(str(name)).name != name]
    if outside:
        raise ValueError(
            f"{TOKENIZER_CONFIG}: fast_tokenizer_files names {outside[0]!r}, which is no file "
            "beside it; take it out"
        )


def stop_ids(
    folder: Path, tokenizer: "PreTrainedTokenizerFast", in_config: int | list[int] | None
) -> frozenset[int]:
    """Return tokens that end a text, as in transformers.

    They are those of generation_config.json, without that file those of config.json, and in either
    case the tokenizer's own.

    Args:
        folder: ``checkpoint/tokenizer`` of a result, with the generation_config.json of the source.
        tokenizer: the one that was loaded from it.
        in_config: ``eos_token_id`` of the model's config.json.

    Raises:
        ValueError: no end token is named, or what is named is not a token id.
    """
    named: Any = in_config
    file, where = folder / "generation_config.json", "config.json"
    if file.is_file():
        named, where = read_json_object(file).get("eos_token_id"), str(file)
    listed = {*(named if isinstance(named, list) else [named])} - {None}
    if not all(type(index) is int and index >= 0 for index in listed):
        raise ValueError(f"eos_token_id={named} of {where} must be a token id or a list of them")
    found = listed | ({tokenizer.eos_token_id} - {None})
    if not found:
        raise ValueError(
            f"the tokenizer in {folder} names no end-of-sequence token (eos_token), and the "
            "model's configs have no eos_token_id; set one and import the model again"
        )
    return frozenset(found)


def continuation(
    tokenizer: "PreTrainedTokenizerFast", prompt: list[int], new: list[int], stops: frozenset[int]
) -> str:
    """Return the text of new tokens, decoded after their prompt: some tokenizers join words so.

    Args:
        tokenizer: of the model.
        prompt: token ids that the model read.
        new: token ids that it wrote.
        stops: tokens that end a text (``stop_ids``); the last new token is left out if it is one.
    """
    written = new[:-1] if new and new[-1] in stops else new
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *written], skip_special_tokens=True)
    if whole.startswith(before):
        return str(whole[len(before) :])
    return str(tokenizer.decode(written, skip_special_tokens=True))
