"""What counts as another input: a result is made anew for it, and for nothing else."""

from pathlib import Path

import pytest

from nemo_minitron.checkpoint.artifact import output_folder
from nemo_minitron.checkpoint.manifest import fingerprint, open_result
from nemo_minitron.config.stages import ExportConfig


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    for end, text in ((".bin", "tokens"), (".idx", "documents")):
        (tmp_path / f"corpus.v1{end}").write_text(text)
    return tmp_path / "corpus.v1"


def stopped(cfg: ExportConfig) -> None:
    with output_folder(cfg, "export", resumable=True) as folder:
        (folder / "step").write_text("7")
        raise RuntimeError


def test_notes_of_other_programs_are_no_input(tmp_path: Path) -> None:
    """What downloads a model again rewrites its notes, and the model stays what it is."""
    (tmp_path / "config.json").write_text("{}")
    before = fingerprint(tmp_path)
    for name in (".cache/huggingface/download/config.json.metadata", ".gitattributes"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("now")
    assert fingerprint(tmp_path) == before
    assert fingerprint(tmp_path, earlier=True) != before


@pytest.mark.parametrize("changed", [".bin", ".idx"])
@pytest.mark.parametrize("given", ["", ".bin", ".idx"])
def test_a_pair_is_both_of_its_files(pair: Path, given: str, changed: str) -> None:
    path = Path(f"{pair}{given}")
    before = fingerprint(path)
    assert before == fingerprint(pair)
    Path(f"{pair}{changed}").write_text("others")
    assert fingerprint(path) != before


def test_a_file_that_is_called_like_half_a_pair(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_text("x")
    before = fingerprint(tmp_path / "model.bin")
    (tmp_path / "model").mkdir()
    assert fingerprint(tmp_path / "model.bin") == before


def test_work_of_an_earlier_version_is_resumed(tmp_path: Path, monkeypatch) -> None:
    """It counted hidden files: its word for the same input is taken, and not for another one."""
    source = tmp_path / "source"
    (source / ".git").mkdir(parents=True)
    (source / "model").write_text("weights")
    (source / ".git" / "HEAD").write_text("main")
    cfg = ExportConfig(output_dir=str(tmp_path / "out"), checkpoint=str(source))
    with monkeypatch.context() as before:
        before.setattr(
            "nemo_minitron.checkpoint.artifact.fingerprint",
            lambda path, workers, earlier=False: fingerprint(path, workers, earlier=True),
        )
        with pytest.raises(RuntimeError):
            stopped(cfg)
    with output_folder(cfg, "export", resumable=True) as folder:
        assert (folder / "step").read_text() == "7"
    there = open_result(cfg.output_dir).inputs["checkpoint"]
    assert there == fingerprint(source, earlier=True)
