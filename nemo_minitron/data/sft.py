"""SFT records -> tokens on disk, in a cache folder named by what went into it."""

import hashlib
import json
import logging
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_minitron.checkpoint.tokenizer_read import ids_of, load_tokenizer
from nemo_minitron.config.blend import naming
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.training import DataConfig
from nemo_minitron.data.cache import build_for_all
from nemo_minitron.data.chat import Encoded, check_record, encode, is_sft, read_keys
from nemo_minitron.data.formats import TABLES, form_of, keys_of, records_of
from nemo_minitron.data.indexed import (
    HASH_CONTENT_UP_TO,
    check_ids,
    file_identity,
)
from nemo_minitron.data.splits import check_documents
from nemo_minitron.data.text import TEXT, Source, find_source, no_documents, refuse_npy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

_FORMAT = 2  # part of every cache key: raise it when the content of a cache folder changes
_KEPT, _CUT, _DROPPED, _REPEATS = "without their beginning", "cut", "dropped", "repeats"


def holds_sft(source: Source, data: DataConfig) -> bool:
    """Whether the records of a source are for supervised fine-tuning.

    Args:
        source: of any kind.
        data: ``records`` says so; ``auto`` looks at the first record, where a text under
            ``text_key`` comes before all else.

    Raises:
        ValueError: keys of SFT are set for what has no such records.
    """
    found = data.records == "sft"
    if data.records == "auto" and source.kind == TEXT:
        file = next((file for file in source.files if file.stat().st_size), source.files[0])
        keys = keys_of(file)
        found = data.text_key not in keys and is_sft(keys)
    plain = next((file for file in source.files if form_of(file) in (None, ".txt")), None)
    if found and (source.kind != TEXT or plain is not None):
        raise ValueError(
            f"data.records=sft needs records of JSON, Parquet or Arrow; data.path={data.path} is "
            f"{plain or source.path}; set data.records=text"
        )
    if not found and (not data.pack or data.record_too_long != "refuse"):
        raise ValueError(
            f"data.pack={str(data.pack).lower()} and data.record_too_long={data.record_too_long} "
            f"are for SFT records, and data.path={data.path} holds none; leave them out, or set "
            "data.records=sft"
        )
    return found


def check_packing(data: DataConfig, *models: ModelConfig, padded: bool = True) -> None:
    """Refuse SFT records in samples that a model, or a stage, cannot take.

    Args:
        data: the data keys.
        models: sizes of those that read the samples.
        padded: whether the stage can tell padding from records.

    Raises:
        ValueError: names the key and why.
    """
    if data.blend:
        for index, source in enumerate(parts_of(data)):
            with naming(index):
                check_packing(source, *models, padded=padded)
        return
    if not holds_sft(find_source(data.path), data):
        return
    for states in filter(None, (_states(model) for model in models)):
        if data.pack:
            raise ValueError(
                f"data.pack=true is not supported for {states} would go on from one record to the "
                "next; set data.pack=false"
            )
    if data.pack and any(model.mtp_num_layers for model in models):
        raise ValueError(
            "data.pack=true is not supported for training a model with a layer for multi-token "
            "prediction: it would predict from one record into the next; set data.pack=false"
        )
    if not data.pack and not padded:
        raise ValueError(
            f"data.pack=false pads every record of data.path={data.path}, and scores would count "
            "the padding; set data.pack=true"
        )


def packs(data: DataConfig) -> bool:
    """Whether samples hold several SFT records, whose borders the model has to know."""
    parts = parts_of(data) if data.blend else [data]
    return any(part.pack and holds_sft(find_source(part.path), part) for part in parts)


def _states(model: ModelConfig) -> str:
    """Which layers of a model keep a state, for a message; empty where none do."""
    if model.hybrid_layer_pattern is not None:
        return "hybrid models: the state of a Mamba layer"
    linear = model.linear_attention_freq is not None
    return "models with linear attention: the state of a gated delta net" if linear else ""


def parts_of(data: DataConfig) -> list[DataConfig]:
    """Return the keys of each source of a blend: those for SFT records count where it holds some.

    Raises:
        ValueError: a source holds samples as they are; or keys for SFT records are set, and no
            source holds any.
    """
    parts = []
    for index, source in enumerate(data.sources()):
        with naming(index):
            parts.append(_as_part(source))
    if data.pack and data.record_too_long == "refuse":
        return parts
    if not any(holds_sft(find_source(part.path), part) for part in parts):
        raise ValueError(
            f"data.pack={str(data.pack).lower()} and data.record_too_long={data.record_too_long} "
            "are for SFT records, and no source of data.blend holds any; leave them out"
        )
    return parts


def _as_part(data: DataConfig) -> DataConfig:
    source, plain = find_source(data.path), replace(data, pack=True, record_too_long="refuse")
    refuse_npy(source)
    return data if holds_sft(source, plain) else plain


def _encoded(
    source: Source, tokenizer: "PreTrainedTokenizerFast | None"
) -> Iterator[tuple[str, Encoded]]:
    """Yield the place of each record and its tokens; without a tokenizer there are no tokens."""
    for file in source.files:
        if not file.stat().st_size:
            continue
        table = form_of(file) in TABLES
        for where, record in records_of(file, read_keys(keys_of(file))):
            checked = check_record(_as_written(record) if table else record, where)
            empty = Encoded(np.empty(0, np.int32), np.empty(0, bool))
            yield where, encode(checked, tokenizer, where) if tokenizer else empty


