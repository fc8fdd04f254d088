"""Weights go back to a checkpoint where leaving out bad steps did not help."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.config.training import TrainerConfig
from nemo_minitron.models import rewind
from nemo_minitron.models.rewind import Rewind
from nemo_minitron.models.spikes import Spikes
from tests.cases.spiky import TEACHER, train
from tests.helpers.history import without_speed
from tests.helpers.tiny import LLAMA, write_weights

STEPS, FIRST, LAST, BACK = 24, 10, 20, 4
"""Steps ``FIRST`` to ``LAST`` are bad, one more than may be left out in a row; the checkpoint of
step ``BACK`` is the newest one that is three steps before them."""
KEYS: dict[str, Any] = {
    "skip_loss_above": 4.0,
    "rewind_steps": 3,
    "save_every_n_steps": 4,
    "save_top_k": 5,
}
BAD = list(range(FIRST - 1, LAST))


@pytest.fixture(scope="module")
def run(ranks, tmp_path_factory):
    """Train on two ranks."""
    folder = tmp_path_factory.mktemp("rewind")
    write_weights(folder / "weights", LLAMA, 1)
    write_weights(folder / "teacher", TEACHER, 2)

    def run(
        name: str,
        bad: "str | None" = "spike",
        batches=BAD,
        parallel=None,
        optim=None,
        taught=False,
        **keys,
    ):
        task = (str(folder / "weights"), str(folder / name), bad, {**KEYS, **keys})
        teacher = str(folder / "teacher") if taught else None
        return ranks.run(2, train, *task, batches, STEPS, parallel, optim, teacher)

    return run


@pytest.fixture(scope="module")
def rewound(run):
    return run("rewound")


def test_weights_are_those_without_the_batches_since_the_checkpoint(run, rewound):
    """Bit for bit: weights, losses, moments and the mean that spikes are compared with."""
    without = run("without", None, list(range(BACK, LAST)))
    for (history, weights), (want, want_weights) in zip(rewound, without, strict=True):
        assert all(torch.equal(weights[name], want_weights[name]) for name in want_weights)
        losses = {record["step"]: record["loss"] for record in history}
        kept = [*range(1, BACK + 1), *range(LAST + 1, STEPS + 1)]
        assert [losses[step] for step in kept] == [record["loss"] for record in want]
        counts = {record["step"]: (record["left_out"], record["rewinds"]) for record in history}
        assert counts[FIRST - 1] == (0, 0)
        assert counts[LAST] == (LAST - FIRST + 1, 0)
        assert counts[LAST + 1] == (LAST - BACK, 1)


def test_all_that_a_distillation_learnt_goes_back(run):
    """The projection of the inner states too, and how much their losses weigh."""
    got, want = (
        run("taught", taught=True),
        run("taught without", None, list(range(BACK, LAST)), taught=True),
    )
    kept = [*range(1, BACK + 1), *range(LAST + 1, STEPS + 1)]
    for (history, weights), (wanted, want_weights) in zip(got, want, strict=True):
        assert any("projection" in name for name in weights)
        assert all(torch.equal(weights[name], want_weights[name]) for name in want_weights)
        records = {record["step"]: record for record in history}
        assert records[LAST + 1]["rewinds"] == 1
        for key in ("alpha", "loss"):
            assert [records[step][key] for step in kept] == [record[key] for record in wanted]
        assert records[LAST]["alpha"] != records[LAST + 1]["alpha"]


def test_a_run_that_stops_and_goes_on_rewinds_alike(run, rewound):
    """Stopped among the bad steps and after them."""
    keys = {"exit_interval": 11}
    assert ["saved at step" in said for _ in range(2) for said in run("again", **keys)] == [
        True
    ] * 4
    for (history, weights), (want, want_weights) in zip(run("again", **keys), rewound, strict=True):
        assert all(torch.equal(weights[name], want_weights[name]) for name in want_weights)
        assert without_speed(history) == without_speed(want)


@pytest.mark.parametrize(
    "parallel",
    [
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"pipeline_model_parallel_size": 2},
    ],
)
def test_every_layout_rewinds_alike(run, rewound, parallel):
    history = run(str(parallel), parallel=parallel)[0][0]
    want = rewound[0][0]
    assert [record["left_out"] for record in history] == [record["left_out"] for record in want]
    assert [r["loss"] for r in history] == pytest.approx([r["loss"] for r in want], rel=1e-5)


def test_the_learning_rate_goes_on(run):
    """With each optimizer whole on every rank, and checkpoints written beside the training."""
    optim = {"lr_decay_style": "linear", "min_lr": 0.0, "use_distributed_optimizer": False}
    for history, _ in run("linear", "loss", optim=optim, async_save=True):
        for record in history:
            assert record["lr"] == pytest.approx(1e-3 * (1 - (record["step"] - 1) / STEPS))
        assert history[-1]["rewinds"] == 1


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"max_rewinds": 0}, "were left out after trainer.max_rewinds=0 at step 20"),
        ({"rewind_steps": 6}, "no checkpoint lies trainer.rewind_steps=6 before them, at step 20"),
    ],
)
def test_where_it_cannot_go_back_it_ends(run, keys, says):
    for said in run(str(keys), **keys):
        assert "training diverged: 11 steps in a row" in said
        assert says in said


def test_which_checkpoint(monkeypatch):
    """None too young, none that a signal wrote, none of weights that were given up."""
    there = [Path(f"step={step}") for step in (10, 20, 25, 30, 40, 50)]
    monkeypatch.setattr(rewind, "complete_checkpoints", lambda folder: there)
    keys: dict[str, Any] = {
        "skip_loss_above": 2,
        "save_every_n_steps": 10,
        "save_top_k": 9,
        "rewind_steps": 5,
    }
    back, spikes = Rewind(Path(), TrainerConfig(**keys)), Spikes(2.0, may_rewind=True)
    spikes.in_a_row = 11
    for step, target in ((26, 10), (25, None), (42, 20), (46, 30)):
        found = back._target(spikes, step)
        assert found == (None if target is None else Path(f"step={target}"))
    spikes.rewinds = [[20, 40]]
    assert [back._target(spikes, step) for step in (50, 56)] == [Path("step=20"), Path("step=40")]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"skip_loss_above": 0}, r"trainer.skip_loss_above=0 leaves out none; set that to 3, say"),
        ({"save_every_n_steps": 0}, "trainer.save_every_n_steps=0 writes none"),
        ({"save_top_k": 4}, r"go back 13 steps, .* \* trainer.save_every_n_steps=12: older"),
        ({"max_rewinds": -1}, "trainer.max_rewinds=-1 must not be negative"),
    ],
)
def test_what_cannot_work_is_refused(keys, says):
    TrainerConfig(**KEYS)
    with pytest.raises(ValueError, match=says):
        TrainerConfig(**{**KEYS, **keys})
