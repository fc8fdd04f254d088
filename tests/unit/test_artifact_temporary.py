"""What a working folder holds only to go on from stays until the result stands."""

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


def test_a_job_without_it_completes(cfg):
    """The names need not be there."""
    with output_folder(cfg, "export", resumable=True, temporary=(TEMPORARY, "other")) as work:
        (work / "file").write_text("x")
    assert set(open_result(cfg.output_dir).files) == {"file", ".hydra/config.yaml"}
    assert _siblings(cfg) == ["out"]
