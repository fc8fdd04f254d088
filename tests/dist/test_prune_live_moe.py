"""The same for experts: spread over expert-parallel ranks, pruned in number and in width."""

from dataclasses import replace

import pytest

from nemo_minitron.config.stages import PruningConfig, TargetConfig
from nemo_minitron.pruning.plan import full_plan
from tests.cases.live import refused
from tests.cases.live_truth import Truth, layout, make_truth, one_answer
from tests.helpers.layout_table import LayoutTable
from tests.helpers.pool import WorkerPool
from tests.helpers.tiny import GLM4_MOE, GPT_OSS, MIXTRAL, QWEN2_MOE, QWEN3_NEXT

WIDTH = TargetConfig(
    hidden_size=40, num_attention_heads=4, num_moe_experts=2, moe_ffn_hidden_size=24
)
WAYS = {
    "width": PruningConfig(target=WIDTH),
    "depth": PruningConfig(target=TargetConfig(num_layers=3)),
    "both": PruningConfig(target=TargetConfig(WIDTH, num_layers=3)),
}
LAYOUTS = {
    "EP2": layout(dp=2, ep=2),
    "TP2 SP": layout(tp=2, sp=True),
    "EP2 PP2": layout(dp=2, ep=2, pp=2),
    "EP2 CP2": layout(cp=2, ep=2),
    "EP2 TP2 SP": layout(dp=2, ep=2, tp=2, sp=True),
    "EP2 TP2 SP PP2": layout(dp=2, ep=2, tp=2, sp=True, pp=2),
}
SHARED_WIDTH = TargetConfig(WIDTH, moe_shared_expert_intermediate_size=32, moe_router_topk=1)
SHARED_LAYOUTS = {
    "EP2": LAYOUTS["EP2"],
    "TP2 SP": LAYOUTS["TP2 SP"],
    "PP2": layout(pp=2),
    "EP2 TP2 SP": LAYOUTS["EP2 TP2 SP"],
}
# Dense layers first, groups of experts, an expert bias; on a pipeline one stage has no experts and
# the other nothing else.
MIXED = replace(
    GLM4_MOE,
    moe_layer_freq=[0, 0, 1, 1],
    moe_router_topk=2,
    moe_router_num_groups=2,
    moe_router_group_topk=1,
)
MIXED_WIDTH = TargetConfig(
    hidden_size=40,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_moe_experts=4,
    moe_ffn_hidden_size=16,
    moe_shared_expert_intermediate_size=32,
)
MIXED_WAYS = {
    "width": PruningConfig(target=MIXED_WIDTH),
    "depth": PruningConfig(target=TargetConfig(num_layers=3)),
    "both": PruningConfig(target=TargetConfig(MIXED_WIDTH, num_layers=3)),
}
MIXED_LAYOUTS = {
    "PP2": layout(pp=2),
    "EP2": LAYOUTS["EP2"],
    "TP2 SP": LAYOUTS["TP2 SP"],
    "EP2 PP2": LAYOUTS["EP2 PP2"],
}
# Windows follow the layers that stay, sinks and biases the heads; biases are merged too.
GPT_OSS_WAYS = {**WAYS, "both": replace(WAYS["both"], merge_heads=True)}
GPT_OSS_LAYOUTS = {**SHARED_LAYOUTS, "EP2 CP2": LAYOUTS["EP2 CP2"]}
# Gated delta nets, whose rows stay with their heads, and gated attention in one layer.
LINEAR_WIDTH = TargetConfig(
    WIDTH, ffn_hidden_size=48, moe_shared_expert_intermediate_size=32, num_query_groups=2
)
LINEAR_WAYS = {
    "width": PruningConfig(target=LINEAR_WIDTH),
    "depth": PruningConfig(target=TargetConfig(num_layers=3)),
    "both": PruningConfig(target=TargetConfig(LINEAR_WIDTH, num_layers=3)),
}
LINEAR_LAYOUTS = {name: GPT_OSS_LAYOUTS[name] for name in ("TP2 SP", "PP2", "EP2 CP2")}
INTERLEAVED = {"PP2 VPP2": layout(pp=2, vpp=2), "EP2 PP2 VPP2": layout(dp=2, ep=2, pp=2, vpp=2)}


def shared_ways(num_layers: int) -> dict[str, PruningConfig]:
    return {
        "width": PruningConfig(target=SHARED_WIDTH),
        "depth": PruningConfig(target=TargetConfig(num_layers=num_layers)),
        # Query, key and value have biases, which are merged as well.
        "both": PruningConfig(
            target=TargetConfig(SHARED_WIDTH, num_layers=num_layers), merge_heads=True
        ),
    }


pytestmark = pytest.mark.timeout(300)  # eight ranks start on two cores


