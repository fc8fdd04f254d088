"""Steps that change nothing because their loss is a spike, or they give no number."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from nemo_minitron.config.training import MOST_LEFT_OUT
from nemo_minitron.models.optim import diverged

log = logging.getLogger(__name__)

_KEPT = 0.98
"""Share of the mean that a step keeps: it is one of about fifty losses."""


class Spikes:
    """Judges every step, the same on every rank: what it is told is.

    Args:
        factor: of the mean of the losses before, above which a loss is a spike; 0 leaves out none,
            and ends the training where there is no number.
        may_rewind: whether too many of them in a row do not end the training.

    Attributes:
        in_a_row: steps left out since the last good one.
        left_out: steps that changed nothing, or whose change was undone.
        rewinds: steps whose weights came back and when, ``[begin, end]``, the first one first.
    """

    def __init__(self, factor: float, may_rewind: bool = False) -> None:
        self.factor, self.may_rewind = factor, may_rewind
        self._mean, self._weight = 0.0, 0.0
        self.in_a_row = 0
        self.left_out = 0
        self.rewinds: list[list[int]] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the state for the checkpoint."""
        kept = ("_mean", "_weight", "in_a_row", "left_out")
        return {**{name: getattr(self, name) for name in kept}, "rewinds": list(self.rewinds)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from the checkpoint."""
        vars(self).update(state)

    def figures(self) -> dict[str, float]:
        """Return the counts that are logged."""
        counts: dict[str, float] = {"left_out": self.left_out} if self.factor else {}
        return counts | ({"rewinds": len(self.rewinds)} if self.may_rewind else {})

    @property
    def too_many(self) -> bool:
        """Whether leaving out steps did not help."""
        return self.in_a_row > MOST_LEFT_OUT

    def go_back(self, state: Mapping[str, Any], begin: int, end: int) -> None:
        """Take note that training gave up the steps after ``begin`` up to ``end``.

        Args:
            state: ``state_dict`` at step ``begin``, whose mean counts again.
            begin: step whose weights are there again.
            end: step that is done.
        """
        self._mean, self._weight = state["_mean"], state["_weight"]
        self.left_out = state["left_out"] + end - begin
        self.rewinds.append([begin, end])
        self.in_a_row = 0

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
            self.in_a_row = 0
        else:
            self._leave_out(f"the gradient norm is {grad_norm}", step)

    def _leave_out(self, why: str, step: int) -> None:
        self.in_a_row += 1
        self.left_out += 1
        if not self.factor:
            raise diverged(why, step)
        if self.too_many and not self.may_rewind:
            raise diverged(f"{why}, after {MOST_LEFT_OUT} steps in a row that were left out", step)
        log.warning("step %d is left out: %s", step, why)
