"""Ranks wait for rank 0 as long as it works for all of them, whatever their group allows."""

import errno
import itertools
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from nemo_minitron.checkpoint.seals import write_seal
from nemo_minitron.data.cache import build_for_all
from nemo_minitron.evaluation.lockstep import led_by_first
from nemo_minitron.importance.resume import SavedState
from nemo_minitron.models import saving
from nemo_minitron.runtime import worlds
from nemo_minitron.runtime.agreement import from_first, together
from nemo_minitron.runtime.launch import seen_by_all

LIMIT, WORK = 3.0, 4.5
"""Seconds after which a collective ends with an error, and for which rank 0 works."""


def _store(kind: str, folder: Path) -> dist.Store:
    """Through which two ranks meet: files, or a server of rank 0 that says its port."""
    if kind == "files":
        return dist.FileStore(str(folder / "store"), 2)
    port = folder / "port"
    if dist.get_rank() == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port.with_suffix(".draft").write_text(str(store.port))
        port.with_suffix(".draft").rename(port)
        return store
    while not port.exists():
        time.sleep(0.02)
    return dist.TCPStore("127.0.0.1", int(port.read_text()), is_master=False)


def _worked(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def _wait(folder: Path, kind: str) -> list[float]:
    """A cache that rank 0 fills, and two barriers: it is the first at one, the last at another.

    Then it finds something for all, and runs a program that asks nobody.

    Returns:
        How long each took this rank.
    """
    rank, store = dist.get_rank(), _store(kind, folder)
    dist.destroy_process_group()
    limit, look = timedelta(seconds=LIMIT), worlds._LOOK
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
    worlds._LOOK = timedelta(seconds=1)  # so that it looks more than once

    def fill(work: Path) -> None:
        time.sleep(WORK)
        (work / "ids").write_text("7")

    try:
        times = [time.monotonic()]
        build_for_all(folder / "cache", fill)
        assert (folder / "cache" / "ids").read_text() == "7"
        times.append(time.monotonic())
        time.sleep(0.5 * rank)
        worlds.barrier()
        times.append(time.monotonic())
        time.sleep(WORK * (rank == 0))
        worlds.barrier()
        times.append(time.monotonic())
        assert from_first(partial(_worked, WORK)) == WORK
        times.append(time.monotonic())
        assert led_by_first(lambda _: _worked(WORK), lambda _: None) == WORK
        times.append(time.monotonic())
        return [end - begin for begin, end in itertools.pairwise(times)]
    finally:
        worlds._LOOK = look
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["files", "tcp"])
def test_ranks_wait_for_rank_0_longer_than_their_group_does(ranks, tmp_path, kind):
    for filled, early, *late in ranks.run(2, _wait, tmp_path, kind):
        assert min(filled, *late) > LIMIT
        assert 0.4 < early < LIMIT


def _damaged() -> int:
    raise ValueError(f"rank {dist.get_rank()} reads a damaged file")


def _told() -> tuple[int, str]:
    """What rank 0 finds, and what it says when it refuses."""
    found = from_first(lambda: dist.get_rank() + 7)
    with pytest.raises(ValueError, match="damaged") as raised:
        from_first(_damaged)
    return found, str(raised.value)


def test_what_rank_0_finds_or_refuses_all_ranks_do(ranks):
    assert ranks.run(2, _told) == [(7, "rank 0 reads a damaged file")] * 2


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "shard.bin")


def _numbers(folder: Path) -> list[tuple[int | None, str | None]]:
    """Number and file of what each way to act for all raises where the disk of rank 0 is full."""
    first, found = dist.get_rank() == 0, []
    work = folder / "step=2.tmp"
    work.mkdir(exist_ok=True)
    ways = (
        lambda: from_first(_full),
        lambda: together(_full if first else None),
        lambda: saving._publish(work, folder / "step=2", {}),
    )
    for way in ways:
        with (
            patch.object(saving, "rename_folder", _full),
            pytest.raises(OSError, match="No space") as raised,
        ):
            way()
        found.append((raised.value.errno, raised.value.filename))
    return found


def test_a_full_disk_of_rank_0_ends_all_ranks(ranks, tmp_path):
    """With the number by which the last line of the job says what to do."""
    assert ranks.run(2, _numbers, tmp_path) == [[(errno.ENOSPC, "shard.bin")] * 3] * 2


def _kept(folder: Path, full_on: int) -> tuple[int | None, str]:
    state = SavedState(folder, 1, {})
    write = _full if dist.get_rank() == full_on else torch.save
    with patch.object(torch, "save", write), pytest.raises(OSError, match="No space") as raised:
        state.after(1, 1, dict)
    assert state.load() is None
    return raised.value.errno, str(raised.value)


@pytest.mark.parametrize("full_on", [0, 1])
def test_a_full_disk_under_the_state_of_a_scoring_ends_all_ranks(ranks, tmp_path, full_on):
    """No state is left that looks whole."""
    first, second = ranks.run(2, _kept, tmp_path, full_on)
    assert first == second
    assert first[0] == errno.ENOSPC


def _finished(folder: Path) -> str:
    work = folder / "step=2.tmp"
    if dist.get_rank() == 0:
        (work / "hashes.0").write_text("{}")
    with (
        patch.object(saving, "settle_common", lambda _: None),
        pytest.raises(OSError, match="ended") as raised,
    ):
        saving._finish(work, folder / "step=2")
    return str(raised.value)


def test_a_writer_that_was_killed_ends_all_ranks(ranks, tmp_path):
    """Megatron takes its process for done; it has not left the hashes of its files."""
    (tmp_path / "step=2.tmp").mkdir()
    said = ranks.run(2, _finished, tmp_path)
    assert said == [f"{tmp_path}/step=2.tmp: the process that writes rank 1's files ended"] * 2
    assert not (tmp_path / "step=2").exists()


def _loads(folder: Path) -> str:
    from nemo_minitron.models.lightning import MegatronStrategy

    with pytest.raises(ValueError, match=r"step=2") as raised:
        MegatronStrategy(torch.device("cpu"))._check(folder / "step=2")
    return str(raised.value)


def test_damaged_hashes_of_a_checkpoint_are_refused_on_every_rank(ranks, tmp_path):
    folder = tmp_path / "checkpoints"
    (folder / "step=2").mkdir(parents=True)
    write_seal(folder / "step=2", {})
    (tmp_path / "checkpoints.sums" / "step=2").write_text("{")
    said = ranks.run(2, _loads, folder)
    assert said[0] == said[1]


class _Shown(type(Path())):  # type: ignore[misc]  # the class of this system's paths
    def exists(self, **_: object) -> bool:
        return dist.get_rank() == 0


def _seen() -> bool:
    return seen_by_all(_Shown("result"))


def test_storage_that_shows_a_file_later_elsewhere(ranks):
    assert ranks.run(2, _seen) == [True, True]
