"""Figures of an evaluation from its sums."""

import math

import pytest
import torch

from nemo_minitron.evaluation.lm_loss import figures
from nemo_minitron.importance.ablation import per_token


def test_figures() -> None:
    found = figures(20.0, 10.0, 2, 4.0)
    assert (found["lm_loss"], found["perplexity"]) == (2.0, math.exp(2.0))
    assert (found["tokens"], found["samples"], found["tokens_per_second"]) == (10, 2, 2.5)


def test_a_model_that_lost_everything_has_figures_too() -> None:
    """Its perplexity is more than a float holds."""
    assert 1e300 < figures(8000.0, 10.0, 2, 4.0)["perplexity"] < math.inf


@pytest.mark.parametrize(
    ("loss", "tokens", "says"),
    [(math.nan, 1.0, "the LM loss is nan"), (0.0, 0.0, "no token of the 2 samples counts")],
)
def test_losses_that_say_nothing(loss: float, tokens: float, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        figures(loss, tokens, 2, 4.0)


def test_losses_without_layers_need_a_token() -> None:
    """Samples in which everything is masked would give NaN for every block."""
    assert per_token(torch.tensor([[6.0, 4.0], [2.0, 4.0]])) == [1.5, 0.5]
    with pytest.raises(ValueError, match=r"no token of the samples of scores.lm_loss_samples"):
        per_token(torch.zeros(2, 2))
