"""Numbers out of range are refused at start, with their key."""

import re

import pytest

from nemo_minitron.config import load, schema
from nemo_minitron.config.optim import OptimConfig
from nemo_minitron.config.search import SearchSpaceConfig
from nemo_minitron.config.stages import STAGE_CONFIGS
from nemo_minitron.config.training import DataConfig
from tests.unit.test_config import complete


def fractions(stage: str) -> list[str]:
    """Keys that take numbers which need not be whole."""
    keys = schema.keys(STAGE_CONFIGS[stage])
    return [key.name for key in keys if key.type.startswith("float")]


def test_stages_have_such_keys():
    assert sum(len(fractions(stage)) for stage in STAGE_CONFIGS) > 50


@pytest.mark.parametrize("stage", STAGE_CONFIGS)
def test_numbers_are_finite(stage):
    """Comparisons with NaN are false: a range alone lets it pass."""
    for key in fractions(stage):
        for value in ("nan", "inf", "-inf"):
            says = rf"^{re.escape(key)}={value} must be "
            with pytest.raises(ValueError, match=says):
                load.compose(stage, complete(stage, [f"{key}={value}"]))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must not be negative"),
        ({"lr_warmup_steps": -1}, "lr_warmup_steps=-1 must not be negative"),
        ({"adam_beta1": 1.0}, "adam_beta1=1.0 must be from 0 to below 1"),
        ({"adam_beta2": -0.5}, "adam_beta2=-0.5 must be from 0 to below 1"),
        ({"adam_eps": 0.0}, "adam_eps=0.0 must be above 0"),
        ({"lr": float("nan")}, "lr=nan must be a finite number"),
    ],
)
def test_adam(keys, says):
    with pytest.raises(ValueError, match=rf"^optim\.{says}$"):
        OptimConfig(**keys)


@pytest.mark.parametrize("seed", [-1, 1 << 32])
def test_seeds_that_numpy_does_not_take(seed):
    with pytest.raises(ValueError, match=rf"^data\.seed={seed} must be from 0 to 4294967295$"):
        DataConfig(path="text", seed=seed)


def test_epochs_of_a_blend():
    with pytest.raises(ValueError, match=r"^data\.blend_max_epochs=0 must be above 0$"):
        DataConfig(path="", blend=[1, "a"], blend_max_epochs=0)


def test_a_budget_that_is_no_number():
    with pytest.raises(ValueError, match=r"^search\.max_params=nan must be a finite number$"):
        SearchSpaceConfig(max_params=float("nan"))
