"""Ends a job whose ranks wait for each other for ever, and says where each of them is.

A thread of every rank looks at when the main one gave its last sign of life. Of ranks that hang
together all come to their limit within moments, so each leaves the stacks of its threads before the
first one ends.
"""

import faulthandler
import logging
import os
import threading
import time
from pathlib import Path

import psutil

from nemo_minitron.runtime import peers, ranks, streams
from nemo_minitron.runtime.errors import Hung, verdict

log = logging.getLogger(__name__)

_OTHERS = 0.25
"""Share of the limit that other ranks have to come to theirs."""


class Watch:
    """Watches over this rank from ``start`` to ``stop``.

    Args:
        minutes: without a sign of life after which the job ends.
        folder: for the stacks, one file for each rank.
    """

    def __init__(self, minutes: float, folder: Path) -> None:
        self._seconds, self._folder = 60 * minutes, folder
        self._last, self._doing = time.monotonic(), "began"
        self._over, self._hung = threading.Event(), False
        self._thread = threading.Thread(target=self._look, daemon=True, name="watch")

    def start(self) -> None:
        """Start the thread that looks."""
        self.alive("began to train")
        self._thread.start()

    def alive(self, doing: str) -> None:
        """Give a sign of life, and say what was done last."""
        self._last, self._doing = time.monotonic(), doing

    def stop(self) -> None:
        """End the watch; does not return if the limit is over.

        Another rank may have ended before this one: that error is not what happened.
        """
        self._over.set()
        if self._hung:
            self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 10)):
            if time.monotonic() - self._last > self._seconds:
                self._end()

    def _end(self) -> None:
        """Leave the stacks, wait until other ranks have left theirs, and end this process."""
        self._hung = True
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"rank_{ranks.rank()}.txt"
        with open(path, "w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        time.sleep(min(30.0, _OTHERS * self._seconds))
        error = Hung(
            f"rank {ranks.rank()} {self._doing} {time.monotonic() - self._last:.0f} s ago and has "
            f"given no sign since; where each rank is: {self._folder}"
        )
        log.error("failed", exc_info=error)
        code, message = verdict("", error, None)
        ranks.leave_verdict(code, message)
        streams.complain(f"minitron: {message}\n")
        peers.leave()
        for child in psutil.Process().children(recursive=True):  # that write checkpoints
            child.kill()
        os._exit(code)
