"""One answer on every layout: scores, kept indices and pruned weights.

Every layout scores the same model, prunes it in memory by width, depth and both, and saves it; the
answer to equal is one rank's scores and the streaming executor's weights.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import PruningConfig, TargetConfig
from nemo_minitron.pruning.plan import full_plan, pruned_config
from tests.cases.live import (
    exchange_rows,
    gradients_after_pruning,
    logits_at,
    refused,
    refused_scoring,
    score_and_prune,
)
from tests.cases.live_truth import (
    Truth,
    close_logits,
    equal_weights,
    layout,
    make_truth,
    one_answer,
)
from tests.helpers.layout_table import LayoutTable, read_rows
from tests.helpers.pool import WorkerPool
from tests.helpers.tiny import LLAMA, random_weights

MODEL = replace(LLAMA, num_layers=8, num_attention_heads=16, num_query_groups=8)
WIDTH = TargetConfig(hidden_size=40, ffn_hidden_size=64, num_attention_heads=8, num_query_groups=4)
TEST = "test_prune_live.py::test_one_answer[{}]"
pytestmark = pytest.mark.timeout(300)  # eight ranks start on two cores

LAYOUTS = {
    "TP1": layout(),
    "TP2": layout(tp=2),
    "TP2 SP": layout(tp=2, sp=True),
    "TP4": layout(tp=4),
    "TP4 SP": layout(tp=4, sp=True),
    "PP2": layout(pp=2),
    "PP2 uneven": layout(pp=2, first=3),
    "PP4": layout(pp=4),
    "PP2 VPP2": layout(pp=2, vpp=2),
    "PP2 VPP2 custom": layout(pp=2, vpp=2, custom="Ettt|t|tt|ttL"),
    "CP2": layout(cp=2),
    "DP2": layout(dp=2),
    "TP2 PP2": layout(tp=2, pp=2),
    "TP2 SP PP2 VPP2": layout(tp=2, sp=True, pp=2, vpp=2),
    "TP2 SP CP2": layout(tp=2, sp=True, cp=2),
    "PP2 CP2": layout(pp=2, cp=2),
    "PP2 VPP2 DP2": layout(pp=2, vpp=2, dp=2),
    "TP2 SP PP4": layout(tp=2, sp=True, pp=4),
    "TP4 PP2": layout(tp=4, pp=2),
    "TP2 SP PP2 CP2": layout(tp=2, sp=True, pp=2, cp=2),
    "TP2 PP2 DP2": layout(tp=2, pp=2, dp=2),
}


def prunings(parallel: ParallelConfig) -> dict[str, PruningConfig]:
    """Width, depth and both; interleaving wants a multiple of stages x chunks."""
    depth, both = (4, 4) if parallel.virtual_pipeline_model_parallel_size else (5, 6)
    return {
        "width": PruningConfig(target=WIDTH),
        "depth": PruningConfig(target=TargetConfig(num_layers=depth)),
        "both": PruningConfig(target=TargetConfig(WIDTH, num_layers=both)),
    }


@pytest.fixture(scope="module")
def truth(ranks: WorkerPool, tmp_path_factory) -> Truth:
    return make_truth(ranks, tmp_path_factory.mktemp("live"), MODEL)


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_answer(truth: Truth, layout_table: LayoutTable, tmp_path, name: str) -> None:
    parallel = LAYOUTS[name]
    test = TEST.format(name)
    one_answer(truth, parallel, prunings(parallel), tmp_path, layout_table, test, name)


TIED = {"share_embeddings_and_output_weights": True}
WINDOWS = {"window_size": [5, 0, 0, 5, 5, 0, 5, 0]}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("TP2 PP2", TIED),
        ("PP2 VPP2", TIED),
        ("CP2", WINDOWS),
        ("PP2 VPP2", WINDOWS),
        ("TP2 SP CP2", WINDOWS),
    ],
)
def test_other_models(ranks: WorkerPool, tmp_path, name: str, change: dict[str, Any]) -> None:
    """The last stage's copy of tied embeddings is pruned too; windows go with their layers."""
    parallel, out = LAYOUTS[name], tmp_path / "out"
    truth = make_truth(ranks, tmp_path, replace(MODEL, **change))
    ways = {"both": prunings(parallel)["both"]}
    arguments = (truth.config, str(truth.folder), truth.ids, parallel, ways, str(out))
    results = ranks.run(parallel.world_size(), score_and_prune, *arguments)
    plan = truth.plan(ways["both"])
    assert equal_weights(truth, plan, out / "both")
    found = [r["both"]["logits"] for r in results if r["both"]["logits"] is not None]
    for tensor in found:
        close_logits(tensor, truth.logits(plan), MODEL)


