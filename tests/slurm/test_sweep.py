"""``--multirun`` through submitit, on a real SLURM."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers import fake_stages
from tests.helpers.tiny import LLAMA, read_weights, write_result
from tests.slurm.cluster import Cluster, wait
from tests.unit.test_stage_prune import write_scores

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]

TARGETS = (32, 48, 64, 80)
LAUNCHER = (
    "-m",
    "hydra/launcher=slurm",
    "hydra.launcher.partition=low",
    "hydra.launcher.cpus_per_task=1",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny teacher and scores of it."""
    path = tmp_path_factory.mktemp("sweep")
    write_result(path / "teacher", LLAMA, 1)
    write_scores(path / "scores", path / "teacher", LLAMA)
    return path


def start(slurm: Cluster, folder: Path, *line: str, **env: str) -> "subprocess.Popen[str]":
    said = open(folder / "said", "w")  # noqa: SIM115
    return subprocess.Popen(
        [sys.executable, "-m", "nemo_minitron", *line],
        env={**slurm.environment(), "OMP_NUM_THREADS": "1", **env},
        cwd=folder,
        stdout=said,
        stderr=said,
        text=True,
    )


def test_four_pruning_targets(slurm, folder):
    """One submission makes four jobs, and each leaves a complete result."""
    keys = (f"checkpoint={folder}/teacher", f"importance={folder}/scores", "output_dir=sweep")
    swept = f"pruning.target.ffn_hidden_size={','.join(map(str, TARGETS))}"
    sweep = start(slurm, folder, "prune", *LAUNCHER, *keys, swept)
    assert sweep.wait(timeout=900) == 0, (folder / "said").read_text()
    for target in TARGETS:
        result = folder / "sweep" / f"ffn_hidden_size={target}"
        assert json.loads((result / "manifest.json").read_text())["complete"]
        overrides = yaml.safe_load((result / ".hydra" / "overrides.yaml").read_text())
        assert swept.partition("=")[0] + f"={target}" in overrides
        weight = read_weights(result)["decoder.layers.0.mlp.linear_fc2.weight"]
        assert weight.shape == (LLAMA.hidden_size, target)
    # An array's: chains of other tests have jobs of this name too.
    jobs = [job for job in slurm.jobs("minitron-prune") if "ArrayTaskId" in job]
    for job in jobs:  # submitit reads a result's file before the controller knows of the end
        slurm.wait(job["JobId"], "COMPLETED")
    jobs = [slurm.job(job["JobId"]) for job in jobs]
    assert [job["ExitCode"] for job in jobs] == ["0:0"] * len(TARGETS)
    assert len({job["JobId"] for job in jobs}) == len(TARGETS)
    assert {job["ArrayTaskId"] for job in jobs} == {"0", "1", "2", "3"}


def test_a_job_that_is_told_to_stop_is_requeued_and_one_that_fails_gives_its_code(slurm, folder):
    """With stand-ins for the stages: one job saves and goes on, the other has bad input."""
    env = fake_stages.environment(folder, FAKE_RUN="finetune:stop_once", FAKE_NOTES="notes")
    env = {"PYTHONPATH": env["PYTHONPATH"], "FAKE_RUN": env["FAKE_RUN"], "FAKE_NOTES": "notes"}
    keys = ("checkpoint=teacher", "data.path=scores", "output_dir=tuned", "trainer.max_steps=0,2")
    sweep = start(slurm, folder, "finetune", *LAUNCHER, *keys, **env)
    wait((folder / "notes").exists, "the job to start", (folder / "said").read_text, 300)
    (good,) = [job for job in slurm.jobs("minitron-finetune") if job["ArrayTaskId"] == "1"]
    # By its place in the array: the id of one task of an array is also the id of the whole array.
    slurm.scancel("--signal=TERM", f"{good['ArrayJobId']}_{good['ArrayTaskId']}")
    assert sweep.wait(timeout=600) == 2, (folder / "said").read_text()
    assert "trainer.max_steps=0 must be at least 1" in (folder / "said").read_text()
    done = slurm.wait(good["JobId"], "COMPLETED")
    assert (done["JobState"], done["ExitCode"], done["Restarts"]) == ("COMPLETED", "0:0", "1")
    (bad,) = [job for job in slurm.jobs("minitron-finetune") if job["ArrayTaskId"] == "0"]
    assert bad["Restarts"] == "0"  # it had ended, and is not run again with the other one
    assert json.loads((folder / "tuned/max_steps=2/manifest.json").read_text())["complete"]
