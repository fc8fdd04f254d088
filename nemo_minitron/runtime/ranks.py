"""Who started this process, and starting the ranks when nobody did. Imports no torch."""

import contextlib
import ctypes
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from nemo_minitron.errors import TERMINATED, StageFailed

log = logging.getLogger(__name__)

_STARTED = "MINITRON_STARTED"
"""Set in ranks that ``start_ranks`` started: their input is checked already."""
_VERDICT_FILE = "MINITRON_VERDICT_FILE"
"""Where a process that another minitron started says why it failed. The first rank to fail does:
torchrun itself only ever exits with 0 or 1."""
_LAUNCHER_KEYS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
_PR_SET_PDEATHSIG = 1


def rank() -> int:
    """Global rank of this process; 0 when started alone."""
    return int(os.environ.get("RANK", "0"))


def launched_world_size() -> int | None:
    """Ranks a launcher started; None when this process was started alone."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else None


def check_nodes(wanted: int | None) -> None:
    """Refuse to run on another number of nodes than ``trainer.num_nodes`` says.

    Raises:
        ValueError: names both numbers, and how to get the wanted one.
    """
    env = os.environ
    nodes = 1
    if "RANK" in env:  # torchrun counts its agents, one per node
        nodes = int(env.get("GROUP_WORLD_SIZE") or env.get("SLURM_STEP_NUM_NODES") or 1)
    if wanted is not None and wanted != nodes:
        raise ValueError(
            f"trainer.num_nodes={wanted}, but this runs on {nodes}: `minitron submit` it, or "
            f"sbatch --nodes={wanted}, or leave trainer.num_nodes out"
        )


def started_by_us() -> bool:
    """Whether ``start_ranks`` started this process."""
    return _STARTED in os.environ


def adopt_slurm() -> None:
    """Under srun with several tasks, say who this rank is in torch's variables.

    Only inside a job step: an sbatch script sees SLURM_NTASKS and SLURM_PROCID too, but is alone.
    """
    env = os.environ
    in_step = "SLURM_STEP_ID" in env or "SLURM_JOB_ID" not in env
    tasks = int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or 1)
    if "RANK" in env or "SLURM_PROCID" not in env or not in_step or tasks < 2:
        return
    env["RANK"] = env["SLURM_PROCID"]
    env["WORLD_SIZE"] = str(tasks)
    env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
    env.setdefault("MASTER_ADDR", _first_node(env))
    step = int(env.get("SLURM_STEP_ID", "0"))
    env.setdefault(
        "MASTER_PORT", str(20000 + (int(env.get("SLURM_JOB_ID", "0")) * 31 + step) % 20000)
    )


def _first_node(env: Mapping[str, str]) -> str:
    """Host of rank 0. The batch node's address stands in for names that do not resolve."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    name = "".join(part or "" for part in match.groups()) if match else ""
    with contextlib.suppress(OSError):
        if name:
            socket.gethostbyname(name)
            return name
    return env.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")


def alone(env: Mapping[str, str]) -> dict[str, str]:
    """Environment for a process that is to stand alone, whatever launched this one."""
    return {key: value for key, value in env.items() if key not in (*_LAUNCHER_KEYS, _STARTED)}


def visible_gpus() -> int:
    """GPUs this process may use, found without torch; 0 on a CPU-only machine."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    if visible is None or not present:
        return present
    return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])


def check_fits(world_size: int) -> None:
    """Refuse more ranks than this machine has GPUs.

    Raises:
        ValueError: there are GPUs, but fewer than ranks.
    """
    gpus = visible_gpus()
    if 0 < gpus < world_size:
        raise ValueError(
            f"the layout needs {world_size} ranks but this machine shows {gpus} GPUs; make the "
            "parallel.* degrees smaller, or start the ranks with srun or torchrun on more nodes"
        )


def start_ranks(world_size: int, arguments: Sequence[str]) -> None:
    """Run ``minitron <arguments>`` in ``world_size`` ranks on this machine.

    Raises:
        StageFailed: with the exit code and the message of the first rank that failed.
    """
    env = {**os.environ, _STARTED: "1"}
    if not visible_gpus():
        cores = len(os.sched_getaffinity(0))
        env.setdefault("OMP_NUM_THREADS", str(max(1, cores // world_size)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--local-addr", "127.0.0.1", f"--nproc-per-node={world_size}"]
    log.info("starting %d ranks", world_size)
    run_minitron(command, arguments, env)


def run_minitron(launcher: Sequence[str], arguments: Sequence[str], env: Mapping[str, str]) -> None:
    """Run ``<launcher> -m nemo_minitron <arguments>`` to its end.

    Raises:
        StageFailed: with the exit code and the message of the process that failed (first).
    """
    with tempfile.TemporaryDirectory(prefix="minitron-") as folder:
        verdict = Path(folder) / "verdict.json"
        command = [*launcher, "-m", "nemo_minitron", *arguments]
        code = supervise(command, {**env, _VERDICT_FILE: str(verdict)})
        if code and verdict.exists():
            said = json.loads(verdict.read_text())
            raise StageFailed(said["message"], said["code"])
        if code == TERMINATED:  # before it could say so
            raise StageFailed("ended by a signal; run the same command again", code)
        if code:
            raise StageFailed(f"it was killed (exit code {code}); run the same command again", 1)


def leave_verdict(code: int, message: str) -> None:
    """Tell the minitron that started this process why it failed, unless another rank did."""
    if _VERDICT_FILE in os.environ:
        with contextlib.suppress(OSError), open(os.environ[_VERDICT_FILE], "x") as file:
            json.dump({"code": code, "message": message}, file)


def supervise(command: Sequence[str], env: Mapping[str, str]) -> int:
    """Run a command to its end; what would end this process ends the command first.

    Returns:
        Its exit code, 128 + n when signal n killed it; 143 when it failed after SIGTERM was passed
        on to it (torchrun answers that with 1).
    """
    # Its own session: Ctrl-C then reaches it once, from here, and not also from the terminal.
    child = subprocess.Popen(
        command, env=dict(env), start_new_session=True, preexec_fn=die_with_parent
    )
    with _forwarded_signals(child) as passed_on:
        code = child.wait()
    if code and signal.SIGTERM in passed_on:
        return TERMINATED
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def _forwarded_signals(child: "subprocess.Popen[bytes]") -> Iterator[set[int]]:
    """Pass signals on. All but Ctrl-C become SIGTERM: the one that torchrun passes on in turn.

    Yields:
        Those that were passed on.
    """
    passed_on: set[int] = set()

    def forward(number: int, _: FrameType | None) -> None:
        sent = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        passed_on.add(sent)
        child.send_signal(sent)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield passed_on
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies, so that no rank outlives a kill -9."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
