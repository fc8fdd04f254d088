"""The samples that a stage reads of SFT records.

Records are split as documents of text are: in the order that ``data.seed`` draws, by
``data.split``.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nemo_minitron.config.training import DataConfig
from nemo_minitron.data.cache import build_for_all
from nemo_minitron.data.packing import (
    FilledParts,
    Records,
    RecordSamples,
    Rows,
    WholeParts,
    whole_rows,
)
from nemo_minitron.data.shuffle import document_order
from nemo_minitron.data.splits import SPLITS, check_documents, samples_taken, split_bounds

logger = logging.getLogger(__name__)


def _opened(folder: Path) -> Records:
    ends = np.load(folder / "ends.npy", mmap_mode="r")
    ids = np.memmap(folder / "ids.bin", np.int32, mode="r")
    return Records(ids, np.memmap(folder / "answer.bin", bool, mode="r"), ends)


def _order(data: DataConfig, count: int, split: str) -> np.ndarray:
    """Return the records of a split, in the order of ``data.seed``."""
    begin, end = split_bounds(data.split, count)[SPLITS.index(split)]
    return document_order(count, data.seed)[begin:end]


def _rows(data: DataConfig, folder: Path, records: Records, split: str) -> Rows:
    """Return the samples of a split, kept on disk; every rank calls this."""
    key = json.dumps([str(folder), data.seq_length, data.seed, data.split, split, data.pack])
    made = folder.parent / f"rows-{hashlib.sha256(key.encode()).hexdigest()[:24]}"

    def write(into: Path) -> None:
        order = _order(data, len(records.ends), split)
        rows = whole_rows(records.positions(), order, data.seq_length, pack=data.pack)
        for name, values in rows._asdict().items():
            np.save(into / f"{name}.npy", values)
        room = len(rows.ends) * data.seq_length
        filled = 100 * records.positions()[order].sum() / max(room, 1)
        logger.info(
            "%s split: %d records in %d samples, %.1f %% filled",
            split,
            len(order),
            len(rows.ends),
            filled,
        )

    build_for_all(made, write)
    return Rows(*(np.load(made / f"{name}.npy", mmap_mode="r") for name in Rows._fields))


def training_samples(
    data: DataConfig, folder: Path, pad: int, sizes: Sequence[int]
) -> tuple[RecordSamples | None, ...]:
    """Return samples of train, validation and test; every rank calls this.

    Args:
        data: the data keys.
        folder: what ``build_sft`` gave.
        pad: likewise.
        sizes: of each split; 0 leaves it out. Train repeats its records as needed, every pass in
            another order; the others have at most that many samples, none twice.
    """
    records = _opened(folder)
    wanted = [split for split, size in zip(SPLITS, sizes, strict=True) if size]
    check_documents(data, len(records.ends), wanted)
    found: list[RecordSamples | None] = []
    for split, size in zip(SPLITS, sizes, strict=True):
        if not size:
            found.append(None)
            continue
        rows, train = _rows(data, folder, records, split), split == SPLITS[0]
        parts = WholeParts(records, rows, data.seed if train else None)
        size = size if train else min(size, len(rows.ends))
        found.append(_samples(data, records, parts, pad, size))
    return tuple(found)


def records_held(data: DataConfig, folder: Path, split: str) -> int:
    """Return samples of one pass over a split; every rank calls this."""
    return len(_rows(data, folder, _opened(folder), split).ends)


def _samples(
    data: DataConfig, records: Records, parts: WholeParts | FilledParts, pad: int, size: int
) -> RecordSamples:
    shared = data.pack
    return RecordSamples(
        records, parts, seq_length=data.seq_length, pad=pad, size=size, shared=shared
    )


def stage_samples(data: DataConfig, folder: Path, pad: int, *, filled: bool) -> RecordSamples:
    """Return samples that calibration or evaluation reads, each once; every rank calls this.

    Args:
        data: the data keys.
        folder: what ``build_sft`` gave.
        pad: likewise.
        filled: whether samples have no padding; records are then cut where a sample ends.

    Raises:
        ValueError: there are fewer than ``data.num_samples``, or none.
    """
    records, split = _opened(folder), data.split_name
    check_documents(data, len(records.ends), None)
    parts: WholeParts | FilledParts
    if filled:
        parts = FilledParts(records, _order(data, len(records.ends), split), data.seq_length)
        held = len(parts)
    else:
        parts = WholeParts(records, _rows(data, folder, records, split), None)
        held = len(parts.rows.ends)
    if not held:
        raise ValueError(
            f"the {split} split of data.path={data.path} has fewer tokens than one sample of "
            f"data.seq_length={data.seq_length}; lower data.seq_length, or add records"
        )
    return _samples(data, records, parts, pad, samples_taken(data, held))
