"""Detect the launcher of this process, and start the ranks without one. Imports no torch."""

import contextlib
import json
import logging
import os
import re
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from nemo_minitron.runtime.errors import (
    BAD_INPUT,
    INTERRUPTED,
    PREEMPTED,
    TERMINATED,
    StageFailed,
)
from nemo_minitron.runtime.supervise import killed_by, supervise

log = logging.getLogger(__name__)

_STARTED = "MINITRON_STARTED"
"""Set in ranks that ``start_ranks`` started: their input is checked already."""
_VERDICT_FILE = "MINITRON_VERDICT_FILE"
"""File in which the first rank to fail says why, for the minitron that started it."""
_STORE = "MINITRON_STORE"
"""File that says where ranks started by ``start_ranks`` meet."""
_ADVICE = "start all ranks with srun or torchrun, or unset RANK and LOCAL_RANK"
_teacher_ranks = 0
_LAUNCHER_KEYS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def rank() -> int:
    """Return the global rank of this process; 0 when started alone."""
    return int(os.environ.get("RANK", "0"))


def launched_world_size() -> int | None:
    """Return ranks a launcher started, those of the teacher aside; None when started alone."""
    total = launched_ranks()
    return None if total is None else total - _teacher_ranks


def launched_ranks() -> int | None:
    """Return all ranks a launcher started; None when this process was started alone.

    Raises:
        ValueError: half of what a launcher says is in the environment.
    """
    if "RANK" not in os.environ:
        return None
    if not os.environ.get("WORLD_SIZE"):
        raise ValueError(
            f"RANK={os.environ['RANK']} is in the environment without WORLD_SIZE; {_ADVICE}"
        )
    return int(os.environ["WORLD_SIZE"])


def check_launcher() -> None:
    """Refuse an environment that does not say which of how many ranks this process is.

    Raises:
        ValueError: names the variable.
    """
    for name in ("RANK", "LOCAL_RANK", *(("WORLD_SIZE",) if "RANK" in os.environ else ())):
        value = os.environ.get(name, "0")
        if not value.strip().isdecimal() and (value or name != "WORLD_SIZE"):
            raise ValueError(f"{name}={value} in the environment is not a number; {_ADVICE}")
    total = launched_ranks()
    if total is not None and rank() >= total:
        raise ValueError(
            f"RANK={rank()} in the environment must be below WORLD_SIZE={total}; {_ADVICE}"
        )


def check_meeting_point() -> None:
    """Refuse ranks that could not find each other, before any of them has work to lose.

    Raises:
        ValueError: names the variable of the launcher that is missing.
    """
    total = launched_ranks()
    if total is None or started_by_us() or _have_met():
        return
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ValueError(
                f"RANK={rank()} and WORLD_SIZE={total} are in the environment without {name}, "
                f"where the ranks meet; {_ADVICE}"
            )


def _have_met() -> bool:
    """Whether the program that calls this one has made the process group itself."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def set_teacher_ranks(count: int) -> None:
    """Say how many of the last ranks run the teacher alone.

    Raises:
        ValueError: the launcher started too few ranks.
    """
    global _teacher_ranks
    total = launched_ranks()
    if count and total is not None and count >= total:
        raise ValueError(
            f"teacher_parallel.own_ranks={count} leaves none of the {total} ranks that the "
            "launcher started to the student; start more, or make it smaller"
        )
    _teacher_ranks = count


def teacher_ranks() -> int:
    """Return how many of the last ranks run the teacher alone."""
    return _teacher_ranks


def runs_teacher_alone() -> bool:
    """Whether this process is a rank that runs the teacher alone."""
    total = launched_ranks()
    return total is not None and rank() >= total - _teacher_ranks


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
    """Set torch's variables for this rank under srun with several tasks.

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
    """Return host of rank 0. The batch node's address stands in for names that do not resolve."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodes)  # up to a comma outside of brackets
    name = re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0] if first else "")
    with contextlib.suppress(OSError):
        if name:
            socket.gethostbyname(name)
            return name
    return env.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")


def alone(env: Mapping[str, str]) -> dict[str, str]:
    """Return an environment for a process that is to stand alone, whatever launched this one."""
    return {key: value for key, value in env.items() if key not in (*_LAUNCHER_KEYS, _STARTED)}


def visible_gpus() -> int:
    """Return GPUs this process may use, found without torch; 0 on a CPU-only machine."""
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
    cores = 1 if visible_gpus() else max(1, len(os.sched_getaffinity(0)) // world_size)
    shared = {"OMP_NUM_THREADS": str(cores), **os.environ, _STARTED: "1"}
    shared |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    ranks = [{**shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world_size)]
    log.info("starting %d ranks", world_size)
    _run(arguments, ranks, "rank {}")


def run_minitron(arguments: Sequence[str], env: Mapping[str, str]) -> None:
    """Run ``minitron <arguments>`` to its end, in a process of its own.

    Raises:
        StageFailed: with the exit code and the message of the process.
    """
    _run(arguments, [env], "it")


def _run(arguments: Sequence[str], environments: Sequence[Mapping[str, str]], name: str) -> None:
    with tempfile.TemporaryDirectory(prefix="minitron-", ignore_cleanup_errors=True) as folder:
        verdict = Path(folder) / "verdict.json"
        here = {_VERDICT_FILE: str(verdict), _STORE: str(Path(folder) / "store")}
        command = [sys.executable, "-m", "nemo_minitron", *arguments]
        outcome = supervise(command, [{**env, **here} for env in environments])
        said = json.loads(verdict.read_text()) if verdict.exists() else {}
    if outcome.killed is not None:
        number, by = outcome.killed
        raise StageFailed(f"{name.format(number)} {killed_by(by)}", 1)
    if not outcome.code:
        return
    # Told to end, ranks may see first that another one has gone.
    if said and (not outcome.told or said["code"] in (BAD_INPUT, PREEMPTED, outcome.code)):
        raise StageFailed(said["message"], said["code"])
    if outcome.code == INTERRUPTED:
        raise StageFailed("interrupted; run the same command again", INTERRUPTED)
    if outcome.code == TERMINATED:  # before it could say so
        raise StageFailed("ended by a signal; run the same command again", TERMINATED)
    raise StageFailed(f"ended with exit code {outcome.code} without saying why", outcome.code)


def leave_verdict(code: int, message: str) -> None:
    """Tell the minitron that started this process why it failed, unless another rank did."""
    if _VERDICT_FILE in os.environ:
        draft = Path(f"{os.environ[_VERDICT_FILE]}.{os.getpid()}")
        with contextlib.suppress(OSError):
            draft.write_text(json.dumps({"code": code, "message": message}))
            os.link(draft, os.environ[_VERDICT_FILE])  # whole, and only if there is none
        with contextlib.suppress(OSError):
            draft.unlink()


def store_address() -> Path | None:
    """File in which rank 0 says where the others find it; None where a launcher says that."""
    return Path(os.environ[_STORE]) if started_by_us() and _STORE in os.environ else None
