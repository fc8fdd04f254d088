"""Live pruning of experts on expert-parallel ranks, in number and in width."""

from dataclasses import dataclass, replace

import pytest

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
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


@dataclass(frozen=True)
class Kind:
    """A model with experts, what is cut of it, and where."""

    has: str
    config: ModelConfig
    ways: dict[str, PruningConfig]
    layouts: dict[str, ParallelConfig]


SHARED, LINEAR = "4 experts and a shared one", "gated delta nets and 4 experts"
KINDS = {
    "mixtral": Kind("4 experts", MIXTRAL, WAYS, LAYOUTS),
    "qwen2_moe": Kind(SHARED, QWEN2_MOE, shared_ways(3), SHARED_LAYOUTS),
    "glm4_moe": Kind(
        "8 experts in two groups after dense layers", MIXED, MIXED_WAYS, MIXED_LAYOUTS
    ),
    "gpt_oss": Kind(
        "4 experts with biases, windows and sinks", GPT_OSS, GPT_OSS_WAYS, GPT_OSS_LAYOUTS
    ),
    "qwen3_next": Kind(LINEAR, QWEN3_NEXT, LINEAR_WAYS, LINEAR_LAYOUTS),
    # Layers enough to interleave and to drop some.
    "deep": Kind(SHARED, replace(QWEN2_MOE, num_layers=8), shared_ways(4), INTERLEAVED),
}
CASES = [
    pytest.param(kind, name, id=f"{name}, {found.has}")
    for kind, found in KINDS.items()
    for name in found.layouts
]
pytestmark = pytest.mark.timeout(300)  # eight ranks start on two cores


@pytest.fixture(scope="module")
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture(scope="module")
def truth(ranks: WorkerPool, tmp_path_factory: pytest.TempPathFactory, kind: Kind) -> Truth:
    return make_truth(ranks, tmp_path_factory.mktemp("live-moe"), kind.config)


@pytest.mark.parametrize(("kind", "name"), CASES, indirect=["kind"])
def test_one_answer(
    kind: Kind, truth: Truth, layout_table: LayoutTable, tmp_path, name: str
) -> None:
    shown = f"{name}, {kind.has}"
    test = f"test_prune_live_moe.py::test_one_answer[{shown}]"
    one_answer(truth, kind.layouts[name], kind.ways, tmp_path, layout_table, test, shown)


@pytest.mark.parametrize("kind", ["mixtral"], indirect=True)
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
