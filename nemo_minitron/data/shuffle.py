"""Documents of tokens in an order that a seed draws, copied from the files that hold them."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from nemo_minitron.data.pair import write_index
from nemo_minitron.runtime.console import progress

_STEP = 1 << 14  # documents between two steps of the progress bar
_BLOCK = 1 << 22  # bytes of a document at a time
_OPEN = 128  # files at a time


def document_order(count: int, seed: int) -> np.ndarray:
    """Return the order in which documents are stored: a permutation of ``range(count)``, int64."""
    return np.random.default_rng(seed).permutation(count)


def copy_documents(
    files: Sequence[Path],
    lengths: Sequence[np.ndarray],
    order: np.ndarray,
    target: Path,
    dtype: type[np.generic],
) -> None:
    """Write a ``.bin``/``.idx`` pair of documents that lie one after another in some files.

    Files are read, not mapped: pages of a map that were looked at count as memory of this process.

    Args:
        files: ids of documents.
        lengths: tokens of each document of each file.
        order: documents to copy, counted over all files.
        target: prefix of the pair.
        dtype: of the ids.
    """
    tokens = np.concatenate(lengths)
    sizes = tokens * np.dtype(dtype).itemsize
    ends = np.cumsum([len(one) for one in lengths])
    begins = np.concatenate([np.cumsum(part) - part for part in np.split(sizes, ends[:-1])])
    opened = lru_cache(_OPEN)(lambda number: files[number].open("rb"))
    with (
        Path(f"{target}.bin").open("wb") as out,
        progress("Shuffling documents", len(order)) as advance,
    ):
        for start in range(0, len(order), _STEP):
            chosen = order[start : start + _STEP]
            places = np.searchsorted(ends, chosen, side="right"), begins[chosen], sizes[chosen]
            for number, begin, size in zip(*map(np.ndarray.tolist, places), strict=True):
                file = opened(number)
                file.seek(begin)
                for at in range(0, size, _BLOCK):
                    out.write(file.read(min(_BLOCK, size - at)))
            advance(len(chosen))
    opened.cache_clear()
    write_index(target, dtype, tokens[order])
