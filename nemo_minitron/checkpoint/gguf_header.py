"""Walks the header of a GGUF file and compares every size in it with the length of the file.

The ``gguf`` package believes what a file declares: 57 bytes can declare an array of 2 ** 60
elements. Here nothing is kept and nothing is set aside; the walk ends at the first size that cannot
be.
"""

import math
import mmap
import struct
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

_MAGIC = 0x46554747
_MOST_ELEMENTS = 1 << 22
"""Maximum number of entries of all arrays: a million tokens with merges have three million."""
_MOST_DIMS = 4
_ARRAY, _STRING = GGUFValueType.ARRAY, GGUFValueType.STRING
_WIDTHS = {kind: np.dtype(kept).itemsize for kind, kept in GGUFReader.gguf_scalar_to_np.items()}
"""Bytes of a value of each type that has a fixed size."""


class _Walk:
    """A place in the file that only moves forward."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.end = data, 0, len(data)
        self.order = "<"
        self.elements = 0

    def skip(self, count: int) -> int:
        """Move on; returns where it was."""
        before = self.at
        if count > self.end - before:
            raise ValueError(
                f"byte {before} declares {count} bytes, and {self.end - before} follow"
            )
        self.at += count
        return before

    def number(self, kind: str) -> int:
        """Read a number in a format of ``struct``."""
        size = struct.calcsize(kind)
        place = self.skip(size)
        (found,) = struct.unpack(self.order + kind, self.data[place : place + size])
        return int(found)

    def string(self) -> None:
        """Pass over a text with its length before it."""
        self.skip(self.number("Q"))

    def value(self, kind: int) -> None:
        """Pass over the value of a metadata field."""
        if kind in _WIDTHS:
            self.skip(_WIDTHS[GGUFValueType(kind)])
        elif kind == _STRING:
            self.string()
        elif kind == _ARRAY:
            self.array()
        else:
            raise ValueError(f"byte {self.at} declares a value of the unknown type {kind}")

    def array(self) -> None:
        """Pass over an array, whose elements may not be arrays."""
        kind, count = self.number("I"), self.number("Q")
        self.elements += count
        if self.elements > _MOST_ELEMENTS:
            raise ValueError(f"byte {self.at} declares an array of {count} elements, too many")
        if kind == _ARRAY:
            raise ValueError(f"byte {self.at} declares an array of arrays")
        if kind in _WIDTHS:
            self.skip(count * _WIDTHS[GGUFValueType(kind)])
            return
        for _ in range(count):
            self.value(kind)

    def tensor(self) -> int:
        """Read the description of one tensor; return where in the data it ends."""
        self.string()
        dims = self.number("I")
        if dims > _MOST_DIMS:
            raise ValueError(f"byte {self.at} declares a tensor of {dims} dims")
        elements = math.prod(self.number("Q") for _ in range(dims))
        kind, offset = GGMLQuantizationType(self.number("I")), self.number("Q")
        block, size = GGML_QUANT_SIZES[kind]
        return offset + elements // block * size


def check_header(path: Path) -> None:
    """Refuse a GGUF file in which a declared size cannot be.

    Raises:
        ValueError: says at which byte.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        walk = _Walk(data)
        if walk.number("I") != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        if walk.number("I") & 0xFFFF == 0:
            walk.order = ">"
        tensors, fields = walk.number("Q"), walk.number("Q")
        for _ in range(fields):
            walk.string()
            walk.value(walk.number("I"))
        end = max((walk.tensor() for _ in range(tensors)), default=0)
        if end > walk.end - walk.at:
            raise ValueError(f"its tensors need {end} bytes, and {walk.end - walk.at} follow")
