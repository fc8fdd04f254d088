"""Loggers beside TensorBoard and Weights & Biases."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import Logger

from nemo_minitron.config.loggers import ExpManagerConfig
from nemo_minitron.models import loggers


class Run(Logger):
    """A logger that remembers its arguments."""

    name, version = "mlflow", "run 7"

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.given = given

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


def test_a_run_goes_on_in_its_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loggers.LOGGERS, "mlflow", Run)
    given = {"save_dir": str(tmp_path / "mlflow"), "experiment_name": "mine"}
    for also in ({}, {"run_id": "run 7"}):
        (run,) = loggers.make_loggers({"mlflow": {"experiment_name": "mine"}}, tmp_path)
        assert isinstance(run, Run)
        assert run.given == given | also


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"odd": {}}, r"exp_manager.loggers.odd must be one of mlflow, comet"),
        ({"comet": None}, r"exp_manager.loggers.comet=None must be a mapping of arguments"),
        (
            {"comet": {}},
            r"needs the package comet_ml, which is not installed: pip install",
        ),
    ],
)
def test_what_cannot_be_had_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpManagerConfig(loggers=asked)
