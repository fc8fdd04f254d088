"""Two worlds of ranks in one job: those that train, and those that only run the teacher.

Megatron's groups always span the default process group. So each world has a default group of its
own, and its ranks know no others; a ``Bridge`` joins the few that exchange tensors. The launcher
starts all of them, and the ranks of the teacher are its last ones.
"""

import logging
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_minitron.runtime import ranks

log = logging.getLogger(__name__)

_BRIDGE = "bridge"
_LOOK = timedelta(minutes=10)
_TIMEOUT = "Wait timeout"


@dataclass
class _Joined:
    """The store that both worlds share, once this process has joined one of them."""

    store: dist.Store | None = None


_joined = _Joined()


def join(store: dist.Store, rank: int, total: int, backend: str, timeout: timedelta) -> None:
    """Make the default process group of this rank's world (collective within the world).

    Args:
        store: through which all ranks of the job meet.
        rank: of this process in the job.
        total: ranks of the job.
        backend: ``nccl`` or ``gloo``.
        timeout: of the group's collectives.
    """
    teachers = ranks.teacher_ranks()
    first = total - teachers
    name, start, size = ("teacher", first, teachers) if rank >= first else ("student", 0, first)
    _joined.store = store
    own = dist.PrefixStore(name, store)
    dist.init_process_group(backend, store=own, rank=rank - start, world_size=size, timeout=timeout)


def shared_store() -> dist.Store:
    """Return the store that both worlds see."""
    assert _joined.store is not None, "this process joined no world"
    return _joined.store


def barrier() -> None:
    """Wait for every rank; for rank 0 as long as it takes.

    It tokenises, hashes and cuts for all of them, and a collective ends after the time limit of its
    group. So the others look into the store until rank 0 is here too.
    """
    if dist.get_world_size() > 1:
        store, own = dist.distributed_c10d._get_default_store(), dist.get_rank()
        meeting = f"barrier/{store.add(f'barriers_of/{own}', 1)}"
        if own == 0:
            store.set(meeting, "here")
        else:
            _wait(store, meeting)
    dist.barrier(group=dist.group.WORLD)


def _wait(store: dist.Store, key: str) -> None:
    """Wait until a key is there, for as long as the store is."""
    begin = time.monotonic()
    while True:
        try:
            return store.wait([key], _LOOK)
        except RuntimeError as error:
            # A store of files says it with no type of its own.
            if not (isinstance(error, dist.DistStoreError) or str(error).startswith(_TIMEOUT)):
                raise
            minutes = (time.monotonic() - begin) / 60
            log.info("rank %d waits for rank 0, for %.0f minutes now", dist.get_rank(), minutes)


class Bridge:
    """Sends tensors between some ranks of both worlds, in order between any two of them.

    Attributes:
        bytes_sent: what this rank has sent so far.
    """

    def __init__(self, member: int, members: int, timeout: timedelta) -> None:
        """Connect to the other members (a call of each of them).

        Args:
            member: number of this rank among them.
            members: how many there are.
            timeout: how long a tensor may be on its way.
        """
        store = dist.PrefixStore(_BRIDGE, shared_store())
        self._group: Any
        if torch.cuda.is_available():
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group = dist.ProcessGroupNCCL(store, member, members, options)
        else:
            self._group = dist.ProcessGroupGloo(store, member, members, timeout)
        self.bytes_sent = 0

    def send(self, tensor: Tensor, member: int) -> Any:
        """Begin to send a contiguous tensor, which must stay as it is until ``wait()``."""
        self.bytes_sent += tensor.nbytes
        return self._group.send([tensor], member, 0)

    def receive(self, tensor: Tensor, member: int) -> Any:
        """Begin to fill a contiguous tensor with what a member sends; complete after ``wait()``."""
        return self._group.recv([tensor], member, 0)
