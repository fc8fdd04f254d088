"""Errors that appear only while a stage runs, by the command line: NaN, divergence, full disks.

Whatever happens, nothing that looks like a result is left and an old result still stands. Stages
that run a model do so on the rank pool, which has Megatron imported.
"""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nemo_minitron.checkpoint.artifact import open_result
from nemo_minitron.stages import import_
from tests.helpers.bad_input import (
    STAGES,
    Ending,
    build,
    contents,
    done,
    edited,
    line,
    put_nan,
    run_line,
)
from tests.helpers.pool import WorkerPool

MODEL_STAGES = ("importance", "teacher_logits", "evaluate", "distill", "finetune")
BAD = "decoder.layers.2.mlp.linear_fc2.weight"
Run = Callable[..., Ending]


@pytest.fixture(scope="module")
def start(ranks: WorkerPool) -> Run:
    """Run a command line where its stage can run; at several ranks, as rank 0 ended."""

    def run(arguments: list[str], size: int = 1) -> Ending:
        if arguments[0] not in MODEL_STAGES:
            return run_line(arguments)
        endings = ranks.run(size, run_line, arguments)
        assert len({ending.code for ending in endings}) == 1
        return endings[0]

    return run


@pytest.fixture(scope="module")
def home(tmp_path_factory, start) -> Path:
    """Good inputs, one result of every stage under its name, and a checkpoint with NaN."""
    folder = tmp_path_factory.mktemp("home")
    build(folder)
    for stage in STAGES:
        done(start(line(stage, folder, folder / stage)))
    edited(folder / "model", folder / "nan", put_nan)
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("stage", STAGES)
def test_twice_into_the_same_folder(home, stage):
    before = contents(home)
    ending = run_line(line(stage, home, home / stage))
    says = f"{home / stage} already holds a complete result; set overwrite=true or another output_"
    assert ending.code == 2
    assert says in ending.err
    assert contents(home) == before


def test_student_larger_than_teacher_is_fine(home, tmp_path, start):
    keys = {"student": home / "model", "teacher": home / "student"}
    done(start(line("distill", home, tmp_path / "out", **keys)))


# ------------------------------------------------------------------------------------------ NaN


@pytest.mark.parametrize(
    ("stage", "key", "layout"),
    [
        ("prune", "checkpoint", None),
        ("export", "checkpoint", None),
        ("importance", "checkpoint", None),
        ("evaluate", "checkpoint", "tensor"),
        ("teacher_logits", "checkpoint", None),
        ("distill", "student", None),
        ("distill", "teacher", "pipeline"),
        ("finetune", "checkpoint", None),
    ],
)
def test_nan_in_a_checkpoint(home, tmp_path, start, stage, key, layout):
    keys = {key: home / "nan"}
    if layout:
        keys[f"parallel.{layout}_model_parallel_size"] = 2
    before = contents(home)
    ending = start(line(stage, home, tmp_path / "out", **keys), 2 if layout else 1)
    assert ending.code == 2
    last = ending.err.splitlines()[-1]
    assert last.startswith(f"minitron {stage}: {BAD}")
    assert f"set {key} to an intact" in last
    assert names(tmp_path) == {"out.log"}
    assert contents(home) == before


def test_nan_beyond_what_the_check_of_import_reads(home, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    monkeypatch.setattr(import_, "_READ_UP_TO", 0)
    shutil.copytree(home / "hf", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    ending = run_line(line("import", home, tmp_path / "out", source=tmp_path / "hf"))
    assert ending.code == 2
    assert "model.norm.weight holds 1 NaN or infinite values of 64" in ending.err
    assert names(tmp_path) == {"hf", "out.log"}


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"trainer.max_steps": 3}, "at step 2"),
        ({"trainer.max_steps": 1, "optim.weight_decay": 1e10}, " is not finite at step 1"),
        ({"trainer.max_steps": 3, "trainer.gradient_clip_val": 1}, "at step 2"),
    ],
)
def test_divergence(home, tmp_path, start, keys, says):
    """Found at the next step, or when the weights of the last one are about to be saved."""
    wild = {"optim.lr": 1e37, "optim.weight_decay": 0, "trainer.gradient_clip_val": 0}
    ending = start(line("distill", home, tmp_path / "out", **{**wild, **keys}))
    assert ending.code == 2, ending.err
    last = ending.err.splitlines()[-1]
    assert "training diverged: " in last
    assert says in last
    assert "lower optim.lr" in last
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial").rglob("*.distcp"))


# ------------------------------------------------------------------------------------ full disk


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A disk of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def _fill(disk: Path, leave: int) -> None:
    free = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(free.f_bavail * free.f_bsize - leave))


SAVING = {"trainer.save_every_n_steps": 1, "trainer.max_steps": 2}


@pytest.mark.parametrize(
    ("stage", "leave", "keys"),
    [
        ("import", 0, {}),
        ("import", 64 << 10, {}),
        ("importance", 0, {}),
        ("prune", 64 << 10, {}),
        ("distill", 0, {}),
        ("distill", 64 << 10, {}),
        ("distill", 64 << 10, SAVING),
        ("evaluate", 0, {}),
        ("export", 64 << 10, {}),
    ],
)
def test_full_disk(home, disk, start, stage, leave, keys):
    """The disk fills up before the stage begins to write, or in the middle of the weights."""
    result = shutil.copytree(home / stage, disk / "out")
    (disk / "out.log").touch()
    before = open_result(result).id
    _fill(disk, leave)
    ending = start(line(stage, home, result, overwrite="true", **keys))
    assert ending.code == 1, ending.err
    last = ending.err.splitlines()[-1]
    assert last.startswith(f"minitron {stage}: the disk is full")
    assert "free some space or set another output_dir, then run the same command again" in last
    assert open_result(result, "full").id == before
    kept = {"out.partial"} if stage == "distill" and leave else set()
    assert names(disk) == {"out", "out.log", "filler"} | kept


@pytest.mark.parametrize("stage", ["import", "prune", "export"])
def test_full_disk_found_when_files_are_flushed(home, tmp_path, monkeypatch, stage):
    """File systems may take the data and say only at the end that there was no room."""
    result = shutil.copytree(home / stage, tmp_path / "out")
    before = open_result(result).id

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    ending = run_line(line(stage, home, result, overwrite="true"))
    assert ending.code == 1
    assert "the disk is full" in ending.err.splitlines()[-1]
    assert open_result(result, "full").id == before
    assert names(tmp_path) == {"out", "out.log"}
