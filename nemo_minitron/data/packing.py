"""Which parts of which records make up each sample, and the samples themselves.

A record is never cut where an answer is learnt: each goes whole into a sample that has room for it.
Calibration has no use for padding, so there records follow one another and are cut where a sample
ends. The order of records is that of ``data.seed``; the layout of the ranks does not enter.
Samples have ``documents`` (the number of its record at each position) where records share them.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from nemo_minitron.data.samples import Sample


class Records(NamedTuple):
    """Tokenised records, one after another; arrays may be memory-mapped."""

    ids: np.ndarray
    """int32 ``[tokens]``."""
    answer: np.ndarray
    """bool ``[tokens]``: true for the tokens that are learnt."""
    ends: np.ndarray
    """int64 ``[records]``: one past the last token of each."""

    def bounds(self, record: int) -> tuple[int, int]:
        """Return the first token of a record, and one past its last."""
        return int(self.ends[record - 1]) if record else 0, int(self.ends[record])

    def positions(self) -> np.ndarray:
        """int64 ``[records]``: positions of each; its last token is only a label."""
        return np.diff(self.ends, prepend=0) - 1


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Put things into rows: each, in turn, into the fullest one that has room for it.

    Args:
        lengths: of the things, none above ``room``.
        room: of a row.

    Returns:
        Indices of the things of each row.
    """
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []  # room and number of the rows that are not full, sorted
    for index, length in enumerate(lengths):
        at = bisect_left(left, (length, 0))
        free, row = left.pop(at) if at < len(left) else (room, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        if free > length:
            insort(left, (free - length, row))
    return rows


class Rows(NamedTuple):
    """Records of each sample of one pass, int64."""

    records: np.ndarray
    """Records of all samples, one sample after another."""
    ends: np.ndarray
    """``[samples]``: one past the last record of each."""


def whole_rows(lengths: np.ndarray, order: np.ndarray, room: int, *, pack: bool) -> Rows:
    """Return samples of whole records.

    Args:
        lengths: positions of every record.
        order: the records of a split, in their order.
        room: positions of a sample.
        pack: whether records share samples.
    """
    if not pack:
        return Rows(order, np.arange(1, len(order) + 1))
    rows = best_fit(lengths[order].tolist(), room)
    found = np.array([index for row in rows for index in row], np.int64)
    return Rows(order[found], np.cumsum([len(row) for row in rows]))


Parts = Callable[[int], Iterator[tuple[int, int]]]
"""Number of a sample -> first position and one past the last one of each part that it has, counted
in the tokens of all records."""


class RecordSamples(Dataset[Sample]):
    """Samples made of parts of records."""

    def __init__(
        self,
        records: Records,
        parts: Parts,
        *,
        seq_length: int,
        pad: int,
        size: int,
        shared: bool,
    ) -> None:
        """Take the records and what each sample has of them.

        Args:
            records: tokenised.
            parts: ``WholeParts`` or ``FilledParts``.
            seq_length: positions of a sample.
            pad: token that stands where a sample has no record.
            size: samples in all.
            shared: whether several records may share a sample; alone in one, a record needs no
                boundaries.
        """
        self.records, self.parts, self.size = records, parts, size
        self.seq_length, self.pad, self.shared = seq_length, pad, shared

    def __len__(self) -> int:
        """Return the number of samples."""
        return self.size

    def __getitem__(self, index: int | None) -> Sample:
        """Return sample ``index``, or for None a filler whose loss mask is all 0."""
        size = self.seq_length
        tokens, labels = np.full((2, size), self.pad, np.int64)
        mask, positions, documents = np.zeros((3, size), np.int64)
        at = number = 0
        for begin, end in self.parts(index or 0):
            here = slice(at, at + end - begin)
            tokens[here] = self.records.ids[begin:end]
            labels[here] = self.records.ids[begin + 1 : end + 1]
            mask[here] = self.records.answer[begin + 1 : end + 1]
            positions[here] = np.arange(end - begin)
            documents[here] = number
            at, number = here.stop, number + 1
        sample = {"tokens": tokens, "labels": labels}
        if self.shared:
            positions[at:], documents[at:] = np.arange(size - at), number
            sample |= {"position_ids": positions, "documents": documents}
        else:
            sample["position_ids"] = np.arange(size)
        found = {name: torch.from_numpy(values) for name, values in sample.items()}
        return {**found, "loss_mask": torch.from_numpy(mask).float() * (index is not None)}


class WholeParts:
    """Whole records; what is left of a sample is padding. Passes follow one another."""

    def __init__(self, records: Records, rows: Rows, seed: int | None) -> None:
        """Take the records of each sample.

        Args:
            records: tokenised.
            rows: of one pass.
            seed: of the order of samples in each pass; None leaves the order as it is.
        """
        self.records, self.rows, self.seed = records, rows, seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def _row(self, index: int) -> int:
        passes, place = divmod(index, len(self.rows.ends))
        if self.seed is None:
            return place
        if self._order[0] != passes:
            draw = np.random.default_rng([self.seed, passes])
            self._order = passes, draw.permutation(len(self.rows.ends))
        return int(self._order[1][place])

    def __call__(self, index: int) -> Iterator[tuple[int, int]]:
        """Return all positions of each record of a sample."""
        row = self._row(index)
        begin = int(self.rows.ends[row - 1]) if row else 0
        for record in self.rows.records[begin : int(self.rows.ends[row])]:
            first, end = self.records.bounds(int(record))
            yield first, end - 1


class FilledParts:
    """Records one after another, cut where a sample ends: no padding."""

    def __init__(self, records: Records, order: np.ndarray, seq_length: int) -> None:
        """Take the records of a split in their order; the rest of the last sample is left out.

        Args:
            records: tokenised.
            order: the records of a split.
            seq_length: positions of a sample.
        """
        self.records, self.order, self.seq_length = records, order, seq_length
        self.ends = np.cumsum(records.positions()[order])

    def __len__(self) -> int:
        """Return the number of samples."""
        return int(self.ends[-1]) // self.seq_length if len(self.ends) else 0

    def __call__(self, index: int) -> Iterator[tuple[int, int]]:
        """Return the range of tokens that a sample takes from each of its records."""
        at, stop = index * self.seq_length, (index + 1) * self.seq_length
        place = int(np.searchsorted(self.ends, at, side="right"))
        while at < stop:
            first, end = self.records.bounds(int(self.order[place]))
            begins = int(self.ends[place]) - (end - 1 - first)  # of the record, among all
            reach = min(int(self.ends[place]), stop)
            yield first + at - begins, first + reach - begins
            at, place = reach, place + 1
