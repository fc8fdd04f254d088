"""Attention sinks: transformers' numbers, and one answer on every layout, pruned with their heads.

The family exists in this file alone: Llama's network with windows and one sink per head.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from nemo_minitron.config.stages import PruningConfig, TargetConfig
from nemo_minitron.families.llama import LLAMA as FAMILY
from nemo_minitron.families.llama import SINKS
from nemo_minitron.families.registry import FAMILIES
from nemo_minitron.models.attention import attend_with_sinks
from tests.cases.generate import continuations_at
from tests.cases.kd import kd_gradients
from tests.cases.live import score_and_prune
from tests.cases.live_truth import (
    Truth,
    close_logits,
    equal_weights,
    layout,
    make_truth,
    score_error,
)
from tests.helpers.pool import WorkerPool
from tests.helpers.tiny import LLAMA, random_weights, write_result, write_weights

WITH_SINKS = replace(
    FAMILY,
    name="llama_with_sinks",
    rows=(*FAMILY.rows, SINKS),
    megatron={"softmax_type": "learnable"},
)
MODEL = replace(LLAMA, family=WITH_SINKS.name, window_size=[5, 0, 5, 0])
LAYOUTS = {
    "TP1": layout(),
    "TP2 SP": layout(tp=2, sp=True),
    "PP2": layout(pp=2),
    "CP2": layout(cp=2),
    "TP2 CP2": layout(tp=2, cp=2),
}
WIDTH = {"hidden_size": 40, "num_attention_heads": 4, "num_query_groups": 2}


def with_the_family(task: Callable[..., Any], *args: Any) -> Any:
    """Run a task where the family exists."""
    FAMILIES[WITH_SINKS.name] = WITH_SINKS
    try:
        return task(*args)
    finally:
        del FAMILIES[WITH_SINKS.name]


class Ranks(WorkerPool):
    """The pool of ranks, every task of which knows the family."""

    def __init__(self, ranks: WorkerPool) -> None:
        self.ranks = ranks

    def run(self, size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
        return self.ranks.run(size, with_the_family, fn, *args)


@pytest.fixture(scope="module")
def truth(ranks: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Truth]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, WITH_SINKS.name, WITH_SINKS)
        yield make_truth(Ranks(ranks), tmp_path_factory.mktemp("sinks"), MODEL)


def test_numbers_and_gradients_are_those_of_transformers() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 7, 12, requires_grad=True) for n in (8, 4, 4))
    sinks = torch.randn(8, requires_grad=True)
    mask = torch.ones(7, 7).tril().bool()
    added = torch.zeros(1, 1, 7, 7).masked_fill(~mask, torch.finfo(torch.float32).min)
    module: Any = SimpleNamespace(num_key_value_groups=2, sinks=sinks, training=False)
    want = eager_attention_forward(module, q, k, v, added, 12**-0.5)[0].transpose(1, 2)
    found = attend_with_sinks(q, k, v, mask, sinks)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
    weight, leaves = torch.randn_like(want), (q, k, v, sinks)
    for mine, theirs in zip(
        torch.autograd.grad((found * weight).sum(), leaves),
        torch.autograd.grad((want * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_answer(truth: Truth, tmp_path: Any, name: str) -> None:
    sizes = {"width": WIDTH, "both": {**WIDTH, "num_layers": 2}}
    ways = {way: PruningConfig(target=TargetConfig(size)) for way, size in sizes.items()}
    parallel = LAYOUTS[name]
    arguments = (MODEL, str(truth.folder), truth.ids, parallel, ways, str(tmp_path))
    for found in truth.ranks.run(parallel.world_size(), score_and_prune, *arguments):
        assert score_error(found["scores"], truth.scores) < 1e-5
        for way, pruning in ways.items():
            assert found[way]["plan"] == truth.plan(pruning)
            if found[way]["logits"] is not None:
                close_logits(found[way]["logits"], truth.logits(truth.plan(pruning)), MODEL)
    assert all(equal_weights(truth, truth.plan(way), tmp_path / n) for n, way in ways.items())


def test_sinks_go_with_their_heads(truth: Truth) -> None:
    plan, whole = truth.plan(PruningConfig(target=TargetConfig(WIDTH))), random_weights(MODEL)
    for layer, heads in enumerate(plan["head"]):
        name = SINKS.name.format(layer=layer)
        assert torch.equal(truth.weights(plan)[name], whole[name][heads])


def test_gradients_do_not_depend_on_the_layout(truth: Truth, tmp_path: Any) -> None:
    from nemo_minitron.checkpoint.torch_dist import read_torch_dist

    student = replace(MODEL, num_layers=2, window_size=[5, 0])
    write_weights(tmp_path / "student", student, seed=1)
    write_weights(tmp_path / "teacher", LLAMA, seed=2)
    pair = (student, str(tmp_path / "student")), (LLAMA, str(tmp_path / "teacher"))
    found = {}
    for name in LAYOUTS:
        out = tmp_path / name
        size = LAYOUTS[name].world_size()
        truth.ranks.run(size, kd_gradients, *pair, LAYOUTS[name], str(out), {})
        store = read_torch_dist(out, WITH_SINKS, student)
        found[name] = {key: lazy.read() for key, lazy in store.items()}
        for key, want in found["TP1"].items():
            torch.testing.assert_close(found[name][key], want, rtol=1e-4, atol=1e-6)
    assert all(found["TP1"][SINKS.name.format(layer=n)].abs().max() > 0 for n in range(2))


def test_the_cache_changes_nothing(truth: Truth, tmp_path: Any) -> None:
    folder = str(write_result(tmp_path / "model", MODEL, seed=0) / "checkpoint")
    prompts = [[5, 7, 11, 2, 90, 4], [3, 2, 1]]
    [found] = truth.ranks.run(1, continuations_at, folder, {}, prompts, 4)
    for prompt, new in zip(prompts, found, strict=True):
        for count in range(4):
            text = [*prompt, *new[:count]]
            [[again]] = truth.ranks.run(1, continuations_at, folder, {}, [text], 1)
            assert again == [new[count]]
