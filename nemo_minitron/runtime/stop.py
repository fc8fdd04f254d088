"""Stopping between two steps of work when a scheduler asks for it."""

import os
import signal
from types import FrameType

import torch
import torch.distributed as dist

from nemo_minitron.runtime import endings, peers
from nemo_minitron.runtime.errors import Preempted, RankKilled
from nemo_minitron.runtime.launch import device

SIGNALS = endings.STOP


class StopOnRequest:
    """Inside, SIGTERM and SIGUSR1 only leave a note; ranks get them at different moments."""

    def __init__(self) -> None:
        """Note the handlers to give back.

        They may change before ``__enter__``: Lightning's are there while it trains, and they would
        keep its trainer, the model and the groups alive.
        """
        self._asked = False
        self._process = os.getpid()
        self._before = {number: signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS}

    def __enter__(self) -> "StopOnRequest":
        """Install this object's signal handlers."""
        for number in SIGNALS:
            signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        """Give them back to whoever had them at construction."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a writer that was forked goes on
        gone = peers.killed()
        if gone is not None:  # its launcher ends this one too; there is nobody to agree with
            endings.throw(RankKilled(f"rank {gone} was killed; run the same command again"), frame)
            return
        self._asked = True

    def ask(self) -> None:
        """Ask the training to stop, as a signal does."""
        self._asked = True

    def asked(self) -> bool:
        """Whether any rank was asked to stop, the same answer on all (collective)."""
        flag = torch.tensor(float(self._asked), device=device())
        if dist.get_world_size() > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=dist.group.WORLD)
        return bool(flag.item())

    def check(self) -> None:
        """Stop if any rank was asked to (collective).

        Raises:
            Preempted: on every rank.
        """
        if self.asked():
            raise Preempted("a signal asked to stop; what is complete is kept")
