"""The Python interface on stock models of Megatron-Core whose layers differ."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import PruningConfig
from nemo_minitron.pruning.plan import full_plan, make_plan
from tests.cases.live_truth import Truth, layout, make_truth
from tests.cases.stock_layers import Pruned, pruned_stock, refused, scored_where_layers_are
from tests.helpers.pool import WorkerPool
from tests.helpers.tiny import GLM4_MOE, LLAMA, MINISTRAL

assert MINISTRAL.window_size == [6, 0, 6, 0]
assert GLM4_MOE.moe_layer_freq == [0, 1, 1, 1]
PREDICTION = replace(GLM4_MOE, mtp_num_layers=1)
WIDTHS = {"hidden_size": 40, "ffn_hidden_size": 64, "moe_ffn_hidden_size": 16}
ONE, PP2, VPP2 = layout(), layout(pp=2), layout(pp=2, vpp=2)
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def windows(ranks: WorkerPool, tmp_path_factory) -> Truth:
    return make_truth(ranks, tmp_path_factory.mktemp("windows"), MINISTRAL)


@pytest.fixture(scope="module")
def experts(ranks: WorkerPool, tmp_path_factory) -> Truth:
    return make_truth(ranks, tmp_path_factory.mktemp("experts"), GLM4_MOE)


def pruned(truth: Truth, parallel: ParallelConfig, choice: dict[str, Any], listed: bool) -> Pruned:
    """Return the results of all ranks, compared with weights and logits of streaming pruning."""
    arguments = (truth.config, str(truth.folder), truth.ids, parallel, choice, listed)
    found = truth.ranks.run(parallel.world_size(), pruned_stock, *arguments)
    last: Pruned = found[-1]
    assert all((one.plan, one.settings) == (last.plan, last.settings) for one in found)
    wanted = truth.weights(last.plan)
    assert last.weights.keys() == wanted.keys()
    assert all(torch.equal(last.weights[name], tensor) for name, tensor in wanted.items())
    assert last.logits is not None
    torch.testing.assert_close(last.logits, truth.logits(last.plan), rtol=0, atol=1e-4)
    return last


@pytest.mark.parametrize("parallel", [ONE, PP2], ids=["TP1", "PP2"])
@pytest.mark.parametrize(
    ("dropped", "skips"),
    [([1, 3], None), ([2, 4], [1, 1]), ([2, 3], [1, 0])],
    ids=["none left", "all", "one left"],
)
def test_windows_of_the_layers_that_are_left(windows, parallel, dropped, skips) -> None:
    """The text is longer than a window, so that a window in the wrong layer changes the logits."""
    found = pruned(windows, parallel, {"drop_layers": dropped}, listed=False)
    assert found.settings == {
        "num_layers": 2,
        "window_size": None if skips is None else (5, 0),
        "window_attn_skip_freq": skips,
    }


def test_widths_of_layers_that_a_spec_lists(experts: Truth) -> None:
    """Every virtual stage has a list of its own: the first one has no experts."""
    one, split = (pruned(experts, parallel, WIDTHS, listed=True) for parallel in (ONE, VPP2))
    assert one.plan == split.plan
    assert one.settings == split.settings


def assert_refused(found: list[tuple[str, bool]], says: str) -> None:
    for said, untouched in found:
        assert says in said
        assert untouched


@pytest.mark.parametrize("parallel", [ONE, VPP2], ids=["TP1", "PP2 VPP2"])
def test_layers_that_a_spec_lists_are_not_dropped(ranks: WorkerPool, parallel) -> None:
    """Also where every stage lists layers of one kind alone, and sees no other."""
    kinds = replace(GLM4_MOE, num_layers=8, moe_layer_freq=[0, 0, *[1] * 6])
    fewer = make_plan(kinds, PruningConfig(drop_layers=[2, 4, 6, 8]), None)
    found = ranks.run(parallel.world_size(), refused, kinds, parallel, fewer, True)
    assert_refused(found, "the layer spec of GPTModel lists layers that differ")


@pytest.mark.parametrize("parallel", [ONE, PP2], ids=["TP1", "PP2"])
def test_a_layer_for_further_tokens_is_not_pruned(ranks: WorkerPool, parallel) -> None:
    """It is on the last stage alone, and all refuse."""
    narrow = full_plan(PREDICTION).replaced(hidden=list(range(0, PREDICTION.hidden_size, 2)))
    found = ranks.run(parallel.world_size(), refused, PREDICTION, parallel, narrow, True)
    assert_refused(
        found, "mtp_num_layers=1: it is not known how the layer for multi-token prediction"
    )


def test_a_stage_without_a_layer_is_not_scored(ranks: WorkerPool) -> None:
    config = replace(LLAMA, num_layers=2)
    found = ranks.run(2, scored_where_layers_are, config, PP2, "Et*2|L")
    assert [layers for layers, _ in found] == [2, 0]
    for _, said in found:
        assert "a pipeline stage without a layer of the decoder is not supported for" in said
