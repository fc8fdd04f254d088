"""A safetensors file read and written tensor by tensor.

The safetensors package wants all tensors of a file in memory at once to write it, and reads through
a memory map, page by page. The format is a length (u64, little endian), a JSON header of that many
bytes and the tensors, so it can as well be streamed.
"""

import json
import math
import struct
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from nemo_minitron.checkpoint.lazy import LazyTensor, Store, row_blocks
from nemo_minitron.checkpoint.page_cache import create
from nemo_minitron.checkpoint.parts import read_into
from nemo_minitron.documents import json_value

_LENGTH = struct.Struct("<Q")
DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# Readers map the file; tensors of wider dtypes start on a multiple of this.
_ALIGNMENT = 8


def _header(store: Store) -> bytes:
    """Return the length and JSON header; tensors follow in the order of the store."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in store.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return _LENGTH.pack(len(text)) + text


def value_places(path: Path) -> dict[str, int]:
    """Return the offset of the values of each tensor in an intact file."""
    with path.open("rb") as file:
        (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
        header = json_value(file.read(length))
    header.pop("__metadata__", None)
    start = _LENGTH.size + length
    return {name: start + entry["data_offsets"][0] for name, entry in header.items()}


def stored_tensor(path: Path, place: int, shape: tuple[int, ...], dtype: torch.dtype) -> LazyTensor:
    """Return a tensor whose values lie in a file from byte ``place`` on."""
    row = math.prod(shape[1:])

    def read_rows(start: int, stop: int) -> Tensor:
        values = torch.empty(stop - start, *shape[1:], dtype=dtype)
        read_into(path, place + start * row * dtype.itemsize, values.view(-1))
        return values

    def read() -> Tensor:
        values = torch.empty(shape, dtype=dtype)
        read_into(path, place, values.view(-1))
        return values

    return LazyTensor(shape, dtype, read, read_rows if shape else None, origin=str(path))


def _write(file: BinaryIO, values: Tensor) -> None:
    # numpy has no bfloat16; a memoryview copies nothing.
    file.write(values.contiguous().view(-1).view(torch.uint8).numpy().data)


def _write_tensor(file: BinaryIO, tensor: LazyTensor) -> None:
    for _, _, read in row_blocks(tensor):
        _write(file, read())


def write_safetensors(path: Path, store: Store) -> None:
    """Write a store; one tensor, or a block of its rows, is in memory at a time.

    Args:
        path: the new file.
        store: tensors of ``DTYPES``, in the order in which they are read.

    Raises:
        OSError: the file cannot be written (disk full).
    """
    ordered = dict(sorted(store.items(), key=lambda item: -item[1].dtype.itemsize))
    with create(path) as file:
        file.write(_header(ordered))
        for tensor in ordered.values():
            _write_tensor(file, tensor)
