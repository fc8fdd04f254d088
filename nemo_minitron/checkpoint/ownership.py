"""Who writes a result: one process at a time, on one host or on several that share the files.

The working folder is its own lock. It appears by one rename, with ``owner.json`` in it, so of two
processes that start together one finds it taken. The owner touches that file every few seconds: on
its own host its process can be looked up, on another host a file that is no longer touched tells
that it is gone. A successor signs under a name that only one can create (``owner.json.to-<token of
the dead owner>``), so of two that find the same dead owner one becomes the next.
"""

import contextlib
import errno
import glob
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nemo_minitron.checkpoint.owners import STALE, is_alive, is_ancestor, same_place, signature
from nemo_minitron.documents import JsonObject, read_json
from nemo_minitron.runtime.ranks import started_by_us

OWNER = "owner.json"
SIGNED = "partial.json"
"""What a working folder is for: stage, config and inputs. Earlier versions signed with it alone."""
_ASIDE = "aside"
_BEAT = 5.0
_ATTEMPTS = 10


@dataclass
class Claim:
    """A working folder that this process (or the one that started it) owns.

    Attributes:
        work: the folder.
        token: names this claim; nobody else has it.
        states: of the inputs when the claim was taken, see ``watched.input_states``.
        used: whether an ``output_folder`` is open on it.
        begun: whether a stage has begun to work in the folder.
    """

    work: Path
    token: str
    states: dict[str, str] = field(default_factory=dict)
    used: bool = False
    begun: bool = False

    def stands(self) -> bool:
        """Whether nobody has taken the folder over since."""
        return read_signed(self.work / OWNER).get("token") == self.token

    def check(self) -> None:
        """Refuse to go on with a folder that somebody else works in.

        Raises:
            ValueError: it was taken over, because this process gave no sign of life for long.
        """
        if not self.stands():
            owner = read_signed(self.work / OWNER)
            raise ValueError(
                f"{self.work} was taken over by process {owner.get('pid')} on "
                f"{owner.get('host')} while this one gave no sign of life; end one of them"
            )


_HELD: dict[Path, Claim] = {}


def claim_of(work: Path) -> Claim | None:
    """The claim on a folder that this process holds, or the process that started this rank."""
    if work in _HELD:
        return _HELD[work]
    if not started_by_us():
        return None
    owner = read_signed(work / OWNER)
    if not (same_place(owner) and is_ancestor(owner)):
        return None
    return Claim(work, owner["token"], owner.get("states", {}))


@contextlib.contextmanager
def claimed(work: Path, states: dict[str, str]) -> Iterator[Claim]:
    """Own a working folder while the body runs; what it holds then is kept if it is worth it.

    Args:
        work: the folder, made here if it is not there; its parents too.
        states: of the inputs, for ``Claim.states``.

    Raises:
        ValueError: somebody else owns it, or no stage made it.
    """
    made = _make_parents(work)
    claim = Claim(work, uuid.uuid4().hex, states)
    stop = threading.Event()
    try:
        _take(claim)
        _HELD[work] = claim
        threading.Thread(target=_beat, args=(claim, stop), daemon=True).start()
        yield claim
    finally:
        stop.set()
        _HELD.pop(work, None)
        _leave(claim)
        for folder in [] if claim.begun else made:  # refused input leaves no trace
            with contextlib.suppress(OSError):
                folder.rmdir()


def _make_parents(work: Path) -> list[Path]:
    """Make the folders above ``work``; those that were missing, innermost first."""
    missing = [folder for folder in work.parents if not folder.exists()]
    work.parent.mkdir(parents=True, exist_ok=True)
    return missing


def is_ours(work: Path) -> bool:
    """Whether a stage made this working folder."""
    if work.is_symlink() or not work.is_dir():
        return False
    return any((work / name).is_file() for name in (OWNER, SIGNED))


def has_owner(work: Path) -> bool:
    """Whether a process works in a working folder; for those who only look on."""
    owner, signed, _ = _owner(work)
    try:
        return is_alive(owner, time.time() - signed.stat().st_mtime)
    except OSError:  # there is none
        return False


def owner_files(names: list[str]) -> list[str]:
    """Return the files of a folder that say whose it is, and are no part of a result."""
    return [name for name in names if f"{name}.".startswith((f"{OWNER}.", f"{SIGNED}."))]


def aside_of(work: Path) -> Path:
    """Make a new name beside a working folder, for what was moved out of it (``set_aside``)."""
    return _beside(work, uuid.uuid4().hex, _ASIDE)


def asides_of(work: Path) -> list[Path]:
    """Return what has such a name: a killed process left it."""
    return [path for path, kind in _left_beside(work) if kind == _ASIDE]


def discard(work: Path) -> None:
    """Remove a folder that this process owns; for others it is gone in one moment."""
    trash = _beside(work, uuid.uuid4().hex, "trash")
    with contextlib.suppress(OSError):
        work.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def release(work: Path) -> None:
    """Leave a folder to whoever comes next, on any host, at once."""
    token = uuid.uuid4().hex
    draft = _beside(work, token, "draft")
    try:
        draft.write_text(json.dumps({"token": token}))
        draft.replace(work / OWNER)
    except OSError:  # a full disk
        draft.unlink(missing_ok=True)
        if (work / SIGNED).is_file():  # which has no owner, then
            (work / OWNER).unlink()


def _leave(claim: Claim) -> None:
    """End a claim: saved work stays for the next run, and an empty folder is removed."""
    if not claim.stands():
        return  # it is the result now, or somebody else's
    names = os.listdir(claim.work)
    if len(owner_files(names)) == len(names):
        discard(claim.work)
    else:
        release(claim.work)


