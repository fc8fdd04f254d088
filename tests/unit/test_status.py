"""``minitron status``: what it reads from the files of runs in every state."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_minitron.checkpoint.artifact import output_folder
from nemo_minitron.checkpoint.progress import write_progress
from nemo_minitron.cli import main
from nemo_minitron.config.stages import FinetuneConfig
from nemo_minitron.config.training import DataConfig
from nemo_minitron.runtime.console import log_file
from nemo_minitron.runtime.errors import Preempted, StageFailed

SAID = {
    "step": 30,
    "max_steps": 120,
    "loss": 1.25,
    "tokens": 61440.0,
    "tokens_per_second": 2048.0,
    "seconds_per_step": 41.0,
    "slow": "rank 5 on node-3, 1.31 times the median",
}


class Run:
    """A training that is in ``step`` 30 of 120 when something happens."""

    def __init__(self, folder: Path) -> None:
        (folder / "model").mkdir()
        (folder / "model" / "file").write_text("x")
        data = DataConfig(path=str(folder / "model" / "file"))
        self.place = folder / "pipe" / "tuned"
        self.cfg = FinetuneConfig(
            output_dir=str(self.place), checkpoint=str(folder / "model"), data=data
        )

    def run(self, happens=lambda work: None) -> None:
        log = self.place.with_name("tuned.log")
        with log_file(log), output_folder(self.cfg, "finetune", resumable=True) as work:
            write_progress(work, **SAID)
            for step in (20, 25):
                (work / "checkpoints" / f"step={step}").mkdir(parents=True, exist_ok=True)
            (work / "checkpoints" / "step=30.1234.tmp").mkdir(exist_ok=True)
            happens(work)


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path)


@pytest.fixture
def status(run, capsys):
    """Run ``minitron status``: what it says of the stage, and the JSON of it."""

    def read(place=None):
        assert main(["status", str(place or run.place)]) == 0
        text = capsys.readouterr().out
        assert main(["status", "--json", str(place or run.place)]) == 0
        (found,) = json.loads(capsys.readouterr().out)
        assert all(len(line) <= 80 for line in text.splitlines())
        return found, text

    return read


def fail(error: BaseException):
    def happens(work):
        raise error

    return happens


def test_a_run_that_goes_on(run, status):
    def look(work):
        found, text = status()
        assert {key: found[key] for key in ("stage", "state", "step", "steps", "loss")} == {
            "stage": "finetune",
            "state": "running",
            "step": 30,
            "steps": 120,
            "loss": 1.25,
        }
        assert (found["checkpoint"], found["error"], found["seconds_left"]) == (25, None, 3690.0)
        assert 0 <= found["checkpoint_age"] < 100
        lines = text.splitlines()
        assert lines[:4] == [
            "tuned  finetune  running",
            "  step 30 of 120 (25%)  loss 1.2500  left 1:01:30",
            "  tokens 61,440 at 2,048 per second",
            "  slow: rank 5 on node-3, 1.31 times the median",
        ]
        assert lines[4].startswith("  checkpoint of step 25, 0:0")
        assert status(run.place.parent)[0]["run"] == "pipe/tuned"  # as a stage of a pipeline
        old = time.time() - 3600
        os.utime(work / "logs" / "status.json", (old, old))
        assert status()[0]["state"] == "hung"
        for patient in ({"hang_after_minutes": 120}, {"log_every_n_steps": 60}):
            write_progress(work, step=30, loss=1.25, seconds_per_step=30.0, **patient)
            os.utime(work / "logs" / "status.json", (old, old))
            assert status()[0]["state"] == "running"

    run.run(look)
    found, text = status()
    assert (found["state"], found["loss"], found["seconds_left"]) == ("finished", 1.25, None)
    assert "left" not in text


@pytest.mark.parametrize(
    ("error", "state", "said"),
    [
        (Preempted("a signal; saved at step 30"), "stopped", "Preempted: a signal; saved at step"),
        (StageFailed("stopped early (a signal); run", 75), "stopped", "StageFailed: stopped early"),
        (RuntimeError("no more\nroom " * 40), "failed", "RuntimeError: no more"),
    ],
)
def test_a_run_that_has_ended(run, status, error, state, said):
    with pytest.raises(type(error)):
        run.run(fail(error))
    found, text = status()
    assert (found["state"], found["step"]) == (state, 30)
    assert found["error"].partition(" ")[2].startswith(said)
    assert "last error" in text
    with open(run.place.with_name("tuned.log"), "a") as log:  # goes on, and is killed
        log.write("2026-01-02 03:04:05,678 INFO rank 0 nemo_minitron.x: going on\n")
    assert [status()[0][key] for key in ("state", "error")] == ["failed", "ended without a word"]


def test_no_run(tmp_path, capsys):
    assert main(["status", str(tmp_path / "nothing")]) == 2
    assert f"no stage has written {tmp_path / 'nothing'}" in capsys.readouterr().err
    assert main(["status"]) == 2
    assert "minitron status RUN [--json]" in capsys.readouterr().err


def test_it_is_light():
    said = "import sys; from nemo_minitron.cli import main; main(['status', '/none']); "
    heavy = "print({'torch', 'numpy', 'hydra', 'rich'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", said + heavy], capture_output=True, text=True)
    assert done.stdout == "set()\n"
