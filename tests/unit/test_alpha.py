"""The weight of the intermediate losses, from step to step."""

import math

import pytest
import torch

from nemo_minitron.config.distillation import IntermediateConfig
from nemo_minitron.models.objective import AlphaSchedule, StepSums


def _schedule(alpha: str = "dynamic", kd_weight: float = 2.0) -> AlphaSchedule:
    config = IntermediateConfig(losses=["embedding"], alpha=alpha)
    return AlphaSchedule(config, kd_weight, torch.device("cpu"))


def _see(schedule: AlphaSchedule, kd: float, *inner: float) -> None:
    """Sums of a batch."""
    sums = StepSums(*(torch.tensor(value) for value in (kd, 0.0, 4.0, 0.0)))
    schedule.update_alpha(sums, torch.tensor(inner))


def test_it_follows_the_batch_before():
    schedule = _schedule()
    assert schedule.begin_step() == 0
    _see(schedule, 3.0, 1.0, 0.5)
    assert schedule.begin_step() == schedule.used == 2.0 * 3.0 / 1.5
    _see(schedule, 3.0, 2.0)
    assert schedule.used == 4.0
    assert schedule.begin_step() == 3.0


def test_a_step_that_is_left_out_is_forgotten():
    """Also where it is left out again, after one that counted, and in what is saved."""
    schedule = _schedule()
    _see(schedule, 3.0, 1.5)
    for kd in (300.0, 30.0):
        assert schedule.begin_step() == 4.0
        _see(schedule, kd, 1.5)
        schedule.put_back()
        assert schedule.state_dict() == {"alpha": 4.0}
    schedule.begin_step()
    _see(schedule, 1.5, 1.5)
    schedule.begin_step()
    schedule.put_back()
    assert schedule.value == 2.0


def test_a_first_step_that_is_left_out_is_measured_anew():
    """Its batch taught nothing, so it must not weigh the step after it."""
    schedule = _schedule()
    assert schedule.begin_step(lambda: _see(schedule, 300.0, 1.5)) == 400.0
    _see(schedule, 30.0, 1.5)
    schedule.put_back()
    assert schedule.value is None
    assert schedule.begin_step(lambda: _see(schedule, 3.0, 1.5)) == 4.0
    _see(schedule, 1.5, 1.5)
    assert schedule.begin_step(pytest.fail) == 2.0


def test_a_fixed_weight_stays():
    schedule = _schedule("0.7")
    schedule.begin_step()
    _see(schedule, 300.0, 1.5)
    schedule.put_back()
    assert schedule.begin_step().item() == 0.7


@pytest.mark.parametrize(
    ("kd", "inner"),
    [
        (0.0, 0.0),
        (0.0, 1.5),
        (3.0, 0.0),
        (math.inf, 1.5),
        (3.0, math.inf),
        (math.nan, 1.5),
        (3.0, math.nan),
        (math.inf, math.inf),
    ],
)
def test_what_gives_no_weight_leaves_it(kd, inner):
    """A batch without targets, and one without a number, as the first one too."""
    schedule = _schedule()
    _see(schedule, kd, inner)
    assert schedule.value is None
    _see(schedule, 3.0, 1.5)
    _see(schedule, kd, inner)
    assert schedule.value == 4.0


def test_it_comes_back_from_a_checkpoint():
    saved = _schedule()
    _see(saved, 1.0, 3.0)
    schedule = _schedule()
    schedule.load_state_dict(saved.state_dict())
    assert schedule.begin_step() == saved.begin_step()
    assert schedule.value == saved.value
    schedule.load_state_dict({"alpha": None})
    assert schedule.begin_step() == 0