@pytest.fixture(scope="module")
def truth(ranks: WorkerPool, tmp_path_factory) -> Truth:
    return make_truth(ranks, tmp_path_factory.mktemp("live-moe"), MIXTRAL)


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_answer(truth: Truth, layout_table: LayoutTable, tmp_path, name: str) -> None:
    test, shown = f"test_prune_live_moe.py::test_one_answer[{name}]", f"{name}, 4 experts"
    one_answer(truth, LAYOUTS[name], WAYS, tmp_path, layout_table, test, shown)


@pytest.fixture(scope="module")
def shared_truth(ranks: WorkerPool, tmp_path_factory) -> Truth:
    return make_truth(ranks, tmp_path_factory.mktemp("live-shared"), QWEN2_MOE)


@pytest.mark.parametrize("name", SHARED_LAYOUTS)
def test_shared_expert(shared_truth: Truth, layout_table: LayoutTable, tmp_path, name: str) -> None:
    test = f"test_prune_live_moe.py::test_shared_expert[{name}]"
    shown = f"{name}, 4 experts and a shared one"
    arguments = (SHARED_LAYOUTS[name], shared_ways(3), tmp_path, layout_table, test, shown)
    one_answer(shared_truth, *arguments)


@pytest.fixture(scope="module")
def mixed_truth(ranks: WorkerPool, tmp_path_factory) -> Truth:
    return make_truth(ranks, tmp_path_factory.mktemp("live-mixed"), MIXED)


@pytest.mark.parametrize("name", MIXED_LAYOUTS)
def test_dense_layers(mixed_truth: Truth, layout_table: LayoutTable, tmp_path, name: str) -> None:
    test = f"test_prune_live_moe.py::test_dense_layers[{name}]"
    shown = f"{name}, 8 experts in two groups after dense layers"
    arguments = (MIXED_LAYOUTS[name], MIXED_WAYS, tmp_path, layout_table, test, shown)
    one_answer(mixed_truth, *arguments)


@pytest.fixture(scope="module")
def gpt_oss_truth(ranks: WorkerPool, tmp_path_factory) -> Truth:
    return make_truth(ranks, tmp_path_factory.mktemp("live-gpt-oss"), GPT_OSS)


@pytest.mark.parametrize("name", GPT_OSS_LAYOUTS)
def test_gpt_oss(gpt_oss_truth: Truth, layout_table: LayoutTable, tmp_path, name: str) -> None:
    test = f"test_prune_live_moe.py::test_gpt_oss[{name}]"
    shown = f"{name}, 4 experts with biases, windows and sinks"
    arguments = (GPT_OSS_LAYOUTS[name], GPT_OSS_WAYS, tmp_path, layout_table, test, shown)
    one_answer(gpt_oss_truth, *arguments)


@pytest.fixture(scope="module")
def linear_truth(ranks: WorkerPool, tmp_path_factory) -> Truth:
    return make_truth(ranks, tmp_path_factory.mktemp("live-linear"), QWEN3_NEXT)


@pytest.mark.parametrize("name", LINEAR_LAYOUTS)
def test_delta_nets(linear_truth: Truth, layout_table: LayoutTable, tmp_path, name: str) -> None:
    test = f"test_prune_live_moe.py::test_delta_nets[{name}]"
    shown = f"{name}, gated delta nets and 4 experts"
    arguments = (LINEAR_LAYOUTS[name], LINEAR_WAYS, tmp_path, layout_table, test, shown)
    one_answer(linear_truth, *arguments)


@pytest.fixture(scope="module")
def deep_truth(ranks: WorkerPool, tmp_path_factory) -> Truth:
    """Layers enough to interleave and to drop some."""
    config = replace(QWEN2_MOE, num_layers=8)
    return make_truth(ranks, tmp_path_factory.mktemp("live-deep"), config)


@pytest.mark.parametrize("name", INTERLEAVED)
def test_interleaved(deep_truth: Truth, layout_table: LayoutTable, tmp_path, name: str) -> None:
    test = f"test_prune_live_moe.py::test_interleaved[{name}]"
    shown = f"{name}, 4 experts and a shared one"
    arguments = (INTERLEAVED[name], shared_ways(4), tmp_path, layout_table, test, shown)
    one_answer(deep_truth, *arguments)


def test_experts_that_cannot_be_shared_out_are_refused(ranks: WorkerPool, truth: Truth) -> None:
    plan = full_plan(MIXTRAL)
    three = plan.replaced(
        expert=[[0, 1, 3]] * MIXTRAL.num_layers,
        expert_ffn=[layer[:3] for layer in plan["expert_ffn"]],
    )
    arguments = (MIXTRAL, str(truth.folder), LAYOUTS["EP2"], three)
    for said, untouched in ranks.run(2, refused, *arguments):
        assert "pruning.target.num_moe_experts to 2 or 4" in said
        assert untouched
