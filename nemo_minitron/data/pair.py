"""Megatron's ``.bin``/``.idx`` pair of token ids, read and written without Megatron.

The ``.idx`` is a header, then per sequence a length and a place in the ``.bin``, then per document
its first sequence. Megatron's own builder takes microseconds per document and keeps Python lists;
here a corpus of ten million lines is three arrays.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_MAGIC = b"MMIDIDX\x00\x00"
_COUNTS = "<QBQQ"  # version, token type, sequences, documents
_HEADER = len(_MAGIC) + struct.calcsize(_COUNTS)
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


@dataclass(frozen=True)
class Index:
    """The ``.idx`` of a pair."""

    dtype: np.dtype
    lengths: np.ndarray
    """Tokens of each sequence."""
    documents: np.ndarray
    """First sequence of each document, and one past the last sequence at the end."""


def read_index(prefix: Path) -> Index:
    """Read and check the ``.idx`` of a pair; what it declares is compared with both files first.

    Raises:
        ValueError: not such an index, of a token type that is not integer, cut short, or it names
            tokens that the ``.bin`` does not have.
    """
    path = Path(f"{prefix}.idx")
    dtype, sequences, documents = _read_header(path)
    with path.open("rb") as file:
        file.seek(_HEADER)
        lengths = np.fromfile(file, np.int32, sequences)
        places = np.fromfile(file, np.int64, sequences)
        starts = np.fromfile(file, np.int64, documents)
    size, wanted = Path(f"{prefix}.bin").stat().st_size, int(lengths.sum(dtype=np.int64))
    damaged = "the pair is damaged, write it again"
    if sequences and int(lengths.min()) < 0:
        raise ValueError(f"data.path: {path} names a sequence of negative length; {damaged}")
    if size != wanted * dtype.itemsize:
        raise ValueError(
            f"data.path: {prefix}.bin has {size} bytes but its index names {wanted} tokens of "
            f"{dtype.itemsize} bytes; {damaged}"
        )
    last = size - lengths.astype(np.int64) * dtype.itemsize
    if ((places < 0) | (places > last)).any():
        raise ValueError(f"data.path: {path} names tokens outside of {prefix}.bin; {damaged}")
    bounds = documents > 0 and (int(starts[0]), int(starts[-1])) == (0, sequences)
    if not bounds or (np.diff(starts) < 0).any():
        raise ValueError(
            f"data.path: {path} does not share its {sequences} sequences among documents; {damaged}"
        )
    return Index(dtype, lengths, starts)


def _read_header(path: Path) -> tuple[np.dtype, int, int]:
    """Return token type and counts of an ``.idx`` that is as long as they say."""
    with path.open("rb") as file:
        raw, size = file.read(_HEADER), os.fstat(file.fileno()).st_size
    if len(raw) < _HEADER or not raw.startswith(_MAGIC):
        raise ValueError(f"data.path: {path} is not a Megatron index (wrong header)")
    version, code, sequences, documents = struct.unpack_from(_COUNTS, raw, len(_MAGIC))
    if version != 1 or code not in _DTYPES:
        raise ValueError(f"data.path: {path} has version {version}, token type {code}: unknown")
    wanted = _HEADER + 12 * sequences + 8 * documents
    if size < wanted:
        raise ValueError(
            f"data.path: {path} is cut short: it declares {sequences} sequences and {documents} "
            f"document bounds, {wanted} bytes, but has {size}; write the .bin/.idx pair again"
        )
    return np.dtype(_DTYPES[code]), sequences, documents


def write_index(prefix: Path, dtype: type[np.generic], lengths: np.ndarray) -> None:
    """Write the ``.idx`` of a ``.bin`` that is there, one sequence per document.

    Args:
        prefix: of the pair.
        dtype: of the tokens.
        lengths: tokens of each document, in order.
    """
    code = next(code for code, known in _DTYPES.items() if known == dtype)
    ends = np.cumsum(lengths, dtype=np.int64) * np.dtype(dtype).itemsize
    places = np.concatenate([np.zeros(1, np.int64), ends])[: len(lengths)]
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(_MAGIC + struct.pack(_COUNTS, 1, code, len(lengths), len(lengths) + 1))
        lengths.astype(np.int32).tofile(file)
        places.tofile(file)
        np.arange(len(lengths) + 1, dtype=np.int64).tofile(file)
