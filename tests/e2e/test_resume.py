"""A distillation that is killed and started again ends with the weights of one that was not."""

import contextlib
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from tests.helpers.tiny import LLAMA, read_weights, write_npy, write_result

STUDENT = replace(LLAMA, hidden_size=48, ffn_hidden_size=64, num_layers=2)
STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Student, teacher and data."""
    path = tmp_path_factory.mktemp("resume")
    write_result(path / "teacher", LLAMA, 1)
    write_result(path / "student", STUDENT, 2)
    write_npy(path / "data.npy", 40, 16, LLAMA.vocab_size)
    return path


def _command(folder: Path, name: str) -> list[str]:
    return [
        *(sys.executable, "-m", "nemo_minitron", "distill"),
        f"student={folder}/student",
        f"teacher={folder}/teacher",
        f"output_dir={folder}/{name}",
        f"data.path={folder}/data.npy",
        "data.seq_length=16",
        "data.global_batch_size=4",
        f"trainer.max_steps={STEPS}",
        "trainer.limit_val_batches=0",
        "trainer.save_every_n_steps=2",
        "optim.lr=1e-2",
        "optim.lr_warmup_steps=2",
        # Also what the intermediate losses train and follow comes back.
        "distillation=logit_emb_block",
        "distillation.intermediate.layer_map=[[2,0]]",
    ]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def _is_there(place: Path) -> bool:
    return any(place.parent.glob(place.name))


def _stop_at(command: list[str], place: Path, number: int) -> int:
    """Start, send a signal while ``place`` (its name a pattern) exists, return the exit code.

    The process is halted first: the signal arrives while it still exists, however short that is.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 150
    while True:
        while not _is_there(place):
            assert process.poll() is None, "ended before it could be stopped"
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.05)
        if _is_there(place):
            break
        process.send_signal(signal.SIGCONT)
    helpers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    code = process.wait(timeout=60)
    for helper in helpers:  # Megatron's checkpoint writer has a process that outlives a SIGKILL
        with contextlib.suppress(psutil.NoSuchProcess):
            helper.kill()
    return code


@pytest.fixture(scope="module")
def undisturbed(folder):
    """Weights of a run that nobody stopped."""
    _run(_command(folder, "undisturbed"))
    return read_weights(folder / "undisturbed")


def _same(folder: Path, name: str, want: dict[str, torch.Tensor]) -> None:
    got = read_weights(folder / name)
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert torch.equal(got[key], tensor), key


# What exists in the working folder then: one checkpoint, a half-written second one, nothing yet.
STOPS = {
    "checkpoints/step=2": (signal.SIGTERM, 75),
    "checkpoints/step=4.tmp": (signal.SIGKILL, -9),
    "": (signal.SIGTERM, 75),
}


@pytest.mark.parametrize("step", [4, 6])
def test_killed_while_a_checkpoint_is_written_beside_it(folder, undisturbed, step):
    """The checkpoint before it is taken, and nothing of the unfinished one."""
    name = f"beside{step}"
    command = [*_command(folder, name), "trainer.async_save=true", "trainer.save_top_k=1"]
    checkpoints = folder / f"{name}.partial" / "checkpoints"
    assert _stop_at(command, checkpoints / f"step={step}.*.tmp", signal.SIGKILL) == -9
    assert [path.name for path in checkpoints.glob("step=?")] == [f"step={step - 2}"]
    _run(command)
    _same(folder, name, undisturbed)


@pytest.mark.parametrize("place", STOPS)
def test_stopped_and_started_again(folder, undisturbed, place):
    """It ends bit for bit as an undisturbed run, stopped by SIGTERM or by SIGKILL."""
    number, code = STOPS[place]
    name = f"stopped{len(list(folder.iterdir()))}"
    command, work = _command(folder, name), folder / f"{name}.partial"
    assert _stop_at(command, work / place, number) == code
    assert not (folder / name).exists()
    if not place:
        assert not work.exists()  # there was nothing to go on from
        return
    left = {path.name for path in (work / "checkpoints").iterdir()}
    assert {"step=2", Path(place).name} <= left
    _run(command)
    _same(folder, name, undisturbed)
    assert any(
        not torch.equal(tensor, undisturbed[key])
        for key, tensor in read_weights(folder / "student").items()
    )
