"""A real SLURM on this machine: munged, slurmctld and one slurmd per emulated node.

Everything lies in a folder of its own and listens on free ports of the loopback, so clusters do not
disturb each other, nor a SLURM that the machine belongs to.
"""

import contextlib
import getpass
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

TOOLS = ("slurmctld", "slurmd", "munged", "mungekey", "sbatch", "srun", "scontrol", "squeue")
REPO = Path(__file__).parents[2]

CONF = """
ClusterName=minitron
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=10
CredType=cred/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
# Looks at the queue often (and cred_expire is how long a requeued job waits).
SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2
SlurmdTimeout=600
MessageTimeout=60
KillWait={kill_wait}
MinJobAge=7200
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
{nodes}
PartitionName=low Nodes={names} Default=YES PriorityTier=1 MaxTime=INFINITE GraceTime=300
PartitionName=high Nodes={names} PriorityTier=10 MaxTime=INFINITE PreemptMode=OFF
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
    "CPUs=4 RealMemory=64000 Gres=gpu:2"
)


def missing() -> list[str]:
    """Programs that are not installed."""
    return [tool for tool in TOOLS if shutil.which(tool, path=_path()) is None]


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


class Cluster:
    """Nodes of two GPUs each (SLURM counts them; nothing looks for them), two partitions.

    Jobs in ``high`` pre-empt those in ``low``, which are told with SIGTERM.

    Args:
        nodes: how many.
        kill_wait: seconds between SIGTERM and SIGKILL; long, as the machine may be slow.
    """

    def __init__(self, nodes: int = 2, kill_wait: int = 60) -> None:
        self.names = [f"n{number + 1}" for number in range(nodes)]
        self._kill_wait = kill_wait
        # Not pytest's folder: a socket's path may have 107 characters, and munge wants it public.
        self.folder = Path(tempfile.mkdtemp(prefix="minitron-slurm-"))
        self.folder.chmod(0o755)
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start the daemons and wait until the nodes are idle."""
        self._write_conf()
        socket_path = self.folder / "munge.sock"
        key = self.folder / "munge.key"
        self._call(["mungekey", "-c", "-k", str(key)])
        files = [f"--{x}-file={self.folder}/munge.{x}" for x in ("log", "pid", "seed")]
        munge = [f"--socket={socket_path}", f"--key-file={key}", *files, "--num-threads=2"]
        self._daemon("munged", "--foreground", "--force", *munge)
        wait(socket_path.exists, "munged to listen")
        self._daemon("slurmctld", "-D")
        for name in self.names:
            self._daemon("slurmd", "-D", "-N", name)
        wait(lambda: self._nodes() == {"idle"}, "idle nodes", self._said)

    def _write_conf(self) -> None:
        host = socket.gethostname().split(".")[0]
        ports = free_ports(len(self.names) + 1)
        nodes = [
            NODE.format(name=name, host=host, port=port)
            for name, port in zip(self.names, ports[1:], strict=True)
        ]
        text = CONF.format(
            folder=self.folder,
            host=host,
            user=getpass.getuser(),
            controller=ports[0],
            nodes="\n".join(nodes),
            names=",".join(self.names),
            kill_wait=self._kill_wait,
        )
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(text)
        for number in range(2):  # what stands for the devices
            (self.folder / f"gpu{number}").touch()
        gres = f"AutoDetect=off\nName=gpu File={self.folder}/gpu[0-1]\n"
        (self.folder / "gres.conf").write_text(gres)

    def _daemon(self, *command: str) -> None:
        with open(self.folder / "daemons.log", "a") as log:
            daemon = subprocess.Popen(
                command, env=self.environment(), stdout=log, stderr=log, start_new_session=True
            )
        self._daemons.append(daemon)

    def kill_node(self, name: str) -> None:
        """What a node that loses its power does: its daemon and whatever runs on it are gone."""
        there = {"SLURMD_NODENAME": name, "SLURM_CONF": str(self.folder / "slurm.conf")}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if there.items() <= process.environ().items():
                    above = process.parent()
                    if above is not None and above.name() == "slurmstepd":
                        above.kill()
                    process.kill()
        for daemon in self._daemons:
            if isinstance(daemon.args, tuple) and daemon.args[-1] == name:
                daemon.kill()

    def _nodes(self) -> set[str]:
        done = self._run(["sinfo", "-h", "-N", "-p", "low", "-o", "%T"])
        return {line.strip() for line in done.stdout.splitlines()}

    def _said(self) -> str:
        return "\n".join(path.read_text()[-2000:] for path in sorted(self.folder.glob("*.log")))

    def stop(self) -> None:
        """End every job, then the daemons, whatever they are doing; remove the folder."""
        try:
            self._run(["scancel", "--full", "-s", "KILL", "-u", getpass.getuser()])
            self._run(["scancel", "-u", getpass.getuser()])
            wait(lambda: not self._run(["squeue", "-h"]).stdout.strip(), "an empty queue", limit=60)
        except (AssertionError, OSError, subprocess.SubprocessError):
            pass  # the daemons have to go anyway
        finally:
            for daemon in reversed(self._daemons):
                daemon.terminate()
            for daemon in self._daemons:
                try:
                    daemon.wait(timeout=30)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
            shutil.rmtree(self.folder, ignore_errors=True)

    def environment(self, **more: str) -> dict[str, str]:
        """Environment of a user of this cluster who runs on bare metal."""
        ours = ("SLURM", "SBATCH", "SRUN", "CONTAINER", "MINITRON", "MASTER_")
        env = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTEST_CURRENT_TEST"):
            env.pop(name, None)
        env |= {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _path()}
        minitron = Path(sys.executable).parent / "minitron"
        env |= {"PYTHONPATH": str(REPO), "CONTAINER_IMAGE": "none", "MINITRON": str(minitron)}
        return {**env, **more}

    def _run(self, command: Sequence[str], **keywords: Any) -> "subprocess.CompletedProcess[str]":
        keywords = {"env": self.environment(), "cwd": REPO, **keywords}
        return subprocess.run(command, capture_output=True, text=True, timeout=120, **keywords)

    def _call(self, command: Sequence[str], **keywords: object) -> str:
        done = self._run(command, **keywords)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def sbatch(self, *arguments: str, env: Mapping[str, str] | None = None) -> str:
        """Submit; returns the job id."""
        text = self._call(["sbatch", "--parsable", *arguments], env=self.environment(**(env or {})))
        return text.strip()

    def scontrol(self, *arguments: str) -> None:
        """Change something."""
        self._call(["scontrol", *arguments])

    def scancel(self, *jobs: str) -> None:
        """Cancel jobs."""
        self._call(["scancel", *jobs])

    def job(self, number: str) -> dict[str, str]:
        """What the controller says of a job, finished ones too: ``JobState``, ``ExitCode``, ..."""
        # The number of an array, which is that of one of its jobs as well, shows them all.
        found = self._show(number)
        return next(job for job in found if job["JobId"] == number)

    def jobs(self, name: str) -> list[dict[str, str]]:
        """All jobs of a name."""
        return [job for job in self._show() if job.get("JobName") == name]

    def _show(self, *number: str) -> list[dict[str, str]]:
        lines = self._call(["scontrol", "show", "job", "-o", *number]).splitlines()
        return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines]

    def wait(self, number: str, *states: str, limit: float = 600) -> dict[str, str]:
        """Wait until a job is in one of the states; returns what is said of it then."""
        wait(
            lambda: self.job(number)["JobState"] in states,
            f"job {number} to be {' or '.join(states)}",
            lambda: f"{self.job(number)}\n{self.log(number)}",
            limit,
            lambda: self.job(number)["JobState"] in {*ENDED} - {*states},
        )
        return self.job(number)

    def log(self, number: str) -> str:
        """What the job printed so far."""
        path = Path(self.job(number)["StdOut"])
        return path.read_text() if path.exists() else ""


ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


def wait(
    condition: Callable[[], bool],
    what: str,
    said: Callable[[], str] = str,
    limit: float = 120,
    hopeless: Callable[[], bool] = bool,
) -> None:
    """Poll until the condition holds.

    Raises:
        AssertionError: it did not within ``limit`` seconds, or is ``hopeless``.
    """
    deadline = time.monotonic() + limit
    while not condition():
        late = time.monotonic() > deadline
        if late or hopeless():
            if not late and condition():  # it came true between the two looks
                return
            raise AssertionError(f"waited for {what} in vain: {said()}")
        time.sleep(0.3)


def free_ports(number: int) -> list[int]:
    """TCP ports of the loopback that nobody listens on."""
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
