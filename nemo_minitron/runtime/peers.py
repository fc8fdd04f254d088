"""The other ranks of this job on this machine, and whether one of them was killed.

A launcher that loses a rank asks the others to stop, as a scheduler does that wants its node back;
and what the others see is a closed connection. Neither says what happened: the processes do.
"""

import contextlib
import os
import socket
import time
from dataclasses import dataclass
from typing import Any

from nemo_minitron.runtime import ranks

_SAME_START = 2.0  # seconds by which two readings of one process's start may differ (clock steps)


@dataclass
class _Known:
    """Process (host, id, start) of every rank, and where they leave notes for each other."""

    rank: int = 0
    first: int = 0  # rank, in the whole job, of the first process of this world
    processes: tuple[tuple[str, int, float], ...] = ()
    store: Any = None


_known = _Known()


def introduce() -> None:
    """Learn who the others are (collective)."""
    import psutil
    import torch.distributed as dist

    size = dist.get_world_size()
    me = (socket.gethostname(), os.getpid(), psutil.Process().create_time())
    found = [me] * size
    dist.all_gather_object(found, me)
    _known.rank, _known.processes = dist.get_rank(), tuple(found)
    _known.first = ranks.rank() - dist.get_rank()
    _known.store = dist.distributed_c10d._get_default_store()


def leave() -> None:
    """Note that this rank ends by itself, whatever the reason."""
    if _known.store is not None:
        with contextlib.suppress(Exception):  # rank 0 holds the notes, and may be gone
            _known.store.set(_note(_known.rank), "ended")


def killed(wait: float = 0.0) -> int | None:
    """Return a rank of this machine that is gone and did not say so; None where all are there.

    Args:
        wait: seconds that one may take to go: its connections close before it has.
    """
    end = time.monotonic() + wait
    while (gone := _gone()) is None and _known.processes and time.monotonic() < end:
        time.sleep(0.05)
    return gone


def _gone() -> int | None:
    host = socket.gethostname()
    for number, (where, process, started) in enumerate(_known.processes):
        if where == host and not is_running(process, started) and not _left(number):
            return _known.first + number
    return None


def _note(rank: int) -> str:
    return f"minitron-ended-{rank}"


def _left(rank: int) -> bool:
    with contextlib.suppress(Exception):
        return bool(_known.store.check([_note(rank)]))
    return False


def is_running(process: int, started: float) -> bool:
    """Whether a process still runs; its start time tells it from a later one of the same number."""
    import psutil

    try:
        found = psutil.Process(process)
        same = abs(found.create_time() - started) < _SAME_START
        return same and found.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
