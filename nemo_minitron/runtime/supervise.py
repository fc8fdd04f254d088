"""Runs other processes of this package to their end: the ranks of a layout, a pipeline's item."""

import contextlib
import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from nemo_minitron.runtime import endings
from nemo_minitron.runtime.errors import INTERRUPTED, PREEMPTED, TERMINATED

_ORDERLY = (PREEMPTED, INTERRUPTED, TERMINATED)
_CRASHED_SECONDS = 3.0
"""How long the other processes may go on by themselves once one of them failed."""
_ORDERLY_SECONDS = 30.0
"""The same patience once one process ended as it was asked to: others may be saving work."""
_KILL_SECONDS = 10.0
"""Time to clean up after SIGTERM."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Outcome:
    """How processes ended.

    Attributes:
        codes: exit code of each, -n where signal n killed it.
        killed: the first that a signal killed which nobody here sent; its number and the signal.
        told: signals that were passed on to them.
    """

    codes: tuple[int, ...]
    killed: tuple[int, signal.Signals] | None
    told: frozenset[int]

    @property
    def code(self) -> int:
        """One code for all: 0, what a stop signal means, or that of one which failed."""
        if not any(self.codes):
            return 0
        if signal.SIGINT in self.told:
            return INTERRUPTED
        if self.told:
            return TERMINATED
        return next((code for code in self.codes if code > 0), 1)


def supervise(command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> Outcome:
    """Run a command once for each environment, to the end of all.

    What would end this process ends them first. When one fails the others follow within 15 s.
    """
    family = _Family([])
    try:
        with endings.held():  # no signal comes between a start and the note of it
            for env in environments:
                # Sessions of their own: Ctrl-C reaches them once, from here.
                family.children.append(
                    subprocess.Popen(
                        command,
                        env=dict(env),
                        start_new_session=True,
                        preexec_fn=die_with_parent,
                    )
                )
            before = family.take_signals()
        try:
            family.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    finally:
        for child in family.children:
            if child.poll() is None:
                child.kill()
                child.wait()
    codes = tuple(child.returncode for child in family.children)
    return Outcome(codes, family.killed, frozenset(family.told))


class _Family:
    """Processes that live and end together."""

    def __init__(self, children: "list[subprocess.Popen[bytes]]") -> None:
        self.children = children
        self.told: set[int] = set()
        self.killed: tuple[int, signal.Signals] | None = None
        self.ending = False

    def take_signals(self) -> dict[int, Any]:
        """Pass signals on. All but Ctrl-C become SIGTERM."""
        numbers = (*endings.ALL, signal.SIGUSR2)
        return {number: signal.signal(number, self._forward) for number in numbers}

    def _forward(self, number: int, _: FrameType | None) -> None:
        sent = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        self.told.add(sent)
        self._send(sent)

    def _send(self, number: int) -> None:
        for child in self.children:
            with contextlib.suppress(OSError):
                child.send_signal(number)

    def wait(self) -> None:
        """Wait until all processes have ended."""
        for patience in self._steps():
            end = None if patience is None else time.monotonic() + patience
            while None in [child.poll() for child in self.children]:  # each one is asked
                self._look()
                if end is None and self._failed():
                    break
                if end is not None and time.monotonic() > end:
                    break
                time.sleep(0.05)
        self._look()

    def _steps(self) -> Iterator[float | None]:
        """Seconds to wait before the next, harder signal, or None to wait until a process fails."""
        yield None
        orderly = all(code in _ORDERLY for code in self._failed())
        yield _ORDERLY_SECONDS if orderly else _CRASHED_SECONDS
        self._look()
        self.ending = True
        self._send(signal.SIGTERM)
        yield _KILL_SECONDS
        self._send(signal.SIGKILL)
        yield _KILL_SECONDS

    def _failed(self) -> list[int]:
        return [child.returncode for child in self.children if child.returncode]

    def _look(self) -> None:
        """Note the first that a signal killed, before any is sent from here."""
        if self.killed is not None or self.told or self.ending:
            return
        for number, child in enumerate(self.children):
            if child.returncode is not None and child.returncode < 0:
                self.killed = number, signal.Signals(-child.returncode)
                return


def killed_by(number: signal.Signals) -> str:
    """Describe who may have sent a signal that this package did not send."""
    reason = ", as the system does when memory runs out" if number == signal.SIGKILL else ""
    return f"was killed ({number.name}{reason}); run the same command again"


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies, so that no rank outlives a kill -9."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def outlive_signals() -> None:
    """Let a helper process outlive the signals that ask to stop, but not its parent.

    A helper imports this module to find this function, which is why no torch is imported here.
    """
    for number in endings.ALL:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
