"""Loggers of a training run: NeMo's through its ``exp_manager``, Lightning's, and added ones."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CometLogger, Logger, MLFlowLogger
from nemo.utils.exp_manager import exp_manager

from nemo_minitron.config.loggers import ExpManagerConfig
from nemo_minitron.runtime.plugins import named
from nemo_minitron.runtime.ranks import rank

LOGGERS: dict[str, Callable[..., Logger]] = {"comet": CometLogger, "mlflow": MLFlowLogger}
_GOES_ON = {"comet": "experiment_key", "mlflow": "run_id"}
"""The argument that says which run a logger goes on with."""


def log_with_nemo(trainer: Trainer, folder: Path, config: ExpManagerConfig, done: int) -> None:
    """Set up loggers and log files by NeMo's exp_manager; our own callbacks do the rest.

    Args:
        trainer: gets them.
        folder: of the logs.
        config: which ones.
        done: steps that are trained. TensorBoard leaves out what an earlier run wrote behind them.
    """
    wandb = asdict(config.wandb_logger_kwargs)
    exp_manager(
        trainer,
        {
            "explicit_log_dir": str(folder),
            "create_checkpoint_callback": False,
            "create_preemption_callback": False,
            # Checkpoints are written before the validation of their step: Lightning makes up for
            # it, and NeMo's default is to leave out the first validation after a resume.
            "disable_validation_on_resume": False,
            "create_tensorboard_logger": config.create_tensorboard_logger,
            "summary_writer_kwargs": {"purge_step": done} if done else None,
            "create_wandb_logger": config.create_wandb_logger,
            "wandb_logger_kwargs": {k: v for k, v in wandb.items() if v is not None},
            "log_step_timing": False,
            "log_tflops_per_sec_per_gpu": False,
            "seconds_to_sleep": 0,
        },
    )
    trainer.loggers = [*trainer.loggers, *make_loggers(config.loggers, folder)]


def close_logs(folder: Path) -> None:
    """Take away the handlers that ``exp_manager`` leaves on the loggers of NeMo and Lightning.

    They would write what the next training of this process says into files of this one; and where
    Hydra closed them since, and the result has its final name, they would not find their folder.
    """
    for logger in list(logging.root.manager.loggerDict.values()):
        for handler in list(getattr(logger, "handlers", [])):
            path = Path(getattr(handler, "baseFilename", "/"))
            if path.resolve().is_relative_to(folder.resolve()):
                logger.removeHandler(handler)  # type: ignore[union-attr]  # a PlaceHolder has no handlers
                handler.close()


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
