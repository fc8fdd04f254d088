"""Lightning's Trainer around a Minitron model: logs, validation, checkpoints, resume, signals."""

import logging
import shutil
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from nemo_minitron.config.training import TrainerConfig
from nemo_minitron.models.gpt import MinitronGPTModel
from nemo_minitron.models.history import History
from nemo_minitron.models.lightning import MegatronStrategy
from nemo_minitron.models.loggers import close_logs, log_with_nemo
from nemo_minitron.models.phases import Course, Samples
from nemo_minitron.models.rewind import Rewind
from nemo_minitron.models.saving import (
    UNFINISHED,
    checkpoint_name,
    complete_checkpoints,
    step_of,
)
from nemo_minitron.models.signs_of_life import SignsOfLife
from nemo_minitron.models.speed import Speed
from nemo_minitron.models.stragglers import Stragglers
from nemo_minitron.runtime.agreement import from_first
from nemo_minitron.runtime.errors import Preempted
from nemo_minitron.runtime.launch import device
from nemo_minitron.runtime.megatron import start_writer_helper
from nemo_minitron.runtime.stop import StopOnRequest

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""Sub-folder of resumable training checkpoints."""


class StopEarly(Callback):
    """Save a checkpoint on every rank and raise ``Preempted`` before the last step.

    SIGTERM and SIGUSR1 ask for it, and so may ``trainer.exit_interval`` and
    ``trainer.exit_duration_in_mins``.
    """

    def __init__(self, checkpoint: ModelCheckpoint, config: TrainerConfig) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self._request = StopOnRequest()
        self._begin = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from Lightning, and keep them from what writes checkpoints."""
        start_writer_helper()
        self._request.__enter__()
        forget_oldest(trainer, self.config.save_top_k)
        remove_left_over(trainer, Path(str(self.checkpoint.dirpath)), self.config.save_top_k)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: object
    ) -> None:
        """Agree on stopping: signals and clocks differ between ranks."""
        reason = self._due(trainer.global_step)
        if reason:
            self._request.ask()
        if not self._request.asked() or trainer.global_step >= self.config.max_steps:
            return
        save_now(trainer, self.checkpoint)
        # Lightning logs a step once all callbacks have returned, and this one does not.
        trainer._logger_connector.update_train_step_metrics()
        reason = reason or "a signal asked to stop"
        raise Preempted(f"{reason}; saved at step {trainer.global_step}")

    def _due(self, step: int) -> str:
        """Return which key ends the run at this step, or an empty text."""
        every, minutes = self.config.exit_interval, self.config.exit_duration_in_mins
        if every and step % every == 0:
            return f"trainer.exit_interval={every} ends this run"
        if minutes and time.monotonic() - self._begin > 60 * minutes:
            return f"trainer.exit_duration_in_mins={minutes:g} are over"
        return ""

    def restore(self) -> None:
        """Restore the signal handlers that were there before."""
        self._request.__exit__()


def save_now(trainer: Trainer, callback: ModelCheckpoint) -> None:
    """Write a checkpoint of this very step unless it is there already, and wait until it is."""
    strategy = cast(MegatronStrategy, trainer.strategy)
    strategy.settle(wait=True)
    path = Path(str(callback.dirpath)) / checkpoint_name(trainer.global_step)
    if not strategy.broadcast(path.exists()):  # shared storage may show a folder later elsewhere
        trainer.save_checkpoint(path)
        strategy.settle(wait=True)


def forget_oldest(trainer: Trainer, newest: int) -> None:
    """Let Lightning know of so many checkpoints at most, or it would never delete one again.

    It deletes one when it knows exactly ``trainer.save_top_k``, which may have been more before.
    """
    for callback in trainer.checkpoint_callbacks:
        assert isinstance(callback, ModelCheckpoint)
        steps = callback.best_k_models
        for path in sorted(steps, key=lambda path: step_of(Path(path)))[:-newest]:
            del steps[path]
        if len(steps) == newest:
            callback.kth_best_model_path = min(steps, key=lambda path: step_of(Path(path)))
            callback.kth_value = steps[callback.kth_best_model_path]


def remove_left_over(trainer: Trainer, folder: Path, newest: int) -> None:
    """Delete old checkpoints that nobody else would: those written when earlier runs had to stop.

    Args:
        trainer: whose callbacks know the checkpoints that they will delete themselves.
        folder: of the training checkpoints.
        newest: number that stays in any case, the newest ones.
    """
    callbacks = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
    known = {Path(path).name for callback in callbacks for path in callback.best_k_models}
    for path in sorted(complete_checkpoints(folder), key=step_of)[:-newest]:
        if path.name not in known:
            trainer.strategy.remove_checkpoint(path)


