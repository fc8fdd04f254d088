"""Samples of one length out of ``data.path``, through Megatron's ``GPTDataset``.

Every sample is ``tokens``, ``labels`` (the next token), ``loss_mask`` and ``position_ids``, each
``[seq_length]``. Index ``None`` gives a sample whose loss mask is all 0, Megatron's filler for an
incomplete last batch.
"""

import copy
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.training import DataConfig, TrainerConfig
from nemo_minitron.config.training_stages import TeacherPassConfig
from nemo_minitron.data.cache import build_for_all, cache_folder
from nemo_minitron.data.checks import check_index, check_npy, scan_ids
from nemo_minitron.data.indexed import TextTokenizer, build_indexed
from nemo_minitron.data.pair import read_index
from nemo_minitron.data.splits import (
    SPLITS,
    check_num_samples,
    check_tokens,
    split_bounds,
    split_numbers,
)
from nemo_minitron.data.text import INDEXED, NPY, Source, find_source
from nemo_minitron.runtime.extensions import before_megatron

if TYPE_CHECKING:
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

logger = logging.getLogger(__name__)

Sample = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TokenData:
    """Tokens on disk, checked: a Megatron pair or a ``.npy``."""

    kind: str
    """``indexed`` or ``npy``."""
    path: Path
    """Prefix of the pair, or the ``.npy`` file."""
    cache: Path
    """Folder for Megatron's sample indices."""


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
    tokenizer = TextTokenizer(tokenizer_dir)
    prefix = build_indexed(source, data, tokenizer, vocab_size, cache.absolute())
    check_tokens(data, read_index(prefix).lengths, splits)
    return TokenData(INDEXED, prefix, prefix.parent)


def _identity(source: Source) -> str:
    """Key of a pair that is too large to hash: path, size and times of both files."""
    stats = [(file.absolute(), file.stat()) for file in source.files]
    status = [(str(f), s.st_size, s.st_mtime_ns, s.st_ctime_ns) for f, s in stats]
    return hashlib.sha256(str(status).encode()).hexdigest()[:24]


