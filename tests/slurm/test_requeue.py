"""Jobs that are told to stop, on a real SLURM: pre-emption, time limits, cancelling, failing."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers.tiny import LLAMA, read_weights, write_npy, write_result
from tests.slurm.cluster import Cluster, wait

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

STUDENT = replace(LLAMA, hidden_size=48, ffn_hidden_size=64, num_layers=2)
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2", "--cpus-per-task=1")
SMALL = ("--ntasks=1", "--cpus-per-task=1")

# Stands for `minitron import`: what the scripts do about a stage is seen without waiting for one.
STAGE = """#!/bin/sh
echo "start ${{SLURM_RESTART_COUNT:-0}}"
trap '{on_term}' TERM
[ -e "{folder}/saved" ] && exit 0
{body}
"""
SLEEP = "while :; do sleep 0.2; done"


def sbatch(
    slurm: Cluster,
    folder: Path,
    stage: str,
    flags: "tuple[str, ...]",
    *keys: str,
    env: Mapping[str, str] | None = None,
) -> str:
    """Submit a script of launch/, its log into ``folder``."""
    logs = f"--output={folder}/%x_%j.log"
    return slurm.sbatch(logs, "--time=60", *flags, f"launch/{stage}.sbatch", *keys, env=env)


class Stages:
    """Submits ``launch/import.sbatch`` with a stand-in for the command."""

    def __init__(self, slurm: Cluster, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder

    def submit(self, name: str, *flags: str, on_term: str = "exit 143", body: str = SLEEP) -> str:
        folder = self.folder / name
        folder.mkdir()
        script = folder / "stage"
        script.write_text(STAGE.format(on_term=on_term, body=body, folder=folder / "out"))
        script.chmod(0o755)
        env = {"MINITRON": str(script), "MINITRON_MAX_IDLE_STARTS": "2"}
        logs = (f"--output={folder}/%x_%j.log", "--time=60", *SMALL, *flags)
        keys = (f"output_dir={folder}/out",)
        return self.slurm.sbatch(*logs, "launch/import.sbatch", *keys, env=env)


@pytest.fixture(scope="module")
def stages(slurm, tmp_path_factory) -> Stages:
    return Stages(slurm, tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module")
def at_the_limit(stages) -> "dict[str, str]":
    """Jobs that wait for their time limit while the other tests run."""
    limit = ("--time=1", "--signal=TERM@40")
    save = (
        "mkdir -p {0}.partial && echo x > {0}.partial/half && mkdir {0} && touch {0}/saved; exit 75"
    )
    out = stages.folder / "saves" / "out"
    return {
        "saves": stages.submit("saves", *limit, on_term=save.format(out)),
        "saves nothing": stages.submit("nothing", *limit),
        "is deaf": stages.submit("deaf", *limit, on_term=""),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory, at_the_limit) -> Path:
    """Student, teacher and data."""
    path = tmp_path_factory.mktemp("distill")
    write_result(path / "teacher", LLAMA, 1)
    write_result(path / "student", STUDENT, 2)
    write_npy(path / "data.npy", 64, 16, LLAMA.vocab_size)
    return path


def distill(folder: Path, name: str) -> "list[str]":
    return [
        f"student={folder}/student",
        f"teacher={folder}/teacher",
        f"output_dir={folder}/{name}",
        f"data.path={folder}/data.npy",
        "data.seq_length=16",
        "data.global_batch_size=4",
        "trainer.max_steps=12",
        "trainer.limit_val_batches=0",
        "trainer.save_every_n_steps=2",
        "optim.lr=1e-2",
        "parallel=tp2",
    ]


def held(folder: Path) -> "dict[str, str]":
    """Environment of a job that goes no further than three steps while ``folder/hold`` is there."""
    script, hold = folder / "held", folder / "hold"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.slurm.held "$@"\n')
    script.chmod(0o755)
    hold.touch()
    return {"MINITRON": str(script), "HOLD": str(hold)}


def test_a_preempted_distillation_ends_as_an_undisturbed_one(slurm, folder):
    """TP 2 over 2 nodes; a job of a partition with more priority pre-empts them."""
    undisturbed = sbatch(slurm, folder, "distill", TWO_NODES, *distill(folder, "undisturbed"))
    assert slurm.wait(undisturbed, "COMPLETED")["ExitCode"] == "0:0"
    keys, env = distill(folder, "stopped"), held(folder)
    number = sbatch(slurm, folder, "distill", TWO_NODES, *keys, env=env)
    saved = folder / "stopped.partial" / "checkpoints" / "step=2"
    wait(saved.exists, "a checkpoint", lambda: slurm.log(number), 600)
    urgent = slurm.sbatch("-p", "high", "--output=/dev/null", *TWO_NODES, "--wrap", "true")
    wait(lambda: slurm.job(number)["PreemptTime"] != "None", "SLURM to pre-empt the job")
    Path(env["HOLD"]).unlink()
    assert slurm.wait(urgent, "COMPLETED")["ExitCode"] == "0:0"
    done = slurm.wait(number, "COMPLETED")
    assert (done["ExitCode"], done["Restarts"]) == ("0:0", "1")
    said = slurm.log(number)
    assert "saved at step" in said
    assert f"requeueing job {number}" in said
    assert "going on from" in said
    assert not list(folder.glob("*.idle_starts"))
    want = read_weights(folder / "undisturbed")
    got = read_weights(folder / "stopped")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], tensor) for key, tensor in want.items())
    before = read_weights(folder / "student")
    assert any(not torch.equal(before[key], tensor) for key, tensor in want.items())


def test_a_failing_stage_stops_the_chain(slurm, folder):
    keys = (f"checkpoint={folder}/teacher", "pruning.drop_layers=[9]")
    prune = sbatch(slurm, folder, "prune", SMALL, *keys, f"output_dir={folder}/bad")
    after = (f"--dependency=afterok:{prune}", *SMALL)
    export = sbatch(slurm, folder, "export", after, f"checkpoint={folder}/bad", "output_dir=out")
    failed = slurm.wait(prune, "FAILED")
    assert (failed["ExitCode"], failed["Restarts"]) == ("2:0", "0")
    last = slurm.log(prune).splitlines()[-1]
    assert last.startswith("minitron prune: pruning.drop_layers holds [9], out of range")
    wait(lambda: slurm.job(export)["Reason"] == "DependencyNeverSatisfied", "the chain to stop")
    assert slurm.job(export)["JobState"] == "PENDING"
    slurm.scancel(export)


def test_a_job_that_never_gets_on_is_not_requeued_for_ever(slurm, stages):
    number = stages.submit("idle", body="exit 143")
    done = slurm.wait(number, "FAILED")
    assert (done["ExitCode"], done["Restarts"]) == ("1:0", "1")
    assert "stopped 2 times in a row before anything new was saved" in slurm.log(number)


def test_a_task_of_an_array_requeues_itself_alone(slurm, stages):
    """Of two tasks the last one has the id of the array; it stops while the other one runs."""
    first = "${SLURM_ARRAY_TASK_ID}${SLURM_RESTART_COUNT:-0}"
    body = f'[ "{first}" = 10 ] && exit 143; sleep 10; exit 0'
    number = stages.submit("array", "--array=0-1", body=body)

    def tasks() -> "list[dict[str, str]]":
        return [job for job in slurm.jobs("minitron-import") if job.get("ArrayJobId") == number]

    ended = ("COMPLETED", "FAILED")
    wait(lambda: all(task["JobState"] in ended for task in tasks()), "both tasks to end", limit=300)
    ends = {task["ArrayTaskId"]: (task["JobState"], task["Restarts"]) for task in tasks()}
    assert ends == {"0": ("COMPLETED", "0"), "1": ("COMPLETED", "1")}


def test_a_cancelled_job_stays_cancelled(slurm, stages):
    number = stages.submit("cancelled", on_term="exit 75")
    wait(lambda: "start 0" in slurm.log(number), "the job to start")
    slurm.scancel(number)
    wait(lambda: "COMPLETING" not in slurm.job(number)["JobState"], "the job to end")
    assert slurm.wait(number, "CANCELLED")["Restarts"] == "0"


def test_time_limit(slurm, at_the_limit):
    """Saved work goes on in the same job; without any the job fails, and says what to do."""
    done = slurm.wait(at_the_limit["saves"], "COMPLETED")
    assert (done["ExitCode"], done["Restarts"]) == ("0:0", "1")
    assert "start 1" in slurm.log(done["JobId"])
    done = slurm.wait(at_the_limit["saves nothing"], "FAILED")
    assert (done["ExitCode"], done["Restarts"]) == ("1:0", "0")
    assert "give the job more time" in slurm.log(done["JobId"]).splitlines()[-1]
    done = slurm.wait(at_the_limit["is deaf"], "TIMEOUT", "FAILED")
    assert done["ExitCode"] != "0:0"