def _take(claim: Claim) -> None:
    _sweep(claim.work)
    signed = {"token": claim.token, **signature(), "states": claim.states}
    mine = json.dumps(signed, indent=1)
    for _ in range(_ATTEMPTS):  # the folder may come and go between two looks at it
        if _create(claim, mine):
            return
        with contextlib.suppress(FileNotFoundError):
            if _succeed(claim, mine):
                return
    raise ValueError(f"{claim.work} comes and goes: several processes write it; end all but one")


def _create(claim: Claim, mine: str) -> bool:
    """Create the working folder with our signature in it, unless the name is taken."""
    work = claim.work
    if work.exists() or work.is_symlink():
        return False
    fresh = _beside(work, claim.token, "new")
    try:
        fresh.mkdir()
        (fresh / OWNER).write_text(mine)
        fresh.rename(work)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            return False  # another one was first
        raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return True


def _succeed(claim: Claim, mine: str) -> bool:
    """Become the next owner of a working folder whose owner has died.

    Raises:
        ValueError: it is alive, or no stage made the folder.
    """
    work = claim.work
    if not is_ours(work):
        raise ValueError(not_ours(work))
    draft = _beside(work, claim.token, "draft")
    draft.write_text(mine)
    try:
        owner, signed, free = _owner(work)
        # Both times are the file server's, so clocks of hosts do not enter.
        age = draft.stat().st_mtime - signed.stat().st_mtime
        if is_alive(owner, age):
            raise ValueError(_taken(work, owner, age))
        if not _exclusive(draft, free, mine):
            return False
        if _owner(work)[0].get("token") != claim.token:
            free.unlink(missing_ok=True)  # the dead owner had its successor long ago
            return False
        if free.name != OWNER:
            draft.replace(work / OWNER)
    finally:
        draft.unlink(missing_ok=True)
    for marker in work.glob(f"{OWNER}.to-*"):
        marker.unlink(missing_ok=True)
    return True


def _exclusive(draft: Path, path: Path, text: str) -> bool:
    """Create ``path`` with the content of ``draft``, unless it exists."""
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    except FileNotFoundError:
        raise
    except OSError:  # a file system without hard links
        try:
            with open(path, "x") as file:
                file.write(text)
        except FileExistsError:
            return False
    return True


def _owner(work: Path) -> tuple[JsonObject, Path, Path]:
    """Who owns a folder, the file that says so, and the one that a successor has to create."""
    path = work / OWNER
    if not path.is_file():  # by an earlier version
        return read_signed(work / SIGNED), work / SIGNED, path
    while True:
        owner = read_signed(path)
        following = work / f"{OWNER}.to-{owner.get('token', 'unreadable')}"
        if not following.is_file():
            return owner, path, following
        path = following


def read_signed(path: Path) -> JsonObject:
    """Read a file about the owner or the work of a folder; a damaged file gives an empty result."""
    try:
        owner = read_json(path)
    except (OSError, ValueError):  # killed before it was written whole
        return {}
    return owner if isinstance(owner, dict) else {}


def _beat(claim: Claim, stop: threading.Event) -> None:
    """Show that the owner lives, for as long as it is the owner."""
    while not stop.wait(_BEAT):
        if not claim.stands():
            return
        with contextlib.suppress(OSError):
            os.utime(claim.work / OWNER)


def _beside(work: Path, token: str, kind: str) -> Path:
    """Name of what is on its way into or out of the place of ``work``."""
    return work.with_name(f".{work.name}.{token}.{kind}")


def _left_beside(work: Path) -> Iterator[tuple[Path, str]]:
    """Everything beside ``work`` with a name that ``_beside`` gives, and its kind."""
    for path in work.parent.glob(f".{glob.escape(work.name)}.*"):
        token, _, kind = path.name[len(work.name) + 2 :].partition(".")
        if len(token) == 32:
            yield path, kind


def _sweep(work: Path) -> None:
    """Remove what killed processes left beside ``work``; a young one may still be in use."""
    for path, kind in _left_beside(work):
        if kind not in ("new", "draft", "trash"):
            continue
        with contextlib.suppress(OSError):
            if kind == "trash":
                shutil.rmtree(path, ignore_errors=True)
            elif time.time() - path.stat().st_mtime > STALE:
                shutil.rmtree(path, ignore_errors=True) if kind == "new" else path.unlink()


def refuse_live_owner(folder: Path) -> None:
    """Refuse a folder in which another process still is.

    Raises:
        ValueError: a result that is just being put there.
    """
    owner = read_signed(folder / OWNER)
    if owner.get("pid") not in (None, os.getpid()) and is_alive(owner, 0.0):
        raise ValueError(_taken(folder, owner, 0.0))


def not_ours(work: Path) -> str:
    """Why a folder in the place of a working folder is left alone."""
    return (
        f"{work} was not written by minitron, and is where this stage would work; it is never "
        "touched: move it away, or set another output_dir"
    )


def _taken(work: Path, owner: JsonObject, age: float) -> str:
    message = (
        f"{work} is being written by process {owner.get('pid')} on {owner.get('host')}; wait for "
        "it, end it, or set another output_dir"
    )
    if same_place(owner):
        return message
    return (
        f"{message} (its last sign of life is {max(age, 0):.0f} s old; {STALE / 60:.0f} minutes "
        f"without one and the same command goes on; if it is gone for certain: touch -d "
        f"2000-01-01 {work / OWNER})"
    )
