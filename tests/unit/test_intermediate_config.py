"""Keys, layer maps and relation heads of the intermediate losses."""

from dataclasses import replace

import pytest

from nemo_minitron.config.distillation import DistillationConfig, IntermediateConfig
from nemo_minitron.config.load import compose
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import DistillConfig
from nemo_minitron.distillation.layer_map import (
    Pair,
    check_intermediate,
    layer_map,
    make_pairs,
    relation_heads,
)
from tests.helpers.tiny import LLAMA

TEACHER = replace(LLAMA, num_layers=32)
STUDENT = replace(LLAMA, num_layers=16)
BLOCKS = IntermediateConfig(losses=["block_output"])
TP2 = ParallelConfig(tensor_model_parallel_size=2)


def test_the_automatic_map_is_that_of_the_paper():
    """2407.14679, table 17: (29:13) for a student that lost half its layers."""
    assert layer_map(BLOCKS, TEACHER, STUDENT) == [[29, 13]]
    assert layer_map(BLOCKS, TEACHER, replace(TEACHER, hidden_size=48)) == [[29, 29]]


def test_pairs_are_places():
    """The output of block i is read by layer i + 1, that of the last block by the final norm."""
    config = IntermediateConfig(
        losses=["block_output", "mlp_input", "embedding"], layer_map=[[31, 15], [29, 13]]
    )
    assert make_pairs(config, TEACHER, STUDENT) == [
        Pair("block_output", 30, 14),
        Pair("block_output", 32, 16),
        Pair("embedding", 0, 0),
        Pair("mlp_input", 29, 13),
        Pair("mlp_input", 31, 15),
    ]
    assert make_pairs(IntermediateConfig(), TEACHER, STUDENT) == []


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([[32, 15]], r"teacher layer 32 is out of range.*layers 0 to 31"),
        ([[31, 16]], r"student layer 16 is out of range.*layers 0 to 15"),
        ([[-1, 0]], r"teacher layer -1 is out of range"),
        ([[31, 15], [29, 15]], r"student layer 15 more than once"),
        ([[31, 15], [31, 15]], r"student layer 15 more than once"),
        ([[31, 15, 2]], r"\[31, 15, 2\] is not a pair"),
        ([], r"maps no layer"),
    ],
)
def test_wrong_maps_are_refused(pairs, message):
    with pytest.raises(ValueError, match=rf"distillation\.intermediate\.layer_map.*{message}"):
        check_intermediate(replace(BLOCKS, layer_map=pairs), TEACHER, STUDENT, ParallelConfig())


def test_too_few_layers_for_the_automatic_map():
    with pytest.raises(ValueError, match=r"student has num_layers=2.*set .*layer_map=\[\["):
        check_intermediate(BLOCKS, TEACHER, replace(STUDENT, num_layers=2), ParallelConfig())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"losses": ["blocks"]}, r"losses=\['blocks'\] must be different ones of embedding"),
        ({"losses": ["embedding", "embedding"]}, "must be different ones"),
        ({"metric": "l1"}, "metric=l1 must be cosine or mse"),
        ({"alpha": "0"}, r"alpha=0 must be dynamic or a number above 0.*losses=\[\]"),
        ({"alpha": "much"}, "alpha=much must be dynamic"),
        ({"losses": ["embedding"], "layer_map": [[1, 1]]}, "add one or leave layer_map out"),
        ({"losses": ["embedding"], "num_relation_heads": 2}, "leave num_relation_heads out"),
    ],
)
def test_wrong_keys_are_refused(keys, message):
    with pytest.raises(ValueError, match=rf"distillation\.intermediate\..*{message}"):
        IntermediateConfig(**keys)


def test_dynamic_alpha_needs_a_loss_on_the_logits():
    with pytest.raises(ValueError, match="alpha=dynamic follows the loss on the logits"):
        DistillationConfig(kd_weight=0.0, ce_weight=1.0, intermediate=BLOCKS)
    DistillationConfig(kd_weight=0.0, ce_weight=1.0, intermediate=replace(BLOCKS, alpha="2"))


def test_relation_heads():
    config = IntermediateConfig(losses=["attention_relation"])
    student = replace(STUDENT, num_attention_heads=4, num_query_groups=2)
    assert relation_heads(config, TEACHER, student, TP2) == 2
    # 8 x 12 and 4 x 12 channels in the teacher, 4 x 12 and 2 x 12 in the student
    assert relation_heads(replace(config, num_relation_heads=12), TEACHER, student, TP2) == 12
    for heads, message in (
        (16, r"must divide num_query_groups x kv_channels=24 of the student"),
        (3, r"must be a multiple of parallel.tensor_model_parallel_size=2"),
        (0, r"must be a multiple of"),
    ):
        with pytest.raises(ValueError, match=rf"num_relation_heads={heads} {message}"):
            relation_heads(replace(config, num_relation_heads=heads), TEACHER, student, TP2)


def composed(*overrides: str) -> DistillationConfig:
    given = ["student=a", "teacher=b", "data.path=c", "output_dir=d"]
    config = compose("distill", [*given, *overrides])
    assert isinstance(config, DistillConfig)
    return config.distillation


def test_presets():
    assert composed() == DistillationConfig()
    assert composed("distillation=logit_only") == DistillationConfig()
    preset = composed("distillation=logit_emb_block")
    assert preset.intermediate == IntermediateConfig(losses=["embedding", "block_output"])
    numbers = composed("distillation.intermediate.alpha=2")
    assert float(numbers.intermediate.alpha) == 2.0
