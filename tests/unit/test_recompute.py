"""Which settings of activation recomputation are refused, and what the message says."""

from dataclasses import replace

import pytest

from nemo_minitron.config.layout import check_recompute
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.training import TrainerConfig
from tests.helpers.tiny import LLAMA, MIXTRAL

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
SELECTIVE = {"recompute_granularity": "selective"}
SIX = replace(LLAMA, num_layers=6)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"recompute_granularity": "all"}, "must be full, selective or null"),
        ({"recompute_granularity": "full"}, "needs trainer.recompute_method"),
        ({**FULL, "recompute_num_layers": None}, "recompute_num_layers of at least 1"),
        ({**FULL, "recompute_num_layers": 0}, "recompute_num_layers of at least 1"),
        ({**FULL, "recompute_method": "first"}, "must be uniform, block or null"),
        ({"recompute_method": "block"}, "needs trainer.recompute_granularity=full"),
        ({**SELECTIVE, "recompute_num_layers": 1}, "needs trainer.recompute_granularity=full"),
        ({"recompute_modules": ["mlp"]}, "recompute_granularity=selective"),
        ({**FULL, "recompute_modules": ["mlp"]}, "recompute_granularity=selective"),
        ({**SELECTIVE, "recompute_modules": ["layernorm"]}, "not layernorm"),
        ({**SELECTIVE, "recompute_modules": []}, "must name some of"),
    ],
)
def test_keys(keys, says):
    with pytest.raises(ValueError, match=says):
        TrainerConfig(**keys)


@pytest.mark.parametrize(
    ("keys", "model", "layout", "says"),
    [
        ({**SELECTIVE, "recompute_modules": ["moe"]}, LLAMA, {}, "have no experts: use mlp"),
        ({**SELECTIVE, "recompute_modules": ["mlp"]}, MIXTRAL, {}, "all experts: use moe"),
        (FULL, replace(LLAMA, num_layers=5), {}, "here 5"),
        (FULL, SIX, {"pipeline_model_parallel_size": 2}, "here 3"),
        (
            FULL,
            SIX,
            {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1},
            "here 1, 5",
        ),
        (
            {**FULL, "recompute_method": "block"},
            LLAMA,
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
            "more than the 1 layers",
        ),
    ],
)
def test_model_and_layout(keys, model, layout, says):
    with pytest.raises(ValueError, match=says):
        check_recompute(TrainerConfig(**keys), model, ParallelConfig(**layout))


@pytest.mark.parametrize(
    ("keys", "model"),
    [
        ({}, LLAMA),
        (FULL, LLAMA),
        (SELECTIVE, MIXTRAL),
        ({**FULL, "recompute_num_layers": 4}, LLAMA),
    ],
)
def test_what_fits(keys, model):
    check_recompute(TrainerConfig(**keys), model, ParallelConfig())
