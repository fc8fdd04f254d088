"""The oracle's own environment: ModelOpt beside the packages that are already installed.

ModelOpt patches what it imports and pins what it likes, so it never enters the project's
environment. Its virtual environment sees the project's packages through a ``.pth`` file: only
ModelOpt and what it misses are downloaded (about 30 MB instead of 2 GB).

``python -m tests.oracle.environment`` makes it by hand and prints the interpreter.
"""

import fcntl
import json
import os
import shutil
import site
import subprocess
import sys
from pathlib import Path
from typing import Any

# The last release whose Minitron plugin imports without Transformer Engine.
MODELOPT = "nvidia-modelopt==0.43.0"
ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".oracle-venv"
SCRIPT = Path(__file__).with_name("modelopt_prune.py")
_PIP_SECONDS = 300


class OracleUnavailableError(Exception):
    """pip could not fetch ModelOpt; the message is pip's."""


def oracle_python() -> Path:
    """Interpreter of the oracle's environment, made on first use.

    Raises:
        OracleUnavailableError: pip cannot reach ModelOpt.
    """
    with Path(f"{FOLDER}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two processes of the suite may want it at once
        return _made()


def _made() -> Path:
    python = FOLDER / "bin" / "python"
    packages = "\n".join(site.getsitepackages())
    stamp = FOLDER / "complete"
    wanted = f"{MODELOPT}\n{packages}\n"
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    shutil.rmtree(FOLDER, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", FOLDER], check=True)
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    purelib = subprocess.check_output([python, "-c", query], text=True).strip()
    # Appended to the path, so what is installed here comes first. pip itself is found through it.
    (Path(purelib) / "project.pth").write_text(packages + "\n")
    _pip_install(python)
    stamp.write_text(wanted)
    return python


def _pip_install(python: Path) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", "--retries=1", MODELOPT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise OracleUnavailableError(
            f"pip install {MODELOPT} took over {_PIP_SECONDS} s"
        ) from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line]
        raise OracleUnavailableError(f"pip install {MODELOPT} failed: {' '.join(lines[-2:])}")


def run_oracle(
    job: dict[str, Any],
    folder: Path,
    *,
    timeout: float,
    threads: int = 1,
    script: Path = SCRIPT,
) -> None:
    """Run ``modelopt_prune.py`` (or another script) on a job; its files appear in ``folder``.

    Args:
        job: see the script.
        folder: existing folder for the job and the results.
        timeout: seconds.
        threads: per process.
        script: run by the oracle's interpreter, with ``folder`` as its argument.

    Raises:
        OracleUnavailableError: see ``oracle_python``.
        RuntimeError: the oracle failed; holds the end of what it printed.
    """
    python = oracle_python()
    (folder / "job.json").write_text(json.dumps(job))
    log = folder / "oracle.log"
    environment = {
        # Not the project's: its modules are for this environment.
        **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        "OMP_NUM_THREADS": str(threads),
    }
    with log.open("w") as output:
        done = subprocess.run(
            [python, script, folder],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            timeout=timeout,
        )
    if done.returncode:
        raise RuntimeError(f"the oracle failed; the end of {log}:\n{log.read_text()[-4000:]}")


if __name__ == "__main__":
    sys.stdout.write(f"{oracle_python()}\n")
