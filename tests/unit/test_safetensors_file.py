"""Our streamed safetensors files, read by the safetensors package."""

import errno
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nemo_minitron.checkpoint.lazy import from_tensor
from nemo_minitron.checkpoint.safetensors_file import write_safetensors

TENSORS = {
    "half": torch.randn(3).half(),
    "brain": torch.randn(5, 7).bfloat16(),
    "full": torch.randn(11, 3, 2),
    "part": torch.arange(24.0).view(4, 6)[:, 1:5].contiguous(),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "flags": torch.tensor([True, False]),
    "none": torch.zeros(0, 4),
    "one": torch.tensor(3.5),
}


@pytest.mark.parametrize("block_bytes", [1 << 20, 16])
def test_read_by_the_package(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr("nemo_minitron.checkpoint.lazy.BLOCK_BYTES", block_bytes)
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {name: from_tensor(tensor) for name, tensor in TENSORS.items()})
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    save_file(TENSORS, tmp_path / "theirs", metadata={"format": "pt"})
    assert path.stat().st_size == pytest.approx((tmp_path / "theirs").stat().st_size, abs=8)


def test_rows_are_read_only_where_it_pays(tmp_path, monkeypatch):
    monkeypatch.setattr("nemo_minitron.checkpoint.lazy.BLOCK_BYTES", 100)
    small = replace(from_tensor(torch.ones(5, 5)), read_rows=None)
    asked: list[tuple[int, int]] = []
    big = torch.arange(60.0).view(10, 6)

    def rows(start: int, stop: int) -> torch.Tensor:
        asked.append((start, stop))
        return big[start:stop]

    store = {"small": small, "big": replace(from_tensor(big), read_rows=rows)}
    write_safetensors(tmp_path / "file", store)
    assert asked == [(0, 4), (4, 8), (8, 10)]
    assert torch.equal(load_file(tmp_path / "file")["big"], big)


def test_a_full_disk_is_an_os_error():
    with pytest.raises(OSError, match="No space left") as error:
        write_safetensors(Path("/dev/full"), {"a": from_tensor(torch.ones(1 << 16))})
    assert error.value.errno == errno.ENOSPC
