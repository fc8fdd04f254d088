"""Goes back to earlier weights where leaving out steps did not help (docs/design/rewind.md)."""

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_minitron.config.training import TrainerConfig
from nemo_minitron.models.lightning import MegatronStrategy
from nemo_minitron.models.optim import diverged
from nemo_minitron.models.saving import complete_checkpoints, step_of
from nemo_minitron.models.spikes import Spikes
from nemo_minitron.runtime.agreement import from_first

if TYPE_CHECKING:
    from nemo_minitron.models.gpt import MinitronGPTModel

log = logging.getLogger(__name__)


class Rewind(Callback):
    """Takes weights and optimizer back to a checkpoint after too many bad steps in a row.

    Steps, samples and the learning-rate schedule go on: the steps since the checkpoint are then
    steps that changed nothing. It runs before the callbacks that write checkpoints.

    Args:
        folder: of the training checkpoints.
        config: says how far to go back, and how often.
    """

    def __init__(self, folder: Path, config: TrainerConfig) -> None:
        self.folder, self.config = folder, config

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: object
    ) -> None:
        """Go back if it is time; every rank counts the same bad steps.

        Raises:
            ValueError: training diverged, and there is nothing to go back to.
        """
        model = cast("MinitronGPTModel", pl_module)
        strategy = cast(MegatronStrategy, trainer.strategy)
        step, spikes = trainer.global_step, model.spikes
        if not spikes.too_many:
            return
        bad = f"{spikes.in_a_row} steps in a row were left out"
        if len(spikes.rewinds) >= self.config.max_rewinds:
            raise diverged(f"{bad} after trainer.max_rewinds={self.config.max_rewinds}", step)
        strategy.settle(wait=True)  # which checkpoints there are must not depend on the disk
        path = from_first(partial(self._target, spikes, step))
        if path is None:
            key = f"trainer.rewind_steps={self.config.rewind_steps}"
            raise diverged(f"{bad}, and no checkpoint lies {key} before them,", step)
        state = strategy.read_checkpoint(path)
        model.load_learned(state)
        spikes.go_back(state["spikes"], step_of(path), step)
        log.warning(
            "rewind %d of at most %d: the weights are those of step %d again, and steps %d to %d "
            "are left out",
            *(len(spikes.rewinds), self.config.max_rewinds),
            *(step_of(path), step_of(path) + 1, step),
        )

    def _target(self, spikes: Spikes, step: int) -> Path | None:
        """Return the newest checkpoint far enough before the bad steps, None if there is none.

        One that a clock or a signal wrote would not be there in a run that was not disturbed; one
        between the ends of an earlier rewind holds the weights that were given up.
        """
        last = step - spikes.in_a_row - self.config.rewind_steps
        good = [
            path
            for path in complete_checkpoints(self.folder)
            if step_of(path) <= last
            and step_of(path) % self.config.save_every_n_steps == 0
            and not any(begin < step_of(path) < end for begin, end in spikes.rewinds)
        ]
        return max(good, key=step_of, default=None)
