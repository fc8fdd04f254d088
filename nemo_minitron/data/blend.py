"""Samples of several sources by weight, in the order that Megatron's blended dataset has.

Megatron draws sample ``i`` of a blend from the source that is furthest behind its weight, and takes
the next sample of that source in its own shuffled order. The weights and the samples that a source
is built with are what Megatron's builder computes, so the sequence is the same; the layout of the
ranks does not enter.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from nemo_minitron.data.cache import build_for_all
from nemo_minitron.data.samples import Sample, WholeDocument
from nemo_minitron.runtime.extensions import before_megatron

logger = logging.getLogger(__name__)


class Order(NamedTuple):
    """Where each sample of a blend comes from."""

    source: np.ndarray
    """Index of its source."""
    sample: np.ndarray
    """Index of the sample in that source."""


def _normalized(weights: Sequence[float]) -> list[float]:
    before_megatron()
    from megatron.core.datasets.utils import normalize

    normalized: list[float] = normalize(weights)
    return normalized


def part_sizes(weights: Sequence[float], size: int) -> list[int]:
    """Samples that each source is built with for a blend of ``size``; its shuffle depends on it."""
    weights = _normalized(weights)
    from megatron.core.datasets import blended_megatron_dataset_builder as builder
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    surplus = GPTDatasetConfig.mid_level_dataset_surplus
    sizes = builder._get_size_per_split_per_dataset(weights, [size], surplus=surplus)
    return [part[0] for part in sizes]


def blend_order(weights: Sequence[float], size: int) -> Order:
    """Return sources and samples of a blend of ``size`` samples."""
    # The builder normalises the weights, and the blended dataset does so again.
    weights = _normalized(_normalized(weights))
    from megatron.core.datasets import helpers

    order = Order(np.zeros(size, np.int16), np.zeros(size, np.int64))
    helpers.build_blending_indices(*order, weights, len(weights), size, False)
    return order


def order_of(phases: Sequence[tuple[Sequence[float], int]]) -> Order:
    """Sources and samples of blends in turn; every source goes on where the one before left it.

    Args:
        phases: weights and number of samples of each blend; a weight may be 0.
    """
    read = np.zeros(len(phases[0][0]), np.int64)
    orders = []
    for weights, size in phases:
        used = np.flatnonzero(np.array(weights))
        source, sample = blend_order(np.array(weights)[used].tolist(), size)
        source = used[source].astype(source.dtype)
        orders.append(Order(source, sample + read[source]))
        read += np.bincount(source, minlength=len(read))
    return Order(*map(np.concatenate, zip(*orders, strict=True)))


def stored_order(cache: Path, phases: Sequence[tuple[Sequence[float], int]]) -> Order:
    """Return ``order_of``, kept on disk; every rank calls this."""
    key = json.dumps(phases)
    folder = cache / f"blend-{hashlib.sha256(key.encode()).hexdigest()[:24]}"

    def write(into: Path) -> None:
        for name, values in order_of(phases)._asdict().items():
            np.save(into / f"{name}.npy", values)

    build_for_all(folder, write)
    return Order(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in Order._fields))


def alike(parts: Sequence[Any]) -> list[Any]:
    """Datasets whose samples have the same keys: where documents share some, all name them."""
    shared = [getattr(part, "shared", False) for part in parts]
    if not any(shared):
        return list(parts)
    return [part if one else WholeDocument(part) for part, one in zip(parts, shared, strict=True)]


class BlendedSamples(Dataset[Sample]):
    """Samples of several datasets in a given order."""

    def __init__(
        self,
        parts: Sequence[Dataset[Sample]],
        order: Order,
        names: Sequence[str],
        held: Sequence[int],
    ) -> None:
        """Wrap the datasets of the sources.

        Args:
            parts: one dataset per source.
            order: source and sample of each index.
            names: of the sources, for logs.
            held: samples of one epoch of each source.
        """
        self.parts, self.order, self.names, self.held = parts, order, names, held
        self.shared = any(getattr(part, "shared", False) for part in parts)
        self._counted, self._counts = 0, np.zeros(len(parts), np.int64)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.order.source)

    def __getitem__(self, index: int | None) -> Sample:
        """Return sample ``index``, or for None a filler whose loss mask is all 0."""
        if index is None:
            return self.parts[0][None]
        part, sample = self.parts[int(self.order.source[index])], int(self.order.sample[index])
        # A source is as long as its first weight needs it; one that grew begins again.
        return part[sample % len(part)]  # type: ignore[arg-type]  # torch's Dataset declares no length

    def epochs(self, consumed: int) -> dict[str, float]:
        """Return how often each source was read by the first ``consumed`` samples, by name.

        Calls with growing numbers count each sample once.
        """
        if consumed < self._counted:
            self._counted, self._counts = 0, np.zeros_like(self._counts)
        new = self.order.source[self._counted : consumed]
        self._counts = self._counts + np.bincount(new, minlength=len(self.parts))
        self._counted = consumed
        epochs = self._counts / np.array(self.held)
        return dict(zip(self.names, epochs.tolist(), strict=True))

    def log(self) -> None:
        """Return a text that says what the sources give in all."""
        planned = self.epochs(len(self)).items()
        for (name, epochs), count, held in zip(planned, self._counts, self.held, strict=True):
            logger.info(
                "data.blend, source %s: %d of %d samples, %.3f epochs of its %d",
                name,
                count,
                len(self),
                epochs,
                held,
            )