def _as_written(record: object) -> object:
    """Return a row of a table without the names that the table added to its values.

    Arrow gives every structure of a column the keys of all of them, and null where a row had none:
    the arguments of one tool's call would have the names of all tools' arguments. A null that was
    meant goes too, and keys are in the order of the table.
    """
    if not isinstance(record, dict):
        return record
    return {key: _without_nulls(value) for key, value in record.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _fitted(one: Encoded, data: DataConfig, where: str, counts: Counter[str]) -> Encoded | None:
    """Return a record that fits a sample, or None where it is left out."""
    room, kind = data.seq_length + 1, data.record_too_long  # the last token is only a label
    if not one.answer[1:].any():
        raise ValueError(f"{where}: no token of the record is part of an answer")
    if len(one.ids) <= room:
        return one
    if kind == "refuse":
        raise ValueError(
            f"{where}: the record has {len(one.ids)} tokens, {int(one.answer.sum())} of them of "
            f"answers, and data.seq_length={data.seq_length} has room for {room}; raise "
            "data.seq_length, or set data.record_too_long to keep (leave out its beginning), cut "
            "(its end) or drop"
        )
    part = slice(-room, None) if kind == "keep" else slice(room)
    cut = Encoded(one.ids[part], one.answer[part])
    if kind == "drop" or not cut.answer[1:].any():
        counts[_DROPPED] += 1
        return None
    counts[_KEPT if kind == "keep" else _CUT] += 1
    return cut


def _fitting(
    source: Source,
    data: DataConfig,
    tokenizer: "PreTrainedTokenizerFast",
    vocab_size: int | None,
    counts: Counter[str],
) -> Iterator[Encoded]:
    """The records that are used, without exact repeats, which could land in two splits."""
    seen: set[bytes] = set()
    for where, found in _encoded(source, tokenizer):
        one = _fitted(found, data, where, counts)
        if one is None:
            continue
        digest = hashlib.blake2b(one.ids.tobytes() + one.answer.tobytes(), digest_size=16).digest()
        if digest in seen:
            counts[_REPEATS] += 1
            continue
        seen.add(digest)
        if vocab_size is not None:
            check_ids(int(one.ids.max()), vocab_size, f"{where}: the tokenizer gives")
        yield one


def check_sft(
    source: Source, data: DataConfig, splits: Sequence[str] | None, tokenizer_dir: Path | None
) -> None:
    """Read the records whole and refuse what is broken or too short.

    Args:
        source: small enough to be read now.
        data: the data keys.
        splits: as ``splits.wanted_splits`` takes them.
        tokenizer_dir: tokenises the records; None only reads them.

    Raises:
        ValueError: names the file and the line.
    """
    if tokenizer_dir is None:
        number = sum(1 for _ in _encoded(source, None))
    else:
        number = sum(1 for _ in _fitting(source, data, opened(tokenizer_dir), None, Counter()))
    if not number:
        raise no_documents(source)
    check_documents(data, number, splits)


def check_first(source: Source) -> None:
    """Refuse a source whose first record is broken, or that has no records."""
    if next(_encoded(source, None), None) is None:
        raise no_documents(source)


def opened(folder: Path) -> "PreTrainedTokenizerFast":
    """Return the tokenizer of a checkpoint."""
    tokenizer = load_tokenizer(folder)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def build_sft(
    source: Source, data: DataConfig, folder: Path, vocab_size: int, cache: Path
) -> tuple[Path, int]:
    """Tokenise the records, or find what was made before; every rank calls this.

    Args:
        source: with SFT records.
        data: the data keys.
        folder: of the tokenizer.
        vocab_size: true vocabulary of the model.
        cache: folder shared by all ranks and runs.

    Returns:
        The folder of tokens, and the token of padding.
    """
    tokenizer = opened(folder)
    whole = source.size <= HASH_CONTENT_UP_TO
    parts = {
        "format": _FORMAT,
        "files": [file_identity(file, whole) for file in source.files],
        "tokenizer": ids_of(tokenizer),
        "template": tokenizer.chat_template,
        "special": tokenizer.special_tokens_map,
        "seq_length": data.seq_length,
        "too_long": data.record_too_long,
        "vocab_size": vocab_size,
    }
    key = json.dumps(parts, default=str, sort_keys=True)
    made = cache / f"sft-{hashlib.sha256(key.encode()).hexdigest()[:24]}"
    build_for_all(made, lambda into: _write(into, source, data, tokenizer, vocab_size))
    return made, int(tokenizer.eos_token_id or 0)


def _write(
    folder: Path,
    source: Source,
    data: DataConfig,
    tokenizer: "PreTrainedTokenizerFast",
    vocab_size: int,
) -> None:
    counts: Counter[str] = Counter()
    lengths, answers = array("q"), 0
    with (folder / "ids.bin").open("wb") as ids, (folder / "answer.bin").open("wb") as answer:
        for one in _fitting(source, data, tokenizer, vocab_size, counts):
            ids.write(one.ids.tobytes())
            answer.write(one.answer.tobytes())
            lengths.append(len(one.ids))
            answers += int(one.answer.sum())
    if not lengths:
        raise no_documents(source)
    np.save(folder / "ends.npy", np.cumsum(np.array(lengths, np.int64)))
    logger.info(
        "%s: %d SFT records, %d tokens, %d of them of answers",
        source.path,
        len(lengths),
        sum(lengths),
        answers,
    )
    for what, count in counts.items():
        logger.warning(
            "%s: %d records %s%s",
            source.path,
            count,
            what,
            " left out" if what == _REPEATS else f" (data.record_too_long={data.record_too_long})",
        )
