"""A job of several ranks that is told to stop, as SLURM tells it: every process gets the signal."""

import signal
import subprocess
import time

import psutil
import pytest

from tests.e2e.test_resume import STUDENT, _command
from tests.helpers.tiny import LLAMA, write_npy, write_result


@pytest.fixture
def folder(tmp_path):
    write_result(tmp_path / "teacher", LLAMA, 1)
    write_result(tmp_path / "student", STUDENT, 2)
    write_npy(tmp_path / "data.npy", 40, 16, LLAMA.vocab_size)
    return tmp_path


@pytest.mark.timeout(240)
def test_ranks_save_and_exit_with_75(folder):
    """After a checkpoint: Megatron's writer then has a helper process, which must not die of it."""
    steps = ["trainer.max_steps=100000", "optim.lr_warmup_steps=0", "parallel=tp2"]
    command = [*_command(folder, "out"), *steps]
    with open(folder / "said", "w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
    family = [psutil.Process(process.pid)]
    try:
        checkpoints = folder / "out.partial" / "checkpoints"
        deadline = time.monotonic() + 150
        while not (checkpoints / "step=4").exists():
            assert process.poll() is None, (folder / "said").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        family += family[0].children(recursive=True)
        for member in family:
            member.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 75, (folder / "said").read_text()
        psutil.wait_procs(family, timeout=10)
        assert not [member for member in family if member.is_running()]
    finally:
        for member in family:
            if member.is_running():
                member.kill()
    text = (folder / "said").read_text()
    assert "saved at step" in text
    assert "BrokenPipeError" not in text
