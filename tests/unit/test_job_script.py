"""``launch/lib.sh`` without SLURM: whether a stage saved anything, and where it looks."""

import subprocess
from pathlib import Path

import pytest

LIB = Path(__file__).parents[2] / "launch" / "lib.sh"


def bash(script: str, **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", "-c", f". {LIB}\n{script}"],
        env={"PATH": "/usr/bin:/bin", "CONTAINER_IMAGE": "none", **env},
        capture_output=True,
        text=True,
    )


def saved(output: Path) -> str:
    done = bash(f"saved_work '{output}'")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("place", ["run", "logs/run", "two words/[1]"])
def test_what_was_saved(tmp_path: Path, place: str) -> None:
    """Checkpoints count wherever the results are, and logs never do."""
    output = tmp_path / place
    step = Path(f"{output}.partial") / "checkpoints" / "step=5"
    step.mkdir(parents=True)
    before = saved(output)
    (step / "weights").write_text("x")
    after = saved(output)
    assert after != before
    log = Path(f"{output}.partial") / "logs" / "events"
    log.parent.mkdir()
    log.write_text("x")
    (output.parent / "other.log").write_text("x")
    assert saved(output) == after
    Path(f"{output}.partial").rename(output)
    assert saved(output) not in (before, after)


def test_an_output_folder_that_only_hydra_can_read() -> None:
    done = bash("run_stage finetune 'output_dir=${oc.env:HOME}/run'", MINITRON="true")
    assert done.returncode == 2
    assert "output_dir=${oc.env:HOME}/run is read by this script" in done.stderr


def test_the_home_folder(tmp_path: Path) -> None:
    """A tilde that no shell expanded is what the stage takes it for."""
    script = "srun() { printf '%s' \"$output\"; }; run_stage finetune 'output_dir=~/run'"
    done = bash(script, HOME=str(tmp_path))
    assert done.stdout == f"{tmp_path}/run"


def test_the_name_of_a_job_for_slurm() -> None:
    """A task of an array has a name of its own: its id may be that of the whole array."""
    task = {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}
    assert bash("this_job", SLURM_JOB_ID="17").stdout == "17"
    assert bash("this_job", SLURM_JOB_ID="17", **task).stdout == "17_3"
