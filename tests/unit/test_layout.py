"""Layouts a model cannot be split into are refused with the key to change."""

from dataclasses import replace

import pytest

from nemo_minitron.config.layout import check_layout, padded_vocab_size
from nemo_minitron.config.parallel import ParallelConfig
from tests.tiny import LLAMA, MIXTRAL, QWEN2_MOE

PIPELINE = {"pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"tensor_model_parallel_size": 3}, "must divide num_query_groups=4"),
        ({"tensor_model_parallel_size": 8}, "must divide num_query_groups=4"),
        ({"expert_model_parallel_size": 2}, "needs a model with experts"),
        ({"pipeline_model_parallel_size": 3}, "num_layers=4 cannot be split"),
        (
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 3},
            "num_layers=4 cannot be split",
        ),
        ({**PIPELINE, "num_layers_in_first_pipeline_stage": 4}, "num_layers=4 cannot be split"),
        ({"num_layers_in_last_pipeline_stage": 1}, "pipeline_model_parallel_size of at least 2"),
    ],
)
def test_refused(keys, words):
    with pytest.raises(ValueError, match=words):
        check_layout(LLAMA, ParallelConfig(**keys))


def test_ffn_and_vocabulary():
    tp2 = ParallelConfig(tensor_model_parallel_size=2)
    with pytest.raises(ValueError, match="must divide ffn_hidden_size=97"):
        check_layout(replace(LLAMA, ffn_hidden_size=97), tp2)
    with pytest.raises(ValueError, match="larger than vocab_size"):
        check_layout(replace(LLAMA, vocab_size=1), tp2)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"expert_model_parallel_size": 3}, "must divide num_moe_experts=4"),
        ({"tensor_model_parallel_size": 2}, "with experts needs sequence parallelism"),
        (
            {"tensor_model_parallel_size": 4, "sequence_parallel": True},
            "must divide moe_ffn_hidden_size=42",
        ),
    ],
)
def test_experts_refused(keys, words):
    with pytest.raises(ValueError, match=words):
        check_layout(replace(MIXTRAL, moe_ffn_hidden_size=42), ParallelConfig(**keys))


def test_shared_expert_refused():
    keys = {"tensor_model_parallel_size": 4, "sequence_parallel": True}
    config = replace(QWEN2_MOE, moe_shared_expert_intermediate_size=54)
    with pytest.raises(ValueError, match="must divide moe_shared_expert_intermediate_size=54"):
        check_layout(config, ParallelConfig(**keys))


def test_experts_need_replicas_of_the_rest():
    assert ParallelConfig(expert_model_parallel_size=2).world_size() == 2
    cp = ParallelConfig(expert_model_parallel_size=4, context_parallel_size=2)
    assert cp.world_size() == 4
    with pytest.raises(ValueError, match=r"set parallel\.data_parallel_size to a multiple of 2"):
        ParallelConfig(expert_model_parallel_size=2).world_size(3)
    with pytest.raises(ValueError, match=r"must divide data x context parallel ranks, 1 x 1"):
        ParallelConfig(expert_model_parallel_size=2, data_parallel_size=1).world_size()


@pytest.mark.parametrize(
    "keys",
    [
        {"tensor_model_parallel_size": 4, "sequence_parallel": True},
        {**PIPELINE, "virtual_pipeline_model_parallel_size": 2},
        {**PIPELINE, "num_layers_in_first_pipeline_stage": 1},
        {"pipeline_model_parallel_size": 4},
        {"context_parallel_size": 2},
    ],
)
def test_accepted(keys):
    check_layout(LLAMA, ParallelConfig(**keys))


def test_vocabulary_is_padded_to_the_tensor_parallel_size():
    assert [padded_vocab_size(101, tp) for tp in (1, 2, 4)] == [101, 102, 104]
