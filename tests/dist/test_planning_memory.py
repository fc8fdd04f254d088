"""Planned parameters and activations against models that are built and run."""

from dataclasses import replace

import pytest

from nemo_minitron.config.layers import kinds_of
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.training import TrainerConfig
from nemo_minitron.planning import activations
from nemo_minitron.planning.activations import Tokens
from nemo_minitron.planning.shares import shares
from tests.cases.planning import bytes_saved, parameters_held
from tests.helpers.tiny import (
    GLM4_MOE,
    GPT2,
    LLAMA,
    MIXTRAL,
    NEMOTRON,
    OLMO2,
    QWEN2_MOE,
    QWEN3,
    SMOLLM3,
)

TP2 = ParallelConfig(tensor_model_parallel_size=2)
TP2_SP = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
PP2 = ParallelConfig(pipeline_model_parallel_size=2)
UNEVEN = replace(PP2, num_layers_in_first_pipeline_stage=1)
TP2_PP2 = replace(TP2, pipeline_model_parallel_size=2)
EP2_TP2 = replace(TP2_SP, expert_model_parallel_size=2, data_parallel_size=2)
VPP2 = replace(PP2, virtual_pipeline_model_parallel_size=2)
TIED = replace(LLAMA, share_embeddings_and_output_weights=True)


@pytest.mark.parametrize(
    ("config", "size", "parallel"),
    [
        (LLAMA, 1, ParallelConfig()),
        (LLAMA, 4, TP2_PP2),
        (TIED, 2, UNEVEN),
        (TIED, 2, VPP2),
        (GPT2, 2, PP2),
        (QWEN2_MOE, 4, EP2_TP2),
    ],
)
def test_parameters_of_every_rank(ranks, config, size, parallel):
    planned = shares(config, parallel)
    for stage, held in ranks.run(size, parameters_held, config, parallel):
        assert planned[stage].total == held


@pytest.mark.parametrize(
    ("config", "size", "parallel"),
    [
        (LLAMA, 1, ParallelConfig()),
        (LLAMA, 2, TP2_SP),
        (NEMOTRON, 2, TP2),
        (QWEN3, 1, ParallelConfig()),
        (GPT2, 1, ParallelConfig()),
        (MIXTRAL, 1, ParallelConfig()),
        (SMOLLM3, 1, ParallelConfig()),
        (OLMO2, 1, ParallelConfig()),
        (OLMO2, 2, TP2),
    ],
)
def test_activations_of_a_layer(ranks, config, size, parallel):
    """The difference between models of 4 and of 2 layers is what 2 layers keep."""
    length = 64
    skips = config.no_rope_freq
    configs = [
        replace(config, num_layers=layers, no_rope_freq=skips and skips[:layers])
        for layers in (2, 4)
    ]
    planned = activations.layer(config, parallel, Tokens(length, 4, fused=False), kinds_of(config))
    for two, four in ranks.run(size, bytes_saved, configs, parallel, length):
        print(config.family, parallel.tensor_model_parallel_size, planned, (four - two) / 2)
        assert planned == pytest.approx((four - two) / 2, rel=0.05)


def test_activations_of_a_layer_for_multi_token_prediction(ranks):
    parallel, length, trainer = ParallelConfig(), 64, TrainerConfig()
    config = replace(GLM4_MOE, mtp_num_layers=1)
    planned = activations.prediction(config, parallel, Tokens(length, 4, fused=False), trainer)
    ((without, held),) = ranks.run(1, bytes_saved, [GLM4_MOE, config], parallel, length)
    assert planned == pytest.approx(held - without, rel=0.05)
