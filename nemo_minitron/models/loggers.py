"""Loggers of a training run beside those of NeMo's ``exp_manager``: Lightning's, and added ones."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CometLogger, Logger, MLFlowLogger

from nemo_minitron.runtime.plugins import named
from nemo_minitron.runtime.ranks import rank

LOGGERS: dict[str, Callable[..., Logger]] = {"comet": CometLogger, "mlflow": MLFlowLogger}
_GOES_ON = {"comet": "experiment_key", "mlflow": "run_id"}
"""The argument that says which run a logger goes on with."""


def make_loggers(asked: Mapping[str, Mapping[str, Any]], folder: Path) -> list[Logger]:
    """Make the loggers of ``exp_manager.loggers``.

    Args:
        asked: name -> arguments. Each is given ``save_dir`` too, a folder of its own in ``folder``.
        folder: of the logs, the same when a run goes on.
    """
    return [_logger(name, dict(arguments), folder) for name, arguments in asked.items()]


def _logger(name: str, arguments: dict[str, Any], folder: Path) -> Logger:
    # NeMo's exp_manager moves files that it finds in the folder itself.
    own, known = folder / name, folder / "runs" / name
    for place in (own, known.parent):
        place.mkdir(parents=True, exist_ok=True)
    if name in _GOES_ON and known.is_file():
        arguments.setdefault(_GOES_ON[name], known.read_text())
    make = named("loggers", LOGGERS, name, "exp_manager.loggers")
    logger = make(save_dir=str(own), **arguments)
    if name in _GOES_ON and rank() == 0:  # the others log nothing
        known.write_text(str(logger.version))
    return logger
