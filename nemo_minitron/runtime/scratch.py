"""The temporary files of a job: one folder that goes with it, whatever ends it.

Everything temporary of this process and of those it starts goes there, also what libraries make
(sockets of helper processes). A job that is killed leaves it; the next job of the same user removes
it. It is known to be left by its lock, which the kernel drops with the process that held it: this
needs no process ids, which mean nothing in another container that shares the folder.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "minitron-"
_DRAFT = ".minitron-"
_LOCK = "lock"
_INHERITED = "MINITRON_SCRATCH"
# A path of a socket has at most 107 characters; multiprocessing's take 36 after the folder's name,
# which takes 18 after that of the folder it is in.
_LONGEST = 107 - 36 - 18
_SHORT = ("/tmp", "/dev/shm")  # made there with mkdtemp, for this user alone


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for temporary files, and ``TMPDIR`` of this process and those it starts."""
    given = os.environ.get(_INHERITED)
    if given is not None and Path(given).is_dir():
        yield Path(given)  # of the process that started this one
        return
    root = _root()
    _remove_left(root)
    folder, lock = _make(root)
    before = {name: os.environ.get(name) for name in ("TMPDIR", _INHERITED)}, tempfile.tempdir
    try:
        os.environ.update({"TMPDIR": str(folder), _INHERITED: str(folder)})
        tempfile.tempdir = str(folder)
        yield folder
    finally:
        variables, tempfile.tempdir = before
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _root() -> Path:
    """Return the folder for temporary files, short enough for the path of a socket."""
    root = Path(tempfile.gettempdir())
    if len(os.fsencode(root)) <= _LONGEST:
        return root
    short = (Path(name) for name in _SHORT)
    return next((path for path in short if os.access(path, os.W_OK | os.X_OK)), root)


def _make(root: Path) -> tuple[Path, int]:
    """A locked folder; it gets its name once it is locked, so nobody takes it for left behind."""
    draft = Path(tempfile.mkdtemp(prefix=_DRAFT, dir=root))
    lock = os.open(draft / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    folder = draft.with_name(PREFIX + draft.name.removeprefix(_DRAFT))
    draft.rename(folder)
    return folder, lock


def _remove_left(root: Path) -> None:
    """Remove what killed jobs of this user left."""
    for folder in root.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if not folder.is_symlink() and folder.stat().st_uid == os.getuid():
                _remove_if_left(folder)


def _remove_if_left(folder: Path) -> None:
    """Remove a folder whose lock nobody holds.

    Raises:
        OSError: somebody holds it, or it has none and so is somebody else's.
    """
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)
