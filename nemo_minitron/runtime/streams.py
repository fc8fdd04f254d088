"""stdout and stderr whose other end may be gone: what is said there never ends the work."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

log = logging.getLogger(__name__)


def write(text: str) -> int:
    """Write on stdout what a command is for; a reader that has seen enough, as head, is no error.

    Returns:
        Exit code: 1 where stdout takes nothing more, as a file on a full disk does.
    """
    try:
        if sys.stdout is not None:  # it is None where who started this process closed it
            sys.stdout.write(text)
            sys.stdout.flush()
    except BrokenPipeError:
        _discard_stdout()
    except OSError as error:
        _discard_stdout()
        complain(f"minitron: stdout takes nothing more: {error.strerror}\n")
        return 1
    return 0


def complain(text: str) -> None:
    """Write on stderr, if it is there; the exit code says the same where it is not."""
    with contextlib.suppress(OSError, AttributeError):
        sys.stderr.write(text)
        sys.stderr.flush()


@contextlib.contextmanager
def beside_the_work() -> Iterator[None]:
    """Print in the body what others have stored already: where stdout is gone, go on without."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except (BrokenPipeError, SystemExit):  # rich ends the process when a pipe is closed
        _discard_stdout()
    except OSError as error:
        _discard_stdout()
        log.warning("stdout takes nothing more (%s): tables are not shown", error.strerror)


def _discard_stdout() -> None:
    """Send what is still to come nowhere; Python would try to flush it when the process ends."""
    with contextlib.suppress(OSError, AttributeError):  # no file descriptor behind it
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
