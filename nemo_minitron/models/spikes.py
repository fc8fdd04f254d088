"""Steps that change nothing because their loss is a spike, or they give no number."""

import logging
import math
from typing import Any

from nemo_minitron.models.optim import diverged

log = logging.getLogger(__name__)

_KEPT = 0.98
"""Share of the mean that a step keeps: it is one of about fifty losses."""
_MOST = 10
"""Steps in a row that may be left out: then it is not the data."""


class Spikes:
    """Judges every step, the same on every rank: what it is told is.

    Args:
        factor: of the mean of the losses before, above which a loss is a spike; 0 leaves out none,
            and ends the training where there is no number.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self._mean, self._weight = 0.0, 0.0
        self._in_a_row = 0
        self.left_out = 0

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        kept = ("_mean", "_weight", "_in_a_row", "left_out")
        return {name: getattr(self, name) for name in kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From the checkpoint."""
        vars(self).update(state)

    def is_one(self, loss: float, step: int) -> bool:
        """Whether to leave out a step, before the optimizer makes it.

        Args:
            loss: per token.
            step: its number, the first being 1.

        Raises:
            ValueError: training diverged.
        """
        spike = self.factor * self._mean > 0 and loss * self._weight > self.factor * self._mean
        if math.isfinite(loss) and not spike:
            self._mean = _KEPT * self._mean + (1 - _KEPT) * loss
            self._weight = _KEPT * self._weight + (1 - _KEPT)
            return False
        self._leave_out(f"the loss is {loss:.6g}", step)
        return True

    def look_at(self, grad_norm: float | None, step: int) -> None:
        """Take note of a step that was made; of one without a number the optimizer made nothing.

        Raises:
            ValueError: training diverged.
        """
        if grad_norm is None or math.isfinite(grad_norm):
            self._in_a_row = 0
        else:
            self._leave_out(f"the gradient norm is {grad_norm}", step)

    def _leave_out(self, why: str, step: int) -> None:
        self._in_a_row += 1
        self.left_out += 1
        if not self.factor:
            raise diverged(why, step)
        if self._in_a_row > _MOST:
            raise diverged(f"{why}, after {_MOST} steps in a row that were left out", step)
        log.warning("step %d is left out: %s", step, why)
