"""Checks of ``data.*`` that need neither Megatron nor a model: all user input, within seconds."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nemo_minitron.config.blend import naming
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.training import DataConfig
from nemo_minitron.data.indexed import TextTokenizer, check_ids, check_text
from nemo_minitron.data.pair import Index, read_index
from nemo_minitron.data.sft import check_first, check_sft, holds_sft, parts_of
from nemo_minitron.data.splits import (
    check_num_samples,
    check_shares,
    check_tokens,
    parse_split,
    split_bounds,
    split_samples,
    wanted_splits,
)
from nemo_minitron.data.text import (
    INDEXED,
    NPY,
    Source,
    find_source,
    no_documents,
    read_documents,
    warn_unread,
)
from nemo_minitron.documents import read_json_object

# Text up to these sizes is read, and tokenised, twice: about a second each on one core.
_READ_UP_TO = 64 << 20
_TOKENISE_UP_TO = 4 << 20
_SCAN = "ids.json"
# Documents of a pair whose last ids are compared, and how many make an end of a document likely.
_ENDS = 1000
_FEWEST_ENDS = 8


def check_data(
    data: DataConfig,
    *,
    splits: Sequence[str] | None = None,
    vocab_size: int | None = None,
    tokenizer_dir: Path | None = None,
    max_seq_length: int | None = None,
    train_samples: int | None = None,
) -> None:
    """Refuse bad data fast; what takes longer is refused by ``datasets.prepare_tokens``.

    Found here: a missing path, an unknown form, unreadable or empty files, records without text,
    an impossible split, a ``.npy`` of the wrong shape, dtype or ids, a damaged ``.bin/.idx`` pair,
    and too little data; text above 4 MB has its tokens counted when it is tokenised.

    Args:
        data: the data keys.
        splits: splits a training stage reads; None for a stage that reads ``data.split_name``.
        vocab_size: true vocabulary of the model, to check the ids of a ``.npy``.
        tokenizer_dir: the checkpoint's tokenizer, to count the tokens of text.
        max_seq_length: longest sequence the model has positions for, or None for any length.
        train_samples: samples that training takes, to check the shares of a blend.

    Raises:
        ValueError: the message names the key to change and how.
    """
    if max_seq_length is not None and data.seq_length > max_seq_length:
        raise ValueError(
            f"data.seq_length={data.seq_length} is longer than {max_seq_length}, where the "
            "positions of the model end: its max_position_embeddings, or a sliding_window above "
            "them, without which it may be imported from a copy of config.json; lower "
            "data.seq_length"
        )
    parse_split(data.split)
    wanted_splits(data, splits)
    if not data.blend:
        _check_source(data, splits, vocab_size, tokenizer_dir)
        return
    _check_changes(data, None if splits is None else train_samples)
    if splits is None and data.num_samples is None:
        raise ValueError(
            "data.blend needs data.num_samples where each sample is read once: there are no shares "
            "of all there is; set data.num_samples"
        )
    held = []
    for index, source in enumerate(parts_of(data)):
        with naming(index):
            lengths = _check_source(source, splits, vocab_size, tokenizer_dir)
            name = "train" if splits else data.split_name
            held.append(None if lengths is None else split_samples(source, lengths, name))
            _check_origin(source, vocab_size, tokenizer_dir)
    wanted = train_samples if splits else data.num_samples
    if wanted is not None:
        check_shares(data, held, wanted, repeats=bool(splits))


def _check_changes(data: DataConfig, train_samples: int | None) -> None:
    """Refuse changes of weights in a stage without steps, or behind its last step."""
    if not data.blend_changes:
        return
    if train_samples is None:
        raise ValueError(
            f"data.blend_changes={data.blend_changes} names steps of a training, and this stage "
            "has none; leave it out"
        )
    steps, last = train_samples // data.global_batch_size, data.blend_changes[-1]["step"]
    if last >= steps:
        raise ValueError(
            f"data.blend_changes has weights from step {last} on, and training ends at trainer."
            f"max_steps={steps}; leave them out"
        )


def _check_source(
    data: DataConfig,
    splits: Sequence[str] | None,
    vocab_size: int | None,
    tokenizer_dir: Path | None,
) -> np.ndarray | None:
    """``check_data`` of one source; returns the tokens of its documents where they are counted."""
    source = find_source(data.path)
    warn_unread(source)
    if source.kind == NPY:
        check_npy(source.path, data, vocab_size, splits)
        return None
    if holds_sft(source, data):
        _check_sft(source, data, splits, tokenizer_dir)
        return None
    if source.kind == INDEXED:
        return check_index(source, data, splits)
    tokenizer = None if tokenizer_dir is None else TextTokenizer(tokenizer_dir)
    if source.size <= _READ_UP_TO:
        small = source.size <= _TOKENISE_UP_TO
        return check_text(source, data, splits, tokenizer if small else None)
    if next(read_documents(source, data), None) is None:
        raise no_documents(source)
    return None


def _check_sft(
    source: Source, data: DataConfig, splits: Sequence[str] | None, tokenizer_dir: Path | None
) -> None:
    if source.size > _READ_UP_TO:
        check_first(source)
        return
    small = source.size <= _TOKENISE_UP_TO
    check_sft(source, data, splits, tokenizer_dir if small else None)


def _check_origin(data: DataConfig, vocab_size: int | None, tokenizer_dir: Path | None) -> None:
    """Refuse a pair of a blend that another tokenizer made, as far as its ids show it."""
    source = find_source(data.path)
    if source.kind != INDEXED:
        return
    index = read_index(source.path)
    ids = np.memmap(f"{source.path}.bin", dtype=index.dtype, mode="r")
    if vocab_size is not None and source.size <= _READ_UP_TO:
        check_ids(int(ids.max()), vocab_size, f"data.path={source.path} holds", int(ids.min()))
    ends = np.cumsum(index.lengths, dtype=np.int64)[index.documents[1:_ENDS] - 1] - 1
    last = set(ids[ends].tolist())
    if (
        tokenizer_dir is None
        or not tokenizer_dir.is_dir()
        or len(ends) < _FEWEST_ENDS
        or len(last) != 1
    ):
        return
    tokenizer, (end,) = TextTokenizer(tokenizer_dir), last
    word = tokenizer.text(end)
    if end != tokenizer.eod and any(map(str.isalnum, word)):
        raise ValueError(
            f"data.path={source.path} ends every document with id {end}, which is {word!r} to the "
            f"tokenizer of this checkpoint, whose end of a document is {tokenizer.eod}: another "
            "tokenizer made it; write the .bin/.idx pair again from its text"
        )


def check_batch_sizes(data: DataConfig, data_parallel_size: int) -> None:
    """Refuse a global batch that micro-batches cannot fill evenly over the model replicas.

    Raises:
        ValueError: names the three sizes.
    """
    step = data.micro_batch_size * data_parallel_size
    if data.global_batch_size % step:
        raise ValueError(
            f"data.global_batch_size={data.global_batch_size} must be a multiple of "
            f"data.micro_batch_size={data.micro_batch_size} x data-parallel size "
            f"{data_parallel_size}; set data.global_batch_size to a multiple of {step}"
            f"{_replicas(data)}"
        )


def _replicas(data: DataConfig) -> str:
    """Return the other way out: numbers of replicas that share the micro-batches evenly."""
    count, rest = divmod(data.global_batch_size, data.micro_batch_size)
    if rest:
        return ""
    fit = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
    return f", or run it on a data-parallel size that divides its {count} micro-batches: {fit}"


def check_batches(
    data: DataConfig, parallel: ParallelConfig, world_size: int, group: int | None = None
) -> None:
    """Refuse sequences and batches that the layout cannot cut.

    Args:
        data: sizes of sequences and batches.
        parallel: the layout.
        world_size: ranks in all.
        group: micro-batches that a virtual stage runs in a row; None is one for each stage.

    Raises:
        ValueError: names the sizes, the degrees and the key to change.
    """
    dp = world_size // parallel.model_parallel_size
    check_batch_sizes(data, dp)
    check_sequence(data, parallel)
    pp, step = parallel.pipeline_model_parallel_size, data.micro_batch_size * dp
    count = data.global_batch_size // step
    if parallel.virtual_pipeline_model_parallel_size and count % pp:
        raise ValueError(
            f"data.global_batch_size={data.global_batch_size} makes {count} micro-batches per "
            f"model replica; virtual pipeline stages need a multiple of parallel."
            f"pipeline_model_parallel_size={pp}: set data.global_batch_size to a multiple of "
            f"{step * pp}"
        )
    if group is not None and (not pp <= group <= count or 0 < count % group < pp):
        raise ValueError(
            f"megatron.transformer.microbatch_group_size_per_vp_stage={group} must be between "
            f"parallel.pipeline_model_parallel_size={pp} and the {count} micro-batches per model "
            f"replica (data.global_batch_size={data.global_batch_size}), and leave no rest below "
            f"{pp}; set it to {pp}, or leave it out"
        )


def check_sequence(data: DataConfig, parallel: ParallelConfig) -> None:
    """Refuse sequences that the layout cannot cut.

    Raises:
        ValueError: names the length, the degrees and the key to change.
    """
    cp, sp = parallel.context_parallel_size, parallel.sequence_parallel
    parts = parallel.sequence_multiple
    if data.seq_length % parts:
        raise ValueError(
            f"data.seq_length={data.seq_length} must be a multiple of {parts} at parallel."
            f"context_parallel_size={cp} and parallel.sequence_parallel={str(sp).lower()}; set "
            "data.seq_length to one"
        )


def check_npy(
    path: Path, data: DataConfig, vocab_size: int | None, splits: Sequence[str] | None
) -> None:
    """Refuse a ``.npy`` that is not integer ids ``[samples, data.seq_length]`` of the vocabulary.

    Raises:
        ValueError: says what the file holds and which key to change.
    """
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # its header is read as Python source, which fails in many ways
        raise ValueError(f"data.path={path} is not a readable .npy file ({error})") from error
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"data.path={path} holds {ids.dtype}, not integer token ids; save integers"
        )
    if ids.ndim != 2 or len(ids) == 0:
        raise ValueError(
            f"data.path={path} has shape {list(ids.shape)}; it must be [samples, data.seq_length] "
            "with at least one sample"
        )
    if ids.shape[1] != data.seq_length:
        raise ValueError(
            f"data.path={path} holds rows of {ids.shape[1]} tokens but data.seq_length="
            f"{data.seq_length}; set data.seq_length={ids.shape[1]}"
        )
    if vocab_size is not None:
        _check_rows(ids, vocab_size, path)
    if splits is None:
        check_num_samples(data, len(ids))


def _check_rows(ids: np.ndarray, vocab_size: int, path: Path) -> None:
    """Refuse ids outside the vocabulary; a million at a time are in memory."""
    step = max(1, (1 << 20) // ids.shape[1])
    for start in range(0, len(ids), step):
        part = ids[start : start + step]
        outside = (part < 0) | (part >= vocab_size)
        if outside.any():
            row = int(outside.any(axis=1).argmax())
            bad = int(part[row][outside[row]][0])
            check_ids(bad, vocab_size, f"data.path={path}, row {start + row} holds", bad)


def check_index(
    source: Source,
    data: DataConfig,
    splits: Sequence[str] | None,
    *,
    vocab_size: int | None = None,
    scan: Path | None = None,
) -> np.ndarray:
    """Refuse a ``.bin/.idx`` pair that is damaged, too short, or split inside a document.

    Args:
        source: a source of kind ``indexed``.
        data: the data keys.
        splits: as ``splits.wanted_splits`` takes them.
        vocab_size: true vocabulary, compared with the ids found by ``scan_ids``.
        scan: folder that ``scan_ids`` filled.

    Returns:
        Tokens of each sequence.

    Raises:
        ValueError: says what is wrong and the way out.
    """
    index = read_index(source.path)
    if len(index.lengths) == 0:
        raise ValueError(f"data.path={source.path} holds no documents")
    check_tokens(data, index.lengths, splits)
    _check_cuts(source, data, index)
    if vocab_size is not None and scan is not None:
        found = read_json_object(scan / _SCAN)
        check_ids(found["max"], vocab_size, f"data.path={source.path} holds", found["min"])
    return index.lengths


def _check_cuts(source: Source, data: DataConfig, index: Index) -> None:
    """Megatron splits by sequence; a document of several sequences must stay on one side."""
    for begin, end in split_bounds(data.split, len(index.lengths)):
        if begin < end and end not in index.documents:
            raise ValueError(
                f"data.split={data.split} cuts data.path={source.path} at sequence {end}, inside a "
                "document; write the pair with one sequence per document, or change data.split"
            )


def scan_ids(prefix: Path, folder: Path) -> None:
    """Read every id of a pair once and note the smallest and largest in ``folder``."""
    ids = np.memmap(f"{prefix}.bin", dtype=read_index(prefix).dtype, mode="r")
    found = {"min": int(ids.min()), "max": int(ids.max())}
    (folder / _SCAN).write_text(json.dumps(found))
