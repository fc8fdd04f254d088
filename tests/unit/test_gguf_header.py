"""Sizes that a GGUF file declares are compared with its length before anything is read."""

import struct
import time
from pathlib import Path

import pytest

from nemo_minitron.checkpoint.gguf import open_reader
from nemo_minitron.checkpoint.gguf_header import check_header
from tests.helpers.gguf_fixtures import llama, write_gguf

STRING, ARRAY, UINT8, UINT64 = 8, 9, 0, 10
HUGE = 1 << 60


def text(words: bytes) -> bytes:
    return struct.pack("<Q", len(words)) + words


def field(kind: int, value: bytes) -> bytes:
    return text(b"general.x") + struct.pack("<I", kind) + value


def array(kind: int, count: int) -> bytes:
    return struct.pack("<IQ", kind, count)


def tensor(*dims: int, kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(b"token_embd.weight") + sizes + struct.pack("<IQ", kind, offset)


def gguf(*parts: bytes, tensors: int = 0, fields: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + b"".join(parts)


FILES = {
    "no file": b"",
    "another file": b"GGML" + bytes(40),
    "fields": gguf(fields=HUGE),
    "tensors": gguf(tensors=HUGE),
    "array of text": gguf(field(ARRAY, array(UINT64, HUGE)), fields=1),
    "array of texts": gguf(field(ARRAY, array(STRING, HUGE)), fields=1),
    "array of arrays": gguf(field(ARRAY, array(ARRAY, 1) * 1000), fields=1),
    "many bytes": gguf(field(ARRAY, array(UINT8, 1 << 23)), bytes(1 << 23), fields=1),
    "text": gguf(field(STRING, struct.pack("<Q", HUGE)), fields=1),
    "type": gguf(field(77, bytes(8)), fields=1),
    "dims": gguf(tensor(*[1] * 5), tensors=1),
    "elements": gguf(tensor(HUGE, HUGE), tensors=1),
    "offset": gguf(tensor(4, offset=HUGE), bytes(64), tensors=1),
    "tensor type": gguf(tensor(4, kind=999), bytes(64), tensors=1),
}


@pytest.mark.parametrize("name", FILES)
def test_declared_sizes_that_cannot_be(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(FILES[name])
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"m\.gguf is not a GGUF file, or is truncated or damaged"):
        open_reader(path)
    assert time.monotonic() - start < 5


def test_a_right_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", llama())
    check_header(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[:-100_000])
    with pytest.raises(ValueError, match="its tensors need"):
        check_header(tmp_path / "m.gguf")
