"""The end of a training: the weights of the result."""

from pathlib import Path
from typing import Any

from nemo_minitron.config.stages import FinetuneConfig
from nemo_minitron.config.training import DataConfig
from nemo_minitron.stages import finetune
from tests.helpers.tiny import LLAMA


def test_files_of_a_run_that_was_killed_are_gone(tmp_path, monkeypatch):
    """They may be of more ranks than this run has."""
    cfg = FinetuneConfig(checkpoint="c", output_dir="o", data=DataConfig(path="d"))
    monkeypatch.setattr("nemo_minitron.models.training.fit", lambda *_, **__: [{"loss": 1.0}])
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "__7_0.distcp").touch()
    found: list[bool] = []

    class Model:
        def save(self, folder: Path) -> None:
            found.append(folder.exists())

    model: Any = Model()
    assert finetune._fit(cfg, LLAMA, model, [], tmp_path)["loss"] == 1.0
    assert found == [False]
