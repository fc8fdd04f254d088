"""The real Transformer Engine's Python half, in a folder of its own.

``transformer-engine`` itself is a small wheel of pure Python; what it needs to run, a library of
CUDA kernels and an extension for torch, comes in other packages and is not fetched. The folder is
put on the path of the processes of these tests alone: the project's environment does not see it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

# With this, ``pip install`` of an unpinned "transformer-engine" cannot change what is tested.
TRANSFORMER_ENGINE = "transformer-engine==2.20.2"
ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".te-packages"
_PIP_SECONDS = 120


class NoTransformerEngineError(Exception):
    """pip could not fetch the wheel; the message is pip's."""


def te_packages() -> Path:
    """The folder to put on ``PYTHONPATH``, filled on first use.

    Raises:
        NoTransformerEngineError: pip cannot reach the wheel.
    """
    stamp = FOLDER / "complete"
    if stamp.is_file() and stamp.read_text() == TRANSFORMER_ENGINE:
        return FOLDER
    shutil.rmtree(FOLDER, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--retries=1", "--no-deps"]
    command += ["--no-compile", "--target", str(FOLDER), TRANSFORMER_ENGINE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise NoTransformerEngineError(f"{' '.join(command)} took too long") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line]
        raise NoTransformerEngineError(f"pip install failed: {' '.join(lines[-2:])}")
    stamp.write_text(TRANSFORMER_ENGINE)
    return FOLDER


def run_ranks(size: int, job: list[dict[str, Any]], folder: Path, timeout: float) -> list[Any]:
    """Run ``python -m tests.te.ranks`` on ``size`` processes that have Transformer Engine.

    Args:
        size: ranks.
        job: see ``tests/te/ranks.py``.
        folder: existing folder for the job, the answers and the logs.
        timeout: seconds for all of it.

    Returns:
        What every rank wrote, in rank order.

    Raises:
        RuntimeError: a rank failed; holds the end of what it printed.
    """
    (folder / "job.json").write_text(json.dumps(job))
    processes = []
    for rank in range(size):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(te_packages())]),
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
        }
        with (folder / f"rank{rank}.log").open("w") as log:
            command = [sys.executable, "-m", "tests.te.ranks", str(folder)]
            processes.append(
                subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            )
    try:
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, code in enumerate(codes):
        if code:
            text = (folder / f"rank{rank}.log").read_text()
            raise RuntimeError(f"rank {rank} ended with {code}:\n{text[-4000:]}")
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(size)]
