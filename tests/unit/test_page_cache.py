"""Big files pass the page cache and come out whole."""

import os
import time

import pytest
import torch

from nemo_minitron.checkpoint import page_cache
from nemo_minitron.checkpoint.page_cache import BLOCK_BYTES
from nemo_minitron.checkpoint.parts import read_into

PAGE = 4096


@pytest.fixture
def asked(monkeypatch):
    """``(offset, size)`` of what was let go, in order; the system is asked as well."""
    calls, real = [], os.posix_fadvise

    def advise(file, offset, size, advice):
        if advice == os.POSIX_FADV_DONTNEED:
            calls.append((offset, size))
        real(file, offset, size, advice)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return calls


def cached_pages(path) -> int:
    """Pages of a file that can be read without waiting for the disk."""
    count = 0
    with path.open("rb") as file:
        for offset in range(0, path.stat().st_size, PAGE):
            try:
                count += os.preadv(file.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT)
            except BlockingIOError:
                continue
            except OSError:
                pytest.skip("this file system does not say what it holds in memory")
    return count


def test_a_written_file_is_whole_and_let_go_block_by_block(tmp_path, asked):
    data = torch.randint(256, (4 * BLOCK_BYTES + 5,), dtype=torch.uint8).numpy()
    with page_cache.create(tmp_path / "file") as file:
        for start in range(0, len(data), 3 << 20):
            file.write(data[start : start + (3 << 20)].data)
    assert (tmp_path / "file").read_bytes() == data.tobytes()
    ends = [offset + size for offset, size in asked]
    starts = [offset for offset, _ in asked]
    assert starts[0] == 0
    assert all(size <= 4 * BLOCK_BYTES for _, size in asked)
    assert all(start <= end for start, end in zip(starts[1:], ends, strict=False)), "no gap"
    assert len(data) - ends[-1] < BLOCK_BYTES + (3 << 20)


def test_what_has_been_read_does_not_stay_in_memory(tmp_path):
    path, size = tmp_path / "file", 64 * PAGE
    values = torch.randint(256, (size,), dtype=torch.uint8)
    with path.open("wb") as file:
        file.write(values.numpy().data)
        file.flush()
        os.fsync(file.fileno())
    before = cached_pages(path)
    target = torch.empty_like(values)
    read_into(path, 0, target)
    assert torch.equal(target, values)
    if before != 64:
        pytest.skip("this file system keeps nothing in memory")
    for _ in range(20):  # the kernel keeps pages that it is just looking at itself
        if cached_pages(path) == 0:
            return
        time.sleep(0.2)
        read_into(path, 0, target)
    pytest.fail("the file stays in memory")


def test_nothing_to_read_lets_go_of_nothing(tmp_path, asked):
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE))
    read_into(path, 0, torch.empty(0))
    assert asked == []


def test_systems_without_advice(tmp_path, monkeypatch):
    monkeypatch.setattr(page_cache, "_ADVICE", False)
    monkeypatch.delattr(os, "posix_fadvise")
    with page_cache.create(tmp_path / "file") as file:
        file.write(bytes(2 * BLOCK_BYTES))
    target = torch.ones(BLOCK_BYTES, dtype=torch.uint8)
    read_into(tmp_path / "file", BLOCK_BYTES, target)
    assert not target.any()
