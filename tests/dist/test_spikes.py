"""Steps that ``trainer.skip_loss_above`` leaves out change nothing, on every rank."""

import math

import pytest
import torch

from nemo_minitron.config.training import TrainerConfig
from nemo_minitron.models.spikes import Spikes
from tests.cases.spiky import BAD, STEPS, TEACHER, train
from tests.helpers.tiny import LLAMA, write_weights


@pytest.fixture(scope="module")
def run(ranks, tmp_path_factory):
    """Train on two replicas, of which one sees what is bad."""
    folder = tmp_path_factory.mktemp("spikes")
    write_weights(folder / "weights", LLAMA, 1)
    write_weights(folder / "teacher", TEACHER, 2)

    def run(name: str, bad: "str | None", taught: bool = False, **trainer):
        task = (str(folder / "weights"), str(folder / name), bad, trainer)
        teacher = str(folder / "teacher") if taught else None
        return ranks.run(2, train, *task, (BAD,), STEPS, None, None, teacher)

    return run


@pytest.fixture(scope="module")
def without(run):
    """A training that never sees the bad batch."""
    return run("without", None, skip_loss_above=4.0)


@pytest.mark.parametrize("bad", ["spike", "loss", "gradient"])
def test_a_bad_batch_leaves_no_trace(run, without, bad):
    """Weights and losses are those of a training without it, bit for bit."""
    for (history, weights), (want, want_weights) in zip(
        run(bad, bad, skip_loss_above=4.0), without, strict=True
    ):
        assert all(torch.equal(weights[name], want_weights[name]) for name in want_weights)
        others = [record for record in history if record["step"] != BAD + 1]
        assert [r["loss"] for r in others] == [r["loss"] for r in want]
        assert [r["left_out"] for r in others] == [0] * BAD + [1] * (STEPS - BAD - 1)
        shown = [record["loss"] for record in history if record["step"] == BAD + 1]
        assert len(shown) == (bad != "loss")


def test_nor_in_what_a_distillation_weighs_by_the_batch_before(run):
    """The weight of the intermediate losses follows the batches that taught something."""
    want = run("taught without", None, taught=True, skip_loss_above=4.0)
    for bad in ("spike", "gradient"):
        got = run(f"taught {bad}", bad, taught=True, skip_loss_above=4.0)
        for (history, weights), (wanted, want_weights) in zip(got, want, strict=True):
            assert any("projection" in name for name in weights)
            assert all(torch.equal(weights[name], want_weights[name]) for name in want_weights)
            others = [record for record in history if record["step"] != BAD + 1]
            for key in ("alpha", "loss"):
                assert [r[key] for r in others] == [r[key] for r in wanted]
            assert len({r["alpha"] for r in wanted}) > 2, "it changes from step to step"


def test_without_the_key_it_ends_the_training(run):
    said = run("ends", "gradient")
    assert said[0] == said[1]
    assert f"training diverged: the gradient norm is nan at step {BAD + 1}" in said[0]


def test_what_counts_as_a_spike():
    """The mean of the losses before is what decides, also after a resume; ten in a row end it."""
    spikes = Spikes(3.0)
    assert [spikes.is_one(loss, 1) for loss in (9.0, 3.0, 17.0)] == [False, False, False]
    spikes, kept = Spikes(3.0), spikes.state_dict()
    spikes.load_state_dict(kept)
    mean = (9.0 * 0.98**2 + 3.0 * 0.98 + 17.0) / (0.98**2 + 0.98 + 1)
    assert not spikes.is_one(3 * mean - 1e-6, 2)
    spikes.load_state_dict(kept)
    assert spikes.is_one(3 * mean + 1e-6, 2)
    spikes.look_at(1.0, 3)
    for step in range(10):
        assert spikes.is_one(math.inf, step)
    with pytest.raises(ValueError, match="after 10 steps in a row that were left out at step 10"):
        spikes.is_one(math.nan, 10)
    with pytest.raises(ValueError, match=r"trainer.skip_loss_above=0\.5 must be above 1, or 0"):
        TrainerConfig(skip_loss_above=0.5)
