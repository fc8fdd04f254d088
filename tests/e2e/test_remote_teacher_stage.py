"""``minitron distill teacher_parallel.own_ranks=1``: the same weights, told to stop or not."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from tests.e2e.test_resume import STEPS, STUDENT, _run
from tests.helpers.tiny import LLAMA, read_weights, write_npy, write_result

OWN = ("parallel.pipeline_model_parallel_size=2", "teacher_parallel.own_ranks=1")
ONE = "teacher_parallel.pipeline_model_parallel_size=1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Student, teacher and data, and the weights that the teacher's usual place gives."""
    path = tmp_path_factory.mktemp("remote")
    write_result(path / "teacher", LLAMA, 1)
    write_result(path / "student", STUDENT, 2)
    write_npy(path / "data.npy", 40, 16, LLAMA.vocab_size)
    _run(_command(path, "usual"))
    return path


def _command(folder: Path, name: str, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "nemo_minitron", "distill"),
        f"student={folder}/student",
        f"teacher={folder}/teacher",
        f"output_dir={folder}/{name}",
        f"data.path={folder}/data.npy",
        "data.seq_length=16",
        "data.global_batch_size=4",
        "data.split=80/20/0",
        f"trainer.max_steps={STEPS}",
        "trainer.limit_val_batches=1",
        "trainer.val_check_interval=4",
        "trainer.save_every_n_steps=2",
        "optim.lr=1e-2",
        "optim.lr_warmup_steps=2",
        *more,
    ]


def _same(folder: Path, name: str) -> None:
    want, got = read_weights(folder / "usual"), read_weights(folder / name)
    for key, tensor in want.items():
        torch.testing.assert_close(got[key], tensor, rtol=1e-3, atol=1e-4, msg=key)
    curves = [
        json.loads((folder / run / "metrics.json").read_text())["history"]
        for run in ("usual", name)
    ]
    for one, other in zip(*curves, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() & {"loss", "val_loss", "val_kd_loss"}:
            assert one[key] == pytest.approx(other[key], rel=1e-4)


@pytest.mark.timeout(300)
def test_same_weights_as_on_the_same_ranks(folder):
    """Training and validation losses and the weights; one place for a result, one log."""
    _run(_command(folder, "own", *OWN, ONE))
    _same(folder, "own")


@pytest.mark.timeout(400)
def test_told_to_stop_it_saves_and_goes_on(folder):
    """Every process gets the signal; the teacher serves until the step is saved."""
    command = _command(folder, "stopped", *OWN, ONE)
    family = _stopped(command, folder / "stopped.partial" / "checkpoints" / "step=2", 75)
    psutil.wait_procs(family, timeout=10)
    assert not [member for member in family if member.is_running()]
    _run(command)
    _same(folder, "stopped")


@pytest.mark.timeout(300)
def test_a_killed_teacher_ends_the_job(folder):
    """Exit code 1 and the rank's number, within 15 seconds."""
    command = _command(folder, "killed", *OWN, ONE, "trainer.max_steps=100000")
    said = folder / "said"
    begin = folder / "killed.partial" / "checkpoints" / "step=2"
    with said.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    _await(process, begin, said)
    teacher = next(child for child in psutil.Process(process.pid).children() if _rank(child) == "2")
    teacher.kill()
    assert process.wait(timeout=15) == 1, said.read_text()
    assert "rank 2 was killed" in said.read_text()


def _rank(process: psutil.Process) -> str | None:
    return process.environ().get("RANK")


def _await(process: "subprocess.Popen[bytes]", place: Path, said: Path) -> None:
    deadline = time.monotonic() + 150
    while not place.exists():
        assert process.poll() is None, said.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _stopped(command: list[str], place: Path, code: int) -> list[psutil.Process]:
    """Start, ask every process to stop once ``place`` exists, and return all of them."""
    said = place.parents[1].with_suffix(".said")
    with said.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    _await(process, place, said)
    family = [psutil.Process(process.pid)]
    family += family[0].children(recursive=True)
    for member in family:
        member.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == code, said.read_text()
    return family
