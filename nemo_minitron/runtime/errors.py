"""How a job ends: exit codes, the exceptions that carry them, and the line that says what to do."""

import errno
from pathlib import Path

BAD_INPUT = 2
"""A ``ValueError``: the user has to change something."""
PREEMPTED = 75
"""``EX_TEMPFAIL`` of sysexits.h: run the same command again."""
INTERRUPTED = 130
TERMINATED = 143
"""128 + SIGTERM: the same command starts over."""
_WRONG_PATH = (
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
)
"""Errors of the file system that the same path gives again."""
_SHOWN = 200
"""Characters of a path in a message."""


class Ending(BaseException):
    """A job ends without having failed by itself: it was told to, or it lost a rank.

    Like ``KeyboardInterrupt`` no ``Exception``: signal handlers raise it, and no library on the
    way may take it for an error of its own.
    """

    code: int
    """Exit code of the process."""
    line = "{}"
    """The last line of the job, given the text of the exception."""


class Preempted(Ending):
    """A stage was told to stop; the same command goes on from the work it saved."""

    code = PREEMPTED
    line = "stopped early ({}); run the same command again to go on"


class Hung(Ending):
    """A rank gave no sign of life for long; the same command goes on from the work it saved."""

    code = PREEMPTED
    line = "hung: {}; run the same command again to go on"


class Terminated(Ending):
    """A stage was told to stop, and has no work that could be saved half done."""

    code = TERMINATED
    line = "ended by a signal; run the same command again"


class Interrupted(Ending):
    """Ctrl-C. Not ``KeyboardInterrupt``, which Lightning answers with an ending of its own."""

    code = INTERRUPTED
    line = "interrupted; run the same command again"


class RankKilled(Ending):
    """Another rank of the job was killed; the launcher then asks the others to stop."""

    code = 1


class StageFailed(Exception):  # noqa: N818
    """A stage that ran in another process ended badly.

    Attributes:
        code: its exit code.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        """Through a pickle: the jobs of a sweep may run elsewhere."""
        return StageFailed, (str(self), self.code)


def verdict(stage: str, error: BaseException, log_path: Path | None) -> tuple[int, str]:
    """Return the exit code of a job that ended with ``error``, and the line that says what to do.

    ``log_path`` is the job's log file, None when it had not got that far.
    """
    text = str(error) or type(error).__name__
    if isinstance(error, StageFailed):
        return error.code, text
    if isinstance(error, KeyboardInterrupt):
        error = Interrupted()
    if isinstance(error, Ending):
        return error.code, error.line.format(text)
    if isinstance(error, ValueError):
        return BAD_INPUT, text
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return 1, (
            f"the disk is full ({error.filename or log_path}): free some space or set another "
            "output_dir, then run the same command again"
        )
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return 1, (
            f"a file may not grow any more ({error.filename or log_path}): raise the limit "
            "(ulimit -f), or set an output_dir on a file system that takes large files, then run "
            "the same command again"
        )
    if isinstance(error, OSError) and error.errno in _WRONG_PATH:
        return BAD_INPUT, f"{error.strerror}: {str(error.filename)[:_SHOWN]}; give another path"
    if isinstance(error, RuntimeError) and text.startswith("Symlink loop"):  # until Python 3.12
        return BAD_INPUT, f"{text}; give another path"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return 1, (
            "out of memory: lower data.micro_batch_size or data.seq_length, or raise "
            f"parallel.tensor_model_parallel_size ({text.splitlines()[0]})"
        )
    where = f"in {log_path}" if log_path else "above"
    return 1, (
        f"failed with {type(error).__name__}: {text.splitlines()[0]}; the traceback is {where}: "
        f"if it does not tell what to change, report it together with `minitron {stage} --cfg job`"
    )
