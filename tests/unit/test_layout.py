"""Layouts a model cannot be split into are refused with the key to change."""

from dataclasses import replace

import pytest

from nemo_minitron.config.layout import check_layout, check_pipeline, padded_vocab_size
from nemo_minitron.config.parallel import ParallelConfig, TeacherParallelConfig, layers_per_chunk
from tests.helpers.tiny import LLAMA, MIXTRAL, QWEN2_MOE

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
    parallel = ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True)
    config = replace(QWEN2_MOE, moe_shared_expert_intermediate_size=54)
    with pytest.raises(ValueError, match="must divide moe_shared_expert_intermediate_size=54"):
        check_layout(config, parallel)


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


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize(
    "name",
    [
        "data_parallel_size",
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
    ],
)
def test_sizes_below_one(name, value):
    """A first stage of -1 layers would leave 5 of 4 to the others."""
    with pytest.raises(ValueError, match=rf"^parallel\.{name}={value} must be at least 1, or null"):
        ParallelConfig(pipeline_model_parallel_size=2, **{name: value})


def test_degrees_of_the_teacher_below_one():
    teacher = TeacherParallelConfig(own_ranks=1, tensor_model_parallel_size=0)
    with pytest.raises(ValueError, match=r"teacher_parallel\.tensor_model_parallel_size=0 must be"):
        teacher.of(ParallelConfig())


def test_vocabulary_is_padded_to_the_tensor_parallel_size():
    assert [padded_vocab_size(101, tp) for tp in (1, 2, 4)] == [101, 102, 104]


@pytest.mark.parametrize(
    ("layout", "sizes"),
    [
        ("Ettt|t*4|tL", [3, 4, 1]),
        ("Et|(tt|)*3,tL", [1, 2, 2, 2, 1]),
        ("E(t|)*3tL", [1, 1, 1, 1]),
    ],
)
def test_custom_pipeline_layouts_are_read_as_megatron_does(layout, sizes):
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    assert layers_per_chunk(layout) == sizes
    rows = PipelineParallelLayerLayout.parse_str_to_list(layout)
    assert [sum(kind.name == "decoder" for kind in row) for row in rows] == sizes


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"layout": "tt|ttL"}, "must start with E, end with L"),
        ({"layout": "Ett|mL"}, "must start with E, end with L .*m, is not supported"),
        ({"layout": "E|ttttL"}, "leaves part 1 of 2 without a layer"),
        ({"layout": "Et|tt|tL"}, r"has 3 parts; .*=2 x virtual.*=1 needs 2"),
        ({"layout": "Ett|ttL", "first": 1}, "leave parallel.num_layers_in_first/last"),
    ],
)
def test_custom_pipeline_layouts_that_are_refused(keys, says):
    with pytest.raises(ValueError, match=rf"^parallel\.pipeline_model_parallel_layout=.*{says}"):
        ParallelConfig(
            pipeline_model_parallel_size=2,
            pipeline_model_parallel_layout=keys["layout"],
            num_layers_in_first_pipeline_stage=keys.get("first"),
        )


def test_a_custom_pipeline_layout_has_the_layers_of_the_model():
    parallel = ParallelConfig(
        pipeline_model_parallel_size=2, pipeline_model_parallel_layout="Ett|tttL"
    )
    with pytest.raises(ValueError, match=r"holds 5 layers \(t\) but num_layers=4"):
        check_pipeline(LLAMA, parallel)
