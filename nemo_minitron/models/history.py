"""Report the steps of a training: records, the progress bar, and the current step."""

import contextlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_minitron.checkpoint.progress import write_progress
from nemo_minitron.config.blend import check_trained
from nemo_minitron.config.training import TrainerConfig
from nemo_minitron.models.phases import Course
from nemo_minitron.models.speed import Speed
from nemo_minitron.models.stragglers import Stragglers
from nemo_minitron.runtime.console import progress

log = logging.getLogger(__name__)

_SHOWN = {
    "tokens_per_second": "tokens/s",
    "tflops_per_gpu": "TFLOP/s/GPU",
    "mfu": "MFU",
    "peak_memory_gib": "GiB",
}
"""Figures of speed by their names on the log line."""


class History(Callback):
    """Keeps one record per logged step; saved in checkpoints, so a resumed run has the whole curve.

    ``tokens_per_second`` counts global training tokens since the record before, of this run.

    Args:
        work: folder for training checkpoints and logs.
        total_steps: of the whole training.
        speed: of what figures to log.
        course: what is read, and what each step computes.
        stragglers: says which rank is slow.
        changes: ``data.blend_changes``.
    """

    def __init__(
        self,
        work: Path,
        total_steps: int,
        speed: Speed,
        course: Course,
        stragglers: Stragglers,
        changes: Sequence[dict[str, Any]] | None = None,
    ) -> None:
        self.records: list[dict[str, float]] = []
        self.course, self.changes = course, list(changes or ())
        self.stragglers = stragglers
        self.work, self.total_steps, self.speed = work, total_steps, speed
        self._begin = self._since = self._paused = self._noted = self._carried = 0.0
        self._first = self._logged = 0
        self._bar: Any = None
        self._advance: Any = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state for the checkpoint."""
        changes = {"blend_changes": self.changes} if self.changes else {}
        return {"records": self.records, **changes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state from the checkpoint."""
        self.records = list(state_dict["records"])

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse other weights for steps that are trained."""
        then = checkpoint["callbacks"][self.state_key].get("blend_changes", [])
        check_trained(then, self.changes, checkpoint["global_step"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock and the bar."""
        self._begin = self._since = time.monotonic()
        self._first = self._logged = trainer.global_step
        # Tokens that the run before read since it logged; they took none of this run's time.
        self._carried = float(pl_module.unlogged)
        # The steps of the loggers. Lightning saves their number before it counts the last step, so
        # that every resume would put the curve one step to the left.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
        self._bar = progress("training", self.total_steps, trainer.global_step)
        self._advance = self._bar.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: object
    ) -> None:
        """Keep what the step logged, with the speed since the last log line."""
        metrics = pl_module.last_metrics
        if metrics:
            now, step = time.monotonic(), trainer.global_step
            seconds = max(now - self._since, 1e-9)
            speed = {"tokens_per_second": (metrics["tokens"] - self._carried) / seconds}
            flops = self.course.flops_between(self._logged, step)
            speed |= self.speed.figures(flops, seconds)
            epochs = self._epochs(pl_module, step)
            self.records.append({"step": step, **metrics, **speed, **epochs})
            self._since, self._logged, self._carried = now, step, 0.0
            pl_module.last_metrics = {}
            for name, value in speed.items():
                pl_module.log(f"train/{name}", value, batch_size=1)
            shown = {_SHOWN[name]: value for name, value in speed.items()}
            self._advance(1, loss=metrics["loss"], **shown)
            self._note(trainer.global_step, pl_module.trainer_cfg)
        else:
            self._advance(1)

    def _note(self, step: int, config: TrainerConfig) -> None:
        """Say for ``minitron status`` where training is, at most once a second.

        Training goes on where the note cannot be written: a checkpoint that cannot be ends it.
        """
        now = time.monotonic()
        if dist.get_rank() != 0 or (now - self._noted < 1.0 and step < self.total_steps):
            return
        self._noted = now
        with contextlib.suppress(OSError):
            write_progress(
                self.work,
                step=step,
                max_steps=self.total_steps,
                loss=self.records[-1]["loss"],
                tokens=sum(record.get("tokens", 0.0) for record in self.records),
                tokens_per_second=self.records[-1]["tokens_per_second"],
                slow=self.stragglers.found,
                seconds_per_step=(now - self._begin) / max(step - self._first, 1),
                log_every_n_steps=config.log_every_n_steps,
                hang_after_minutes=config.hang_after_minutes,
            )

    def _epochs(self, pl_module: LightningModule, step: int) -> dict[str, float]:
        """Return how often each source of a blend was read."""
        epochs = self.course.epochs(step)
        for name, value in epochs.items():
            pl_module.log(f"epochs/{name}", value, batch_size=1)
        return {f"epochs/{name}": value for name, value in epochs.items()}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock: validation is not training time."""
        self._paused = time.monotonic()
        # Lightning counts the step after its validation, and once more where a resumed run
        # begins with that.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step - 1

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the validation losses to the record of this step."""
        values = {
            name: float(trainer.callback_metrics[name])
            for name in ("val_loss", "val_kd_loss")
            if name in trainer.callback_metrics
        }
        if self.records and self.records[-1]["step"] == trainer.global_step:
            self.records[-1].update(values)
        elif not trainer.sanity_checking:
            self.records.append({"step": trainer.global_step, **values})
        self._since += time.monotonic() - self._paused
        if values:
            figures = " ".join(f"{name}={value:.4f}" for name, value in values.items())
            log.info("validation at step %d: %s", trainer.global_step, figures)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._bar.__exit__(None, None, None)
