"""Ranks wait for rank 0 as long as it works for all of them, whatever their group allows."""

import itertools
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from nemo_minitron.data.cache import build_for_all
from nemo_minitron.runtime import worlds
from nemo_minitron.runtime.agreement import from_first

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


def _wait(folder: Path, kind: str) -> list[float]:
    """A cache that rank 0 fills, and two barriers: it is the first at one, the last at another.

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
        return [end - begin for begin, end in itertools.pairwise(times)]
    finally:
        worlds._LOOK = look
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["files", "tcp"])
def test_ranks_wait_for_rank_0_longer_than_their_group_does(ranks, tmp_path, kind):
    for filled, early, late in ranks.run(2, _wait, tmp_path, kind):
        assert min(filled, late) > LIMIT
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
