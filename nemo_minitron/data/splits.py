"""Which documents belong to train, validation and test, and whether they are enough.

The arithmetic is Megatron's own (contiguous runs of documents, ``round(share * count)``), repeated
here in numpy so that bad splits are found before Megatron, which takes seconds, is imported.
"""

import itertools
import logging
import math
import re
from collections.abc import Sequence

import numpy as np

from nemo_minitron.config.training import CALIBRATION_SAMPLES, DataConfig
from nemo_minitron.runtime.ranks import rank

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
_SEARCH_UP_TO = 10_000


def parse_split(split: str) -> tuple[float, float, float]:
    """Shares of the three splits, summing to 1.

    Args:
        split: up to three numbers separated by ``,``, ``/``, ``:`` or blanks; missing ones are 0.

    Raises:
        ValueError: not numbers, negative, more than three, or all zero.
    """
    vector = np.array([float(part) for part in split_numbers(split)])
    train, validation, test = (vector / vector.sum()).tolist()
    return train, validation, test


def split_numbers(split: str) -> list[str]:
    """Return the three numbers of ``data.split`` as written; see :func:`parse_split`."""
    parts = re.split(r"[,/:\s]+", split.strip())
    number = re.compile(r"\d+(\.\d*)?|\.\d+")
    if len(parts) > 3 or not all(map(number.fullmatch, parts)) or not any(map(float, parts)):
        raise ValueError(
            f"data.split='{split}' must be up to three shares for train, validation and test, none "
            "negative and not all 0, such as data.split=90/5/5"
        )
    return parts + ["0"] * (3 - len(parts))


def split_bounds(split: str, count: int) -> list[tuple[int, int]]:
    """First and one-past-last document of each split, as Megatron's dataset builder cuts them.

    Args:
        split: ``data.split``.
        count: documents in all (sequences of the indexed dataset).
    """
    edges = [0.0]
    for share in parse_split(split):
        edges.append(edges[-1] + share)
    cuts = [round(edge * float(count)) for edge in edges]
    return list(itertools.pairwise(cuts))


def wanted_splits(data: DataConfig, splits: Sequence[str] | None) -> tuple[str, ...]:
    """Return names of the splits a stage reads.

    Args:
        data: the data keys.
        splits: those a training stage reads; None for a stage that reads ``data.split_name`` once
            (calibration, evaluation), the only one ``data.num_samples`` speaks to.

    Raises:
        ValueError: ``data.num_samples`` is set for a training stage.
    """
    if splits is None:
        return (data.split_name,)
    if data.num_samples is not None:
        raise ValueError(
            f"data.num_samples={data.num_samples} does not apply to training, which reads "
            "trainer.max_steps x data.global_batch_size samples; set data.num_samples=null"
        )
    return tuple(splits)


def check_documents(data: DataConfig, count: int, splits: Sequence[str] | None) -> None:
    """Refuse a split that gets no document.

    Args:
        data: the data keys.
        count: documents in all.
        splits: as :func:`wanted_splits` takes them.

    Raises:
        ValueError: names the split, how many documents it takes, and the ways out.
    """
    for name in wanted_splits(data, splits):
        position = SPLITS.index(name)
        if parse_split(data.split)[position] == 0:
            raise ValueError(
                f"data.split={data.split} gives the {name} split no share; change data.split "
                "(such as data.split=80/10/10)"
            )
        begin, end = split_bounds(data.split, count)[position]
        if begin == end:
            raise ValueError(
                f"data.split={data.split} leaves the {name} split without documents: data.path="
                f"{data.path} holds {count} and it needs at least {_needed(data.split, position)} "
                "documents; change data.split (such as data.split=50/25/25), add documents, or set "
                "data.document_separator so that a text file holds more of them"
            )


def _needed(split: str, position: int) -> int:
    """Count of documents from which on no larger count leaves the split empty (by rounding)."""
    enough = math.ceil(2 / parse_split(split)[position])
    if enough > _SEARCH_UP_TO:
        return enough
    for count in range(enough, 0, -1):
        begin, end = split_bounds(split, count)[position]
        if begin == end:
            return count + 1
    return 1