@pytest.mark.parametrize(("name", "groups"), [("TP1", 8), ("TP2 PP2", 8), ("TP2 PP2", 16)])
def test_merged_heads(ranks: WorkerPool, tmp_path, name: str, groups: int) -> None:
    """Heads merge within query groups, and across ranks if every head has its own key."""
    parallel, out = LAYOUTS[name], tmp_path / "out"
    truth = make_truth(ranks, tmp_path, replace(MODEL, num_query_groups=groups))
    target = TargetConfig(hidden_size=40, num_layers=5, num_attention_heads=8, num_query_groups=8)
    ways = {"merged": PruningConfig(target=target, merge_heads=True)}
    arguments = (truth.config, str(truth.folder), truth.ids, parallel, ways, str(out))
    ranks.run(parallel.world_size(), score_and_prune, *arguments)
    plan = truth.plan(ways["merged"])
    assert any(plan.merge)
    assert equal_weights(truth, plan, out / "merged")


@pytest.mark.parametrize("other", ["TP1", "TP4", "TP2 SP CP2", "PP2 VPP2"])
def test_loads_at_another_layout(
    ranks: WorkerPool, truth: Truth, tmp_path_factory, other: str
) -> None:
    """A model pruned at TP2 PP2 gives the same logits at another layout."""
    parallel = LAYOUTS["TP2 PP2"]
    ways = {"both": PruningConfig(target=TargetConfig(WIDTH, num_layers=4))}
    out = tmp_path_factory.getbasetemp() / "pruned at TP2 PP2"
    if not out.exists():
        arguments = (MODEL, str(truth.folder), truth.ids, parallel, ways, str(out))
        ranks.run(parallel.world_size(), score_and_prune, *arguments)
    plan = truth.plan(ways["both"])
    small, elsewhere = pruned_config(MODEL, plan), LAYOUTS[other]
    found = ranks.run(
        elsewhere.world_size(), logits_at, small, str(out / "both"), truth.ids, elsewhere
    )
    seen = [tensor for tensor in found if tensor is not None]
    assert seen
    for tensor in seen:
        close_logits(tensor, truth.logits(plan), MODEL)


@pytest.mark.parametrize("name", ["TP2", "PP2"])
def test_a_pruned_model_trains(ranks: WorkerPool, truth: Truth, name: str) -> None:
    parallel = LAYOUTS[name]
    plan = truth.plan(prunings(parallel)["both"])
    arguments = (MODEL, str(truth.folder), truth.ids, parallel, plan)
    ranks.run(parallel.world_size(), gradients_after_pruning, *arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_rows_of_any_dtype_travel(ranks: WorkerPool, dtype: torch.dtype) -> None:
    ranks.run(2, exchange_rows, dtype)


def test_refusals_leave_the_model_alone(ranks: WorkerPool, truth: Truth) -> None:
    plan = full_plan(MODEL)
    five = plan.replaced(
        layer=[0, 1, 2, 4, 6],
        ffn=plan["ffn"][:5],
        head=plan["head"][:5],
        query_group=plan["query_group"][:5],
    )
    odd = plan.replaced(ffn=[list(range(51))] * MODEL.num_layers)
    for parallel, chosen, message in (
        (LAYOUTS["PP2 VPP2"], five, "keep 4 or 8 layers"),
        (LAYOUTS["TP2"], odd, "pruning.target.ffn_hidden_size to 50 or 52"),
    ):
        for said, untouched in ranks.run(2, refused, MODEL, str(truth.folder), parallel, chosen):
            assert message in said
            assert untouched


def test_interleaving_needs_enough_micro_batches(ranks: WorkerPool, truth: Truth) -> None:
    arguments = (MODEL, str(truth.folder), truth.ids, LAYOUTS["PP2 VPP2"], 1)
    for said in ranks.run(2, refused_scoring, *arguments):
        assert "set data.global_batch_size to a multiple of 2" in said


def test_the_documented_table_is_complete() -> None:
    rows = read_rows()
    assert {TEST.format(name) for name in LAYOUTS} <= rows.keys()
    for row in rows.values():
        _, _, _, error, same_indices, same_weights, *_ = (cell.strip() for cell in row.split("|"))
        assert float(error) <= 1e-5
        assert (same_indices, same_weights) == ("yes", "yes")


def test_random_weights_have_no_equal_rows() -> None:
    """Or a row in the wrong place would go unseen."""
    for tensor in random_weights(MODEL).values():
        assert len(tensor.unique(dim=0)) == len(tensor)
