"""A safetensors file written tensor by tensor.

The safetensors package wants all tensors of a file in memory at once. The format is a length (u64,
little endian), a JSON header of that many bytes and the tensors, so it can as well be streamed.
"""

import json
import struct
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from nemo_minitron.checkpoint.lazy import LazyTensor, Store, row_blocks

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
# Larger tensors are written in blocks of rows where their source can give rows.
_BLOCK_BYTES = 128 << 20
# Readers map the file; tensors of wider dtypes start on a multiple of this.
_ALIGNMENT = 8


def _header(store: Store) -> bytes:
    """Length and JSON header; tensors follow in the order of the store."""
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
    return struct.pack("<Q", len(text)) + text


def _write(file: BinaryIO, values: Tensor) -> None:
    # numpy has no bfloat16; a memoryview copies nothing.
    file.write(values.contiguous().view(-1).view(torch.uint8).numpy().data)


def _write_tensor(file: BinaryIO, tensor: LazyTensor) -> None:
    if tensor.read_rows is None or tensor.nbytes <= _BLOCK_BYTES:
        return _write(file, tensor.read())
    for start, stop in row_blocks(tensor, _BLOCK_BYTES):
        _write(file, tensor.read_rows(start, stop))


def write_safetensors(path: Path, store: Store) -> None:
    """Write a store; one tensor, or a block of its rows, is in memory at a time.

    Args:
        path: the new file.
        store: tensors of ``DTYPES``, in the order in which they are read.

    Raises:
        OSError: the file cannot be written (disk full).
    """
    ordered = dict(sorted(store.items(), key=lambda item: -item[1].dtype.itemsize))
    with path.open("wb") as file:
        file.write(_header(ordered))
        for tensor in ordered.values():
            _write_tensor(file, tensor)
