"""How this process takes the signals that ask it to end: at any moment, and without a traceback.

A signal becomes an exception that is no ``Exception``, so that it unwinds the stack through
libraries and working folders are removed, or kept to resume. Ctrl-C does not become
``KeyboardInterrupt``: Lightning takes that one for its own and ends the process. A library that
swallows even this one, or turns it into an error of its own, does not change how the job ends.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from nemo_minitron.runtime import streams
from nemo_minitron.runtime.errors import INTERRUPTED, Ending, Interrupted, Terminated, verdict

STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
ALL = (signal.SIGINT, *STOP)
_PATIENCE = 5.0
"""Seconds after which an exception that did not arrive is raised again."""
_GRACE = 2.0
"""Seconds that the code of another package may go on before it is interrupted after all."""
_PACKAGE = __name__.partition(".")[0]

Meaning = Callable[[], Ending]


class _Request:
    """The request that a signal made in this process."""

    def __init__(self) -> None:
        """Start without a request."""
        self.process = os.getpid()
        self.meaning: Meaning = _terminated
        self.error: Ending | None = None
        self.until = 0.0
        self.again: threading.Timer | None = None
        self.command = "minitron"
        self.closed = False


def _terminated() -> Ending:
    return Terminated("a signal asked to stop")


_request = _Request()


def begin(command: str) -> None:
    """Take the signals from the first moment of a command line.

    Args:
        command: what the last line starts with.
    """
    _request.command = command
    for number in ALL:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _ask)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ALL)  # whoever started this one held them back


def end() -> None:
    """Be deaf and quiet from now on: the last line is said, and Python shuts down.

    Torch logs figures of its caches as it goes, where a signal interrupted its import.
    """
    logging.disable()
    for number in ALL:
        signal.signal(number, signal.SIG_IGN)
    arrived()


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Hold signals back; a process started meanwhile holds them back too, until its ``begin``."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ALL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def taken(command: str, meaning: Meaning) -> Iterator[None]:
    """Let a signal that asks to stop mean, inside, what the job says.

    Args:
        command: what the last line starts with.
        meaning: gives the exception to raise.
    """
    kept = vars(_request).copy()
    _request.process, _request.command, _request.meaning = os.getpid(), command, meaning
    _request.error, _request.closed = None, False
    before = {n: signal.signal(n, _ask) for n in ALL if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield
    finally:
        arrived()
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        error = _request.error
        vars(_request).update(kept)
        _request.error = error


def close() -> None:
    """Ignore signals from now on: how the job ends is decided."""
    arrived()
    _request.closed = True


def asked() -> Ending | None:
    """Return the request of a signal, even if its exception was caught."""
    return _request.error


def say(command: str, error: BaseException) -> int:
    """Say the last line of a command that did not reach its job; return the exit code."""
    code, message = verdict(command.rpartition(" ")[2], asked() or error, None)
    streams.complain(f"{command}: {message}\n")
    return code


def throw(error: BaseException, frame: FrameType | None) -> None:
    """Raise what a signal handler has to raise: at once, or at the next line of this package.

    Libraries call Python from C++, some of them where C++ may not throw: an exception that a
    handler raises there ends the process with SIGABRT. Code of another package that was
    interrupted therefore goes on until it returns to, or calls, code of this one.

    Args:
        error: what to raise.
        frame: what was interrupted, as the handler is told.
    """
    if not _is_anothers(frame):
        raise error

    def trace(frame: FrameType, *_: object) -> None:
        if _package_of(frame) == _PACKAGE:
            raise error  # which ends the tracing

    for outer in _stack(frame):
        if _package_of(outer) == _PACKAGE:
            outer.f_trace = trace
    sys.settrace(trace)


def _is_anothers(frame: FrameType | None) -> bool:
    """Whether code of another package runs, called by this one; Python's own library aside."""
    names = [_package_of(outer) for outer in _stack(frame)]
    if _PACKAGE not in names:
        return False
    return not sys.stdlib_module_names.issuperset(names[: names.index(_PACKAGE)])


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _package_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _ask(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _request.process:  # a copy made by fork; its parent says what is to be said
        os._exit(128 + number)
    if _request.closed:
        return
    if _request.error is None:
        _request.error = Interrupted("Ctrl-C") if number == signal.SIGINT else _request.meaning()
        _raise_again(number, _GRACE if _is_anothers(frame) else _PATIENCE)
        throw(_request.error, frame)
        return
    if not _overdue():  # SLURM sends several: clean up in peace
        return
    if _request.again is not None:
        _raise_again(number, _PATIENCE)
        sys.settrace(None)
        raise _request.error
    if number == signal.SIGINT:  # pressed again, while it cleans up
        streams.complain(f"{_request.command}: interrupted; run the same command again\n")
        os._exit(INTERRUPTED)


def _overdue() -> bool:
    return time.monotonic() >= _request.until


def _raise_again(number: int, seconds: float) -> None:
    _request.again = threading.Timer(seconds + 0.1, os.kill, (os.getpid(), number))
    _request.again.daemon = True
    _request.again.start()
    _request.until = time.monotonic() + seconds


def arrived() -> None:
    """Say that the exception reached somebody who ends the job: it need not be raised again."""
    again, _request.again = _request.again, None
    if again is not None:
        again.cancel()
