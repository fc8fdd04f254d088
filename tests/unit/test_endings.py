"""Endings: Ctrl-C at any moment, killed ranks, and temporary files that go with their job."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from nemo_minitron.runtime import endings, scratch
from nemo_minitron.runtime.errors import Interrupted, Preempted, Terminated
from tests.helpers import fake_stages

DATA = ("data.path=model", "output_dir=out")
SLEEPING = {
    "one process": ("importance", "checkpoint=model", *DATA),
    "ranks": ("evaluate", "checkpoint=model", *DATA, "parallel=tp2"),
}


@pytest.fixture
def temporary():
    """TMPDIR of the commands; those of pytest are too long for sockets."""
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        yield Path(folder)


@pytest.fixture
def start(tmp_path, temporary):
    """Start a command whose stage sleeps; gives the process once every rank does."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/file").write_text("x")
    started = []

    def begin(*line: str, ranks: int = 1, wait: bool = True):
        notes = tmp_path / "notes"
        env = {"FAKE_RUN": f"{line[0]}:sleep", "FAKE_NOTES": str(notes)}
        process = subprocess.Popen(
            [sys.executable, "-m", "nemo_minitron", *line],
            env=fake_stages.environment(tmp_path, TMPDIR=str(temporary), **env),
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        while wait and (not notes.exists() or len(notes.read_text().splitlines()) < ranks):
            assert process.poll() is None
            time.sleep(0.05)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


@pytest.mark.parametrize("case", SLEEPING)
def test_ctrl_c(start, temporary, case):
    process = start(*SLEEPING[case], ranks=2 if case == "ranks" else 1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert said.splitlines()[-1].startswith(f"minitron {SLEEPING[case][0]}: interrupted; ")
    assert "Traceback" not in said
    assert os.listdir(temporary) == []


def test_ctrl_c_while_it_starts(start, tmp_path):
    """From the first line of ours on; what was there before is the interpreter's."""
    process = start("prune", "checkpoint=model", "output_dir=out", wait=False)
    bit = 1 << (signal.SIGINT - 1)
    while not _caught(process.pid) & bit:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 130, said
    assert said == "minitron prune: interrupted; run the same command again\n"


def _caught(process: int) -> int:
    """Signals that a process has a handler for, and is no longer the interpreter's own SIGINT."""
    status = Path(f"/proc/{process}/status").read_text()
    found = int(next(x for x in status.splitlines() if x.startswith("SigCgt")).split()[1], 16)
    return found if found & (1 << (signal.SIGTERM - 1)) else 0


@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_rank_is_named(start, temporary, number):
    process = start(*SLEEPING["ranks"], ranks=2)
    victims = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.environ().get("RANK") == str(number)
    ]
    victims[0].kill()
    before = time.monotonic()
    said = process.communicate(timeout=30)[1]
    assert time.monotonic() - before < 15
    assert process.returncode == 1
    assert f"minitron evaluate: rank {number} was killed (SIGKILL" in said.splitlines()[-1]
    assert "run the same command again" in said.splitlines()[-1]
    assert os.listdir(temporary) == []


def test_what_a_killed_job_left_is_removed_by_the_next(start, tmp_path, temporary):
    process = start(*SLEEPING["one process"])
    (left,) = temporary.iterdir()
    process.kill()
    process.wait()
    assert left.is_dir()
    (tmp_path / "notes").unlink()
    second = start(*SLEEPING["one process"])
    (its,) = temporary.iterdir()
    assert its != left
    assert second.poll() is None


def test_others_keep_their_temporary_files(tmp_path, monkeypatch):
    monkeypatch.delenv("MINITRON_SCRATCH", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "minitron-of-somebody").mkdir()
    with scratch.scratch() as first:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        monkeypatch.delenv("MINITRON_SCRATCH")
        with scratch.scratch() as second:
            assert first.is_dir()
            assert second.is_dir()
        assert not second.exists()
        assert first.is_dir()
    assert sorted(os.listdir(tmp_path)) == ["minitron-of-somebody"]


def test_a_long_tmpdir_is_not_taken(tmp_path, monkeypatch):
    """Helper processes make sockets there, whose paths have at most 107 characters."""
    monkeypatch.delenv("MINITRON_SCRATCH", raising=False)
    long = tmp_path / ("d" * 80)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with scratch.scratch() as folder:
        assert len(str(folder / "pymp-12345678" / "listener-12345678")) <= 107
        assert folder.stat().st_mode & 0o77 == 0


def _swallowing(number: int) -> None:
    try:
        signal.raise_signal(number)
    except BaseException:
        time.sleep(5)


def test_a_library_that_swallows_it_does_not_change_the_ending(monkeypatch):
    monkeypatch.setattr(endings, "_PATIENCE", 0.1)
    with endings.taken("minitron x", lambda: Preempted("asked")):
        with pytest.raises(Interrupted):  # raised again
            _swallowing(signal.SIGINT)
        assert isinstance(endings.asked(), Interrupted)
    with endings.taken("minitron x", lambda: Terminated("asked")):
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # the second one does not disturb the cleaning up
    assert isinstance(endings.asked(), Terminated)


OURS = """
def work(library, number):
    library(number)
    done.append("the next line of ours")
"""
LIBRARY = """
def library(number):
    signal.raise_signal(number)
    time.sleep(pause)
    done.append("the library's own")
"""


@pytest.mark.parametrize("pause", [0.0, 5.0])
def test_a_library_is_not_interrupted_where_it_may_not_throw(monkeypatch, pause):
    """It goes on until it returns to this package, at most for as long as one waits for it."""
    monkeypatch.setattr(endings, "_GRACE", 0.5)
    done: list[str] = []
    ours: dict[str, Any] = {"__name__": "nemo_minitron.work", "done": done}
    its: dict[str, Any] = {
        "__name__": "library",
        "signal": signal,
        "time": time,
        "pause": pause,
        "done": done,
    }
    exec(OURS, ours)
    exec(LIBRARY, its)
    with endings.taken("minitron x", lambda: Terminated("asked")):
        with pytest.raises(Terminated):
            ours["work"](its["library"], signal.SIGTERM)
        assert sys.gettrace() is None
    assert done == ([] if pause else ["the library's own"])


def test_this_package_is_interrupted_at_once(monkeypatch):
    done: list[str] = []
    ours: dict[str, Any] = {"__name__": "nemo_minitron.work", "done": done}
    exec(OURS, ours)
    with endings.taken("minitron x", lambda: Terminated("asked")), pytest.raises(Terminated):
        ours["work"](signal.raise_signal, signal.SIGTERM)
    assert done == []