def newest_checkpoint(folder: Path) -> Path | None:
    """The last complete training checkpoint below ``folder``, as rank 0 sees it (collective)."""
    return from_first(lambda: max(complete_checkpoints(folder), key=step_of, default=None))


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed job left of a checkpoint it was writing or deleting (any rank calls)."""
    if dist.get_rank() == 0:
        for path in folder.glob(f"step=*{UNFINISHED}"):
            shutil.rmtree(path, ignore_errors=True)
    dist.barrier(group=dist.group.WORLD)


class _ByTheClock(ModelCheckpoint):
    """Leaves a step to the other callback if that writes it too: each deletes its own."""

    def __init__(self, every_n_steps: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._others = every_n_steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Do nothing at a step that is saved anyway; the clock saves the next one."""
        if not self._others or trainer.global_step % self._others:
            super().on_train_batch_end(trainer, pl_module, *args, **kwargs)


def _checkpoint_callbacks(config: TrainerConfig, folder: Path) -> list[ModelCheckpoint]:
    """Return a checkpoint callback by steps, and one by minutes if asked for."""
    # A limit of max_steps + 1 means: none before the end, whose weights are the result itself.
    every = config.save_every_n_steps
    makers = [partial(ModelCheckpoint, every_n_train_steps=every or config.max_steps + 1)]
    if config.save_every_n_minutes:
        interval = timedelta(minutes=config.save_every_n_minutes)
        makers.append(partial(_ByTheClock, every, train_time_interval=interval))
    callbacks = []
    for make in makers:
        callback = make(
            dirpath=folder,
            filename="{step}",
            monitor="step",
            mode="max",
            save_top_k=config.save_top_k,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        callback.FILE_EXTENSION = ""
        callbacks.append(callback)
    return callbacks


class _LastValidation(Callback):
    """Ends a run in which nothing but its last validation was left.

    Lightning leaves out a loop whose steps are done, so it is told of one more; it validates where
    it was stopped before it trains, and learns the truth then.
    """

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell Lightning that no training step follows this validation."""
        trainer.fit_loop.epoch_loop.max_steps = self.max_steps


def _trainer(
    config: TrainerConfig, callbacks: list[Callback], validate: bool, max_steps: int
) -> Trainer:
    return Trainer(
        strategy=MegatronStrategy(
            device(),
            async_save=config.async_save,
            keep_every_n_steps=config.keep_every_n_steps,
        ),
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=1,
        max_steps=max_steps,
        val_check_interval=config.val_check_interval if validate else None,
        check_val_every_n_epoch=None if validate else 1,
        limit_val_batches=config.limit_val_batches if validate else 0,
        log_every_n_steps=config.log_every_n_steps,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )


def fit(
    model: MinitronGPTModel,
    samples: Sequence[Samples],
    work: Path,
    *,
    flops: Sequence[float] = (),
) -> list[dict[str, float]]:
    """Train to ``trainer.max_steps``, going on from the newest checkpoint in ``work`` if any.

    Args:
        model: the model, weights loaded.
        samples: train and validation samples of each phase (validation may be None in all).
        work: folder for training checkpoints and logs.
        flops: operations of a step of each phase on all ranks, to log how fast they are.

    Returns:
        One record per logged step: step, loss, lr, grad_norm, tokens, tokens_per_second, what
        ``models.speed`` finds, and val_loss / val_kd_loss at validation steps.

    Raises:
        Preempted: a signal asked to stop; the state is saved.
    """
    config = model.trainer_cfg
    remove_unfinished(work / CHECKPOINTS)
    resume = newest_checkpoint(work / CHECKPOINTS)
    done = 0 if resume is None else step_of(resume)
    if resume is not None:
        log.info("going on from %s", resume)
    checkpoints = _checkpoint_callbacks(config, work / CHECKPOINTS)
    course = Course(model.phases, samples, flops)
    speed = Speed.of(config.precision, memory=config.log_memory)
    slow, changes = Stragglers(config.straggler_ratio), model.data_cfg.blend_changes
    history = History(work, config.max_steps, speed, course, slow, changes)
    stop = StopEarly(checkpoints[0], config)
    validation = course.validation(model.groups, lambda: trainer.global_step)
    model.set_step_loaders(course.training(model.groups, done), validation)
    validate = validation is not None and config.limit_val_batches > 0
    watch = SignsOfLife(config.hang_after_minutes, work / "logs" / "hung")
    rewind = Rewind(work / CHECKPOINTS, config)
    callbacks = [slow, history, rewind, *checkpoints, stop, watch]
    left = validate and done == config.max_steps and done % config.val_check_interval == 0
    if left:
        callbacks.append(_LastValidation(config.max_steps))
    trainer = _trainer(config, callbacks, validate, config.max_steps + left)
    log_with_nemo(trainer, work / "logs", model.exp_manager_cfg, done)
    try:
        trainer.fit(model, ckpt_path=None if resume is None else str(resume))
    finally:
        watch.stop()
        stop.restore()
        close_logs(work / "logs")
    return history.records