def build_datasets(
    data: DataConfig, tokens: TokenData, sizes: tuple[int, int, int]
) -> tuple["SampleSet | None", ...]:
    """Datasets of a training stage; every rank calls this.

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
    wanted: list[int | None] = [sizes[0], None, None]
    built = _megatron_datasets(data, tokens, wanted, [size > 0 for size in sizes])
    return tuple(
        None if dataset is None else FirstSamples(dataset, min(size, len(dataset)))
        for dataset, size in zip(built, sizes, strict=True)
    )


def build_split(data: DataConfig, tokens: TokenData) -> "SampleSet":
    """The samples a calibration or evaluation stage reads: each once, in a fixed order.

    Every rank calls this.

    They are the first ``data.num_samples`` samples (null: all) of split ``data.split_name`` in
    Megatron's shuffled order for ``data.seed``, or the first rows of a ``.npy``, which is not
    split.

    Raises:
        ValueError: there are fewer than ``data.num_samples``.
    """
    if tokens.kind == NPY:
        rows = np.load(tokens.path, mmap_mode="r")
        return NpyDataset(rows, data.num_samples or len(rows))
    chosen = [name == data.split_name for name in SPLITS]
    built = _megatron_datasets(data, tokens, [None, None, None], chosen)
    dataset = built[SPLITS.index(data.split_name)]
    check_num_samples(data, len(dataset))
    return FirstSamples(dataset, data.num_samples or len(dataset))


def training_datasets(
    data: DataConfig,
    trainer: TrainerConfig | TeacherPassConfig,
    model: ModelConfig,
    checkpoint: Path,
    output_dir: str,
    splits: tuple[str, ...],
) -> "tuple[SampleSet, SampleSet | None]":
    """Train samples for every step and the validation samples (None without validation)."""
    tokens = _tokens(data, model, checkpoint, output_dir, splits)
    sizes = (
        trainer.max_steps * data.global_batch_size,
        trainer.limit_val_batches * data.global_batch_size,
        0,
    )
    train, validation, _ = build_datasets(data, tokens, sizes)
    assert train is not None  # max_steps is at least 1
    return train, validation


def stage_dataset(
    data: DataConfig, model: ModelConfig, checkpoint: Path, output_dir: str
) -> "SampleSet":
    """The samples of ``data.split_name`` that calibration and evaluation read."""
    return build_split(data, _tokens(data, model, checkpoint, output_dir, None))


def _tokens(
    data: DataConfig,
    model: ModelConfig,
    checkpoint: Path,
    output_dir: str,
    splits: tuple[str, ...] | None,
) -> TokenData:
    tokenizer = checkpoint / "tokenizer"
    return prepare_tokens(
        data,
        vocab_size=model.vocab_size,
        cache=cache_folder(data, output_dir),
        tokenizer_dir=tokenizer if tokenizer.is_dir() else None,
        splits=splits,
    )


class FirstSamples(Dataset[Sample]):
    """The first ``size`` samples of a dataset.

    Unlike ``torch.utils.data.Subset`` it passes the index None on, which stands for a filler.
    """

    def __init__(self, dataset: Dataset[Sample], size: int) -> None:
        """Wrap a dataset of at least ``size`` samples."""
        self.dataset, self.size = dataset, size

    def __len__(self) -> int:
        """Samples."""
        return self.size

    def __getitem__(self, index: int | None) -> Sample:
        """Return sample ``index``, or for None a filler whose loss mask is all 0."""
        return self.dataset[index]


class NpyDataset(Dataset[Sample]):
    """Rows of token ids, taken as they are: sample ``i`` is row ``i % rows``.

    The label of a position is the next token of the row; the last position has none, so its loss
    mask is 0.
    """

    def __init__(self, ids: np.ndarray, size: int) -> None:
        """Wrap an array.

        Args:
            ids: integers ``[rows, seq_length]``, possibly memory-mapped.
            size: samples.
        """
        self.ids = ids
        self.size = size

    def __len__(self) -> int:
        """Samples."""
        return self.size

    def __getitem__(self, index: int | None) -> Sample:
        """Return sample ``index``, or for None a filler whose loss mask is all 0."""
        tokens = torch.from_numpy(self.ids[(index or 0) % len(self.ids)].astype(np.int64))
        labels = torch.zeros_like(tokens)
        labels[:-1] = tokens[1:]
        loss_mask = torch.full(tokens.shape, 0.0 if index is None else 1.0)
        loss_mask[-1] = 0.0
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": loss_mask,
            "position_ids": torch.arange(len(tokens)),
        }


SampleSet = FirstSamples | NpyDataset
"""The samples of one split that a stage reads."""


@dataclass(frozen=True)
class _Tokenizer:
    """The little that ``GPTDataset`` asks of a tokenizer once tokens are on disk.

    It has no ``pad``: samples are never padded, and Megatron then masks no real token.
    """

    eod: int | None = None  # read only with the reset flags or eod_mask_loss, which are off
    vocab_size: int | None = None
    unique_identifiers: dict[str, str] = field(default_factory=lambda: {"class": "none"})


def _megatron_datasets(
    data: DataConfig, tokens: TokenData, sizes: list[int | None], chosen: list[bool]
) -> list[Any]:
    """GPTDatasets of the chosen splits, None for the others.

    Args:
        data: the data keys.
        tokens: a pair.
        sizes: samples of each split at least; None is one pass over its documents.
        chosen: which of the three splits to build.
    """
    before_megatron()
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset

    config = _gpt_config(data, tokens, chosen)
    key = json.dumps([str(tokens.path), data.seq_length, data.seed, config.split_matrix, sizes])
    folder = tokens.cache / f"samples-{hashlib.sha256(key.encode()).hexdigest()[:24]}"

    def write_indices(into: Path) -> None:
        # Megatron writes its index files in place; here they appear all at once or not at all.
        writing = copy.copy(config)
        writing.path_to_cache = str(into)
        builder = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, writing)
        builder._build_megatron_dataset_splits(
            str(tokens.path), writing.split_matrix, sizes, synchronize_ranks=False
        )

    build_for_all(folder, write_indices)
    config.path_to_cache = str(folder)
    built = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    sequences = next(len(dataset.dataset) for dataset in built if dataset is not None)
    for dataset, bounds in zip(built, split_bounds(data.split, sequences), strict=True):
        assert dataset is None or (dataset.indices[0], dataset.indices[-1] + 1) == bounds
    return list(built)


def _gpt_config(data: DataConfig, tokens: TokenData, chosen: list[bool]) -> "GPTDatasetConfig":
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=data.seed,
        sequence_length=data.seq_length,
        blend=([str(tokens.path)], None),
        split=",".join(split_numbers(data.split)),
        path_to_cache=str(tokens.cache),
        tokenizer=_Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    matrix = config.split_matrix or []
    config.split_matrix = [
        part if keep else None for part, keep in zip(matrix, chosen, strict=True)
    ]
    return config
