"""Tells the watch over a rank that its training goes on (``runtime.watch``)."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_minitron.runtime.watch import Watch


class SignsOfLife(Callback):
    """Tells a watch that training goes on; without a limit there is none.

    Args:
        minutes: see ``trainer.hang_after_minutes``.
        folder: see ``runtime.watch.Watch``.
    """

    def __init__(self, minutes: float, folder: Path) -> None:
        self._watch = Watch(minutes, folder) if minutes else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the watch."""
        if self._watch is not None:
            self._watch.start()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: object
    ) -> None:
        """Note that a step begins: checkpoint and validation of the one before are done."""
        self._alive(f"began step {trainer.global_step + 1}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: object
    ) -> None:
        """Note that a step is done."""
        self._alive(f"ended step {trainer.global_step}")

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note that a checkpoint is about to be written."""
        self._alive(f"began to write the checkpoint of step {trainer.global_step}")

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: object
    ) -> None:
        """Note that a batch of a validation is done."""
        self._alive(f"ended a batch of the validation at step {trainer.global_step}")

    def _alive(self, doing: str) -> None:
        if self._watch is not None:
            self._watch.alive(doing)

    def stop(self) -> None:
        """Stop the watch: training is over."""
        if self._watch is not None:
            self._watch.stop()
