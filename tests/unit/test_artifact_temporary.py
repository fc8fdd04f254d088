"""What a working folder holds only to go on from stays until the result stands."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_minitron.checkpoint.artifact import open_result, output_folder
from nemo_minitron.config.stages import ExportConfig

TEMPORARY = "parts"
"""A folder of that name holds what a job made on its way, and another has it deeper inside."""


@pytest.fixture
def cfg(tmp_path: Path) -> ExportConfig:
    source = tmp_path / "source"
    source.mkdir()
    (source / "model").write_text("weights")
    return ExportConfig(output_dir=str(tmp_path / "results/out"), checkpoint=str(source))


def _job(cfg: ExportConfig) -> bool:
    """Make the temporary part unless it is there, and the result; says whether it was there."""
    with output_folder(cfg, "export", resumable=True, temporary=(TEMPORARY,)) as work:
        made = work / TEMPORARY / "0/ids.bin"
        there = made.is_file()
        if not there:
            made.parent.mkdir(parents=True)
            made.write_text("7")
        (work / "model" / TEMPORARY).mkdir(parents=True, exist_ok=True)
        (work / "model" / TEMPORARY / "file").write_text(made.read_text())
    return there


def _siblings(cfg: ExportConfig) -> list[str]:
    return sorted(path.name for path in Path(cfg.output_dir).parent.iterdir())


@pytest.mark.parametrize(
    "step", ["artifact.write_manifest", "artifact.replace", "completion.rename_folder"]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_job_that_ends_while_its_result_is_completed_goes_on(cfg, monkeypatch, step, overwrite):
    """With what it made before, of which the result then holds nothing."""
    if overwrite:
        assert not _job(cfg)
        cfg.overwrite = True

    def end(*_: object) -> None:
        raise OSError("the server of the files is gone")

    with monkeypatch.context() as patch:
        patch.setattr(f"nemo_minitron.checkpoint.{step}", end)
        with pytest.raises(OSError, match="is gone"):
            _job(cfg)
    assert "out.partial" in _siblings(cfg)
    assert _job(cfg)
    output = Path(cfg.output_dir)
    assert set(open_result(output).files) == {f"model/{TEMPORARY}/file", ".hydra/config.yaml"}
    assert {path.name for path in output.iterdir()} == {"model", ".hydra", "manifest.json"}
    assert _siblings(cfg) == ["out"]


KILL = """
import os, signal, sys
from pathlib import Path
from nemo_minitron.checkpoint import completion
from nemo_minitron.checkpoint.artifact import output_folder
from nemo_minitron.config.stages import ExportConfig
cfg = ExportConfig(output_dir=sys.argv[1], checkpoint=sys.argv[2], overwrite=sys.argv[3] == "True")
left = int(sys.argv[4])

def kill_instead(event, args):
    global left
    if event in ("os.rename", "shutil.rmtree") and armed:
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

armed = False
sys.addaudithook(kill_instead)
replace = completion.replace

def armed_replace(*args):
    global armed
    armed = True
    replace(*args)

import nemo_minitron.checkpoint.artifact as artifact
artifact.replace = armed_replace
with output_folder(cfg, "export", resumable=True, temporary=("parts", "more")) as work:
    (work / "new").write_text("x")
    for name in ("parts", "more"):
        (work / name / "0").mkdir(parents=True)
        (work / name / "0/ids.bin").write_text("7")
"""


@pytest.mark.parametrize("overwrite", [False, True])
def test_at_every_instant_a_start_finds_the_result_or_what_it_goes_on_from(cfg, overwrite):
    """A job is killed at each rename and removal of its end, one after the other."""
    output, outcomes = Path(cfg.output_dir), set()
    for step in range(20):
        shutil.rmtree(output.parent, ignore_errors=True)
        if overwrite:
            with output_folder(cfg, "export") as work:
                (work / "old").write_text("x")
        words = [cfg.output_dir, cfg.checkpoint, str(overwrite), str(step)]
        killed = subprocess.run([sys.executable, "-c", KILL, *words]).returncode
        new = (output / "new").is_file()
        if new:
            assert set(open_result(output).files) == {"new", ".hydra/config.yaml"}
        else:  # the next start goes on from all that there was
            again = replace(cfg, overwrite=overwrite)
            names = ("parts", "more")
            with output_folder(again, "export", resumable=True, temporary=names) as work:
                assert all((work / name / "0/ids.bin").is_file() for name in names)
                if overwrite:
                    assert (output / "old").is_file()
            assert set(open_result(output).files) == {"new", ".hydra/config.yaml"}
        outcomes.add((killed, new))
        with output_folder(replace(cfg, overwrite=True), "export") as work:
            (work / "next").write_text("x")
        assert _siblings(cfg) == ["out"]  # nothing is left of either
        if not killed:
            break
    assert outcomes == {(-9, False), (-9, True), (0, True)}


def test_a_job_without_it_completes(cfg):
    """The names need not be there."""
    with output_folder(cfg, "export", resumable=True, temporary=(TEMPORARY, "other")) as work:
        (work / "file").write_text("x")
    assert set(open_result(cfg.output_dir).files) == {"file", ".hydra/config.yaml"}
    assert _siblings(cfg) == ["out"]
