"""Whether the process that signed a working folder is still there, on this host or on another."""

import os
import socket
from pathlib import Path

import psutil

from nemo_minitron.documents import JsonObject
from nemo_minitron.runtime.peers import is_running

STALE = 300.0
"""Seconds without a sign of life after which an owner on another host counts as gone."""


def signature() -> JsonObject:
    """Return this process's id and start time, since process ids come round again."""
    process = psutil.Process()
    return {**_place(), "pid": process.pid, "started": process.create_time(), **_job()}


def is_alive(owner: JsonObject, age: float) -> bool:
    """Whether an owner still works.

    Args:
        owner: its signature; without a process it has released the folder.
        age: seconds since its last sign of life, by the clock of the file system.
    """
    if "token" in owner and "pid" not in owner:
        return False  # released
    if same_place(owner):
        return _runs(owner)
    if _is_later_start_of(owner):
        return False
    return age < STALE


def _place() -> dict[str, str]:
    """Return where process ids mean the same: a host since its start, and a container on it."""
    return {
        "host": socket.gethostname(),
        "boot": _text(Path("/proc/sys/kernel/random/boot_id")),
        "pids": os.readlink("/proc/self/ns/pid") if Path("/proc/self/ns/pid").exists() else "",
    }


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def same_place(owner: JsonObject) -> bool:
    """Whether the process ids of an owner are those of this machine and container."""
    return bool(owner) and all(owner.get(key, value) == value for key, value in _place().items())


def _job() -> JsonObject:
    """Return the SLURM job; a requeued one has the same number and has been started once more."""
    job = os.environ.get("SLURM_JOB_ID")
    return {} if job is None else {"job": job, "restarts": _restarts()}


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def _is_later_start_of(owner: JsonObject) -> bool:
    """Whether this is the owner's own job, requeued: SLURM has then ended the owner."""
    job = os.environ.get("SLURM_JOB_ID")
    return job is not None and owner.get("job") == job and _restarts() > owner.get("restarts", 0)


def _runs(owner: JsonObject) -> bool:
    try:
        return is_running(owner["pid"], owner["started"])
    except (KeyError, TypeError, ValueError):  # not as this package signs
        return False


def is_ancestor(owner: JsonObject) -> bool:
    """Whether the owner started this process, perhaps through others."""
    return owner.get("pid") in [parent.pid for parent in psutil.Process().parents()]