def check_tokens(data: DataConfig, lengths: np.ndarray, splits: Sequence[str] | None) -> None:
    """Refuse a split shorter than one sequence, or than ``data.num_samples`` of them.

    Args:
        data: the data keys.
        lengths: tokens of each document (end-of-document included), in split order.
        splits: as :func:`wanted_splits` takes them.

    Raises:
        ValueError: also whatever :func:`check_documents` refuses.
    """
    check_documents(data, len(lengths), splits)
    for name in wanted_splits(data, splits):
        begin, end = split_bounds(data.split, len(lengths))[SPLITS.index(name)]
        tokens = int(lengths[begin:end].sum(dtype=np.int64))
        samples = split_samples(data, lengths, name)
        if samples < 1:
            raise ValueError(
                f"the {name} split of data.path={data.path} holds {tokens} tokens in {end - begin} "
                f"documents, less than one sequence of data.seq_length={data.seq_length} plus one; "
                "lower data.seq_length, change data.split or add text"
            )
        if splits is None:
            check_num_samples(data, samples)


def split_samples(data: DataConfig, lengths: np.ndarray, name: str) -> int:
    """Return samples of one pass over a split.

    Args:
        data: the data keys.
        lengths: tokens of each document (end-of-document included), in split order.
        name: of the split.
    """
    begin, end = split_bounds(data.split, len(lengths))[SPLITS.index(name)]
    # The last token of a sample is only a label, and the next sample starts with it.
    return (int(lengths[begin:end].sum(dtype=np.int64)) - 1) // data.seq_length


def check_shares(
    data: DataConfig, held: Sequence[int | None], wanted: int, *, repeats: bool
) -> None:
    """Refuse a blend that reads a source more often than it may.

    Args:
        data: with ``blend``.
        held: samples of one pass over each source; None where they are not counted yet.
        wanted: samples of the blend.
        repeats: whether a source is read again when it ends, up to ``data.blend_max_epochs``.

    Raises:
        ValueError: names the source, its share, and the epochs that it would take.
    """
    limit = data.blend_max_epochs if repeats else 1.0
    phases = data.weights_by_samples(wanted)
    key, way = "data.num_samples, each sample of which is read once", "data.num_samples"
    if repeats:
        key, way = f"data.blend_max_epochs={limit}", "trainer.max_steps"
    for index, (source, samples) in enumerate(zip(data.blend, held, strict=True)):
        share = sum(weights[index] / sum(weights) * size for weights, size in phases)
        if limit is not None and samples and share > limit * samples:
            raise ValueError(
                f"data.blend.{index}.path={source['path']} holds {samples} samples of "
                f"data.seq_length={data.seq_length}, and its share of {wanted} is {share:.0f}: "
                f"{share / samples:.2f} epochs, more than {key}; lower data.blend.{index}.weight "
                f"or {way}" + (", or raise data.blend_max_epochs" if repeats else "")
            )


def samples_taken(data: DataConfig, samples: int) -> int:
    """Return how many of the samples that there are a stage reads; says so where they are fewer.

    Raises:
        ValueError: as ``check_num_samples``.
    """
    check_num_samples(data, samples)
    if (data.num_samples or 0) > samples and rank() == 0:
        logger.warning(
            "data.path=%s has %d samples of data.seq_length=%d in its %s split: all of them are "
            "read, not %d",
            data.path,
            samples,
            data.seq_length,
            data.split_name,
            data.num_samples,
        )
    return min(samples, data.num_samples or samples)


def check_num_samples(data: DataConfig, samples: int) -> None:
    """Refuse to read more samples than there are: each is read once, none twice.

    The default of the stages that score is no wish: they take what there is.

    Raises:
        ValueError: ``data.num_samples`` exceeds ``samples``.
    """
    if (data.num_samples or 0) > samples and data.num_samples != CALIBRATION_SAMPLES:
        raise ValueError(
            f"data.num_samples={data.num_samples} is more than the {samples} sequences of "
            f"data.seq_length={data.seq_length} in the {data.split_name} split of data.path="
            f"{data.path}; set data.num_samples to at most {samples}, or to null for all of them"
        )
