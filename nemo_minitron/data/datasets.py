"""Samples of one length out of ``data.path``, through Megatron's ``GPTDataset``.

Every sample is ``tokens``, ``labels`` (the next token), ``loss_mask`` and ``position_ids``, each
``[seq_length]``. Index ``None`` gives a sample whose loss mask is all 0, Megatron's filler for an
incomplete last batch.
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemo_minitron.config.blend import naming
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.training import DataConfig, TrainerConfig
from nemo_minitron.config.training_stages import TeacherPassConfig
from nemo_minitron.data.blend import (
    BlendedSamples,
    Order,
    alike,
    blend_order,
    part_sizes,
    stored_order,
)
from nemo_minitron.data.cache import build_for_all, cache_folder
from nemo_minitron.data.checks import check_index, check_npy, scan_ids
from nemo_minitron.data.gpt import TokenData, megatron_datasets
from nemo_minitron.data.indexed import TextTokenizer, build_indexed
from nemo_minitron.data.packing import RecordSamples
from nemo_minitron.data.pair import read_index
from nemo_minitron.data.samples import FirstSamples, NpyDataset
from nemo_minitron.data.sft import build_sft, holds_sft, parts_of
from nemo_minitron.data.sft_samples import records_held, stage_samples, training_samples
from nemo_minitron.data.splits import (
    SPLITS,
    check_shares,
    check_tokens,
    samples_taken,
    split_samples,
)
from nemo_minitron.data.text import INDEXED, NPY, SFT, Source, find_source

logger = logging.getLogger(__name__)
_Source = tuple[DataConfig, TokenData]


def prepare_tokens(
    data: DataConfig,
    *,
    vocab_size: int,
    cache: Path,
    tokenizer_dir: Path | None = None,
    splits: Sequence[str] | None = None,
) -> TokenData:
    """Tokenise what needs it, once, and check that it suffices; every rank calls this.

    Args:
        data: the data keys.
        vocab_size: true vocabulary of the model; every token id must lie below it.
        cache: folder shared by all ranks and runs (``cache.cache_folder``).
        tokenizer_dir: the checkpoint's tokenizer; needed for text alone.
        splits: splits a training stage reads; None for a stage that reads ``data.split_name``.

    Raises:
        ValueError: bad, missing or too little data.
    """
    source = find_source(data.path)
    if source.kind == NPY:
        check_npy(source.path, data, vocab_size, splits)
        return TokenData(NPY, source.path, cache)
    if source.kind == INDEXED:
        check_index(source, data, splits)
        folder = cache / f"indexed-{_identity(source)}"
        build_for_all(folder, lambda into: scan_ids(source.path, into))
        check_index(source, data, splits, vocab_size=vocab_size, scan=folder)
        return TokenData(INDEXED, source.path.absolute(), folder)
    if tokenizer_dir is None:
        raise ValueError(
            f"data.path={data.path} is text but the checkpoint has no tokenizer; set data.path to "
            "a .bin/.idx prefix or a .npy of token ids"
        )
    if holds_sft(source, data):
        built = build_sft(source, data, tokenizer_dir, vocab_size, cache.absolute())
        return TokenData(SFT, built[0], cache, built[1])
    tokenizer = TextTokenizer(tokenizer_dir)
    prefix = build_indexed(source, data, tokenizer, vocab_size, cache.absolute())
    check_tokens(data, read_index(prefix).lengths, splits)
    return TokenData(INDEXED, prefix, prefix.parent)


def _identity(source: Source) -> str:
    """Return the key of a pair that is too large to hash: path, size and times of both files."""
    stats = [(file.absolute(), file.stat()) for file in source.files]
    status = [(str(f), s.st_size, s.st_mtime_ns, s.st_ctime_ns) for f, s in stats]
    return hashlib.sha256(str(status).encode()).hexdigest()[:24]


def build_datasets(
    data: DataConfig, tokens: TokenData, sizes: tuple[int, int, int]
) -> tuple["SampleSet | None", ...]:
    """Return datasets of a training stage; every rank calls this.

    Args:
        data: the data keys.
        tokens: what :func:`prepare_tokens` gave for the same keys.
        sizes: samples of train, validation and test; 0 leaves a split out. Train has exactly
            that many, over as many epochs as it takes; the others have at most that many, always
            the same ones and none twice.

    Returns:
        Train, validation and test; None for those left out. A ``.npy`` is never split: it trains
        row by row in order, around again when it ends, and has no validation or test.
    """
    if tokens.kind == NPY:
        if sizes[1] or sizes[2]:
            logger.warning("%s is a .npy, which is not split: no validation", tokens.path)
        return (
            NpyDataset(np.load(tokens.path, mmap_mode="r"), sizes[0]) if sizes[0] else None,
            None,
            None,
        )
    if tokens.kind == SFT:
        return training_samples(data, tokens.path, tokens.pad, sizes)
    wanted: list[int | None] = [sizes[0], None, None]
    built = megatron_datasets(data, tokens, wanted, [size > 0 for size in sizes])
    return tuple(
        None if dataset is None else FirstSamples(dataset, min(size, len(dataset)))
        for dataset, size in zip(built, sizes, strict=True)
    )


def build_split(data: DataConfig, tokens: TokenData, *, filled: bool = False) -> "SampleSet":
    """Return the samples a calibration or evaluation stage reads: each once, in a fixed order.

    Every rank calls this.

    They are the first ``data.num_samples`` samples (null: all) of split ``data.split_name`` in
    Megatron's shuffled order for ``data.seed``, or the first rows of a ``.npy``, which is not
    split.

    Args:
        data: the data keys.
        tokens: what :func:`prepare_tokens` gave for the same keys.
        filled: whether samples of SFT records have no padding; others never have any.

    Raises:
        ValueError: there are fewer than ``data.num_samples``.
    """
    if tokens.kind == SFT:
        return stage_samples(data, tokens.path, tokens.pad, filled=filled)
    if tokens.kind == NPY:
        rows = np.load(tokens.path, mmap_mode="r")
        return NpyDataset(rows, samples_taken(data, len(rows)))
    chosen = [name == data.split_name for name in SPLITS]
    built = megatron_datasets(data, tokens, [None, None, None], chosen)
    dataset = built[SPLITS.index(data.split_name)]
    return FirstSamples(dataset, samples_taken(data, len(dataset)))


def training_datasets(
    data: DataConfig,
    trainer: TrainerConfig | TeacherPassConfig,
    model: ModelConfig,
    checkpoint: Path,
    output_dir: str,
    splits: tuple[str, ...],
) -> "tuple[SampleSet, SampleSet | None]":
    """Train samples for every step and the validation samples (None without validation)."""
    sources = _sources(data, model, checkpoint, output_dir, splits)
    sizes = (
        trainer.max_steps * data.global_batch_size,
        trainer.limit_val_batches * data.global_batch_size,
        0,
    )
    if data.blend:
        return _blended_training(data, sources, sizes, cache_folder(data, output_dir))
    train, validation, _ = build_datasets(*sources[0], sizes)
    assert train is not None  # max_steps is at least 1
    return train, validation


def _blended_training(
    data: DataConfig, sources: list[_Source], sizes: tuple[int, int, int], cache: Path
) -> tuple[BlendedSamples, BlendedSamples | None]:
    """Blend sources as Megatron does: each has as many epochs as its share of the training needs.

    So it is with ``data.blend_changes``, too: what was read before them stays the same. Validation
    reads one epoch of each source at most.
    """
    weights = data.weights()
    held = _samples_held(sources, SPLITS[0])
    check_shares(data, held, sizes[0], repeats=True)
    parts = [
        _training_part(*source, size, sizes)
        for source, size in zip(sources, part_sizes(weights, sizes[0]), strict=True)
    ]
    order = stored_order(cache, data.weights_by_samples(sizes[0]))
    train = BlendedSamples(alike([part[0] for part in parts]), order, data.names(), held)
    train.log()
    if not sizes[1]:
        return train, None
    held_out = alike([part[1] for part in parts])
    once = _read_once(blend_order(weights, sizes[1]), list(map(len, held_out)))
    if len(once.source) < sizes[1]:
        logger.warning(
            "data.blend: validation reads %d samples, not %d: more would repeat those of a source",
            len(once.source),
            sizes[1],
        )
    return train, BlendedSamples(held_out, once, data.names(), list(map(len, held_out)))


def _training_part(
    source: DataConfig, pair: TokenData, size: int, sizes: tuple[int, int, int]
) -> Sequence[Any]:
    """Train and validation samples of one source of a blend.

    Megatron's are whole passes whatever ``size`` is. Those of SFT records are as many as the whole
    training has: one that takes more than its first weight asked for goes on with the next.
    """
    if pair.kind == SFT:
        return training_samples(source, pair.path, pair.pad, sizes)
    return megatron_datasets(source, pair, [size, None, None], [True, sizes[1] > 0, False])


def _samples_held(sources: list[_Source], split: str) -> list[int]:
    """Return the samples of one epoch of each source."""
    return [
        records_held(source, pair.path, split)
        if pair.kind == SFT
        else split_samples(source, read_index(pair.path).lengths, split)
        for source, pair in sources
    ]


def _read_once(order: Order, sizes: list[int]) -> Order:
    """Return the samples before the first one that some source would have to repeat."""
    over = np.flatnonzero(order.sample >= np.array(sizes)[order.source])
    end = int(over[0]) if len(over) else len(order.source)
    return Order(order.source[:end], order.sample[:end])


def stage_dataset(
    data: DataConfig,
    model: ModelConfig,
    checkpoint: Path,
    output_dir: str,
    *,
    filled: bool = False,
) -> "SampleSet":
    """Return the samples of ``data.split_name`` that calibration and evaluation read.

    ``filled`` is that of :func:`build_split`.
    """
    sources = _sources(data, model, checkpoint, output_dir, None)
    if not data.blend:
        return build_split(*sources[0], filled=filled)
    wanted = data.num_samples or 0  # which a blend needs
    held = _samples_held(sources, data.split_name)
    check_shares(data, held, wanted, repeats=False)
    parts = alike([build_split(*source, filled=filled) for source in sources])
    order = blend_order(data.weights(), wanted)
    once = _read_once(order, list(map(len, parts)))
    if len(once.source) < wanted:
        raise ValueError(
            f"data.num_samples={wanted} is more than the {len(once.source)} samples before the end "
            f"of data.blend.{order.source[len(once.source)]}, and none is read twice; lower "
            "data.num_samples"
        )
    return BlendedSamples(parts, once, data.names(), held)


def _sources(
    data: DataConfig,
    model: ModelConfig,
    checkpoint: Path,
    output_dir: str,
    splits: tuple[str, ...] | None,
) -> list[_Source]:
    """``data.path``, or every source of ``data.blend``: its keys and its tokens."""
    tokenizer = checkpoint / "tokenizer"

    def prepared(source: DataConfig) -> TokenData:
        return prepare_tokens(
            source,
            vocab_size=model.vocab_size,
            cache=cache_folder(data, output_dir),
            tokenizer_dir=tokenizer if tokenizer.is_dir() else None,
            splits=splits,
        )

    if not data.blend:
        return [(data, prepared(data))]
    found = []
    for index, source in enumerate(parts_of(data)):
        with naming(index):
            found.append((source, prepared(source)))
    return found


SampleSet = FirstSamples | NpyDataset | BlendedSamples | RecordSamples
"""The samples of one split that a stage reads."""
