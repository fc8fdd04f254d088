"""The end of a training: the weights of the result, and its last losses."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

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


@pytest.mark.parametrize(
    ("history", "want"),
    [
        ([{"step": 5, "loss": 1.5}, {"step": 6, "val_loss": 2.0}], (1.5, 2.0)),
        ([{"step": 5, "loss": 1.5, "val_loss": 2.0}, {"step": 6, "loss": 1.0}], (1.0, None)),
        ([], (None, None)),
    ],
)
def test_the_last_steps_may_have_been_left_out(tmp_path, monkeypatch, history, want):
    """``trainer.skip_loss_above`` leaves out steps without a number, of which nothing is logged."""
    cfg = FinetuneConfig(checkpoint="c", output_dir="o", data=DataConfig(path="d"))
    monkeypatch.setattr("nemo_minitron.models.training.fit", lambda *_, **__: history)
    model: Any = SimpleNamespace(save=lambda folder: None)
    metrics = finetune._fit(cfg, LLAMA, model, [], tmp_path)
    assert (metrics["loss"], metrics["val_loss"]) == want
