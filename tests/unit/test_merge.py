"""Merging heads against the formula of 2407.14679, section 2.3, written out by hand."""

from dataclasses import replace

import pytest
import torch

from nemo_minitron.checkpoint.lazy import from_tensor
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.stages import PruningConfig, TargetConfig
from nemo_minitron.families.llama import LLAMA as FAMILY
from nemo_minitron.pruning.merge import compose_terms, merge_pairs, merge_qkv, merge_terms
from nemo_minitron.pruning.plan import Plan, make_plan
from nemo_minitron.pruning.scores import Scores, model_meta
from nemo_minitron.pruning.slicing import prune_store
from nemo_minitron.pruning.targets import check_pruning
from tests.helpers.tiny import LLAMA, random_weights

GQA = replace(LLAMA, num_attention_heads=10, num_query_groups=2)  # five query heads per group
MHA = replace(LLAMA, num_attention_heads=6, num_query_groups=6)


def heads_of(config: ModelConfig, qkv: torch.Tensor) -> dict[str, torch.Tensor]:
    """``[n or g, d, h]`` query, key and value heads of a linear_qkv weight."""
    groups, per = config.num_query_groups, config.heads_per_group
    rows = qkv.view(groups, per + 2, config.kv_channels, -1)
    return {"q": rows[:, :per].flatten(0, 1), "k": rows[:, per], "v": rows[:, per + 1]}


def by_the_formula(heads: list[torch.Tensor], kept: int) -> list[torch.Tensor]:
    """head_i + (head_i - head_{2K-i+1}), heads sorted by importance and counted from 1."""
    count, result = len(heads), []
    for i in range(1, kept + 1):
        head = heads[i - 1]
        if i >= kept - (count - kept) + 1:
            head = head + (head - heads[2 * kept - i + 1 - 1])
        result.append(head)
    return result


def pruned(
    config: ModelConfig, merge: bool, **target: int
) -> tuple[Plan, dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    scores = Scores(
        head=torch.rand(config.num_layers, config.num_attention_heads),
        meta={"model": model_meta(config)},
    )
    pruning = PruningConfig(target=TargetConfig(**target), merge_heads=merge)
    plan = make_plan(config, pruning, scores)
    weights = random_weights(config)
    store = prune_store(
        FAMILY, config, plan, {name: from_tensor(tensor) for name, tensor in weights.items()}
    )
    return plan, weights, {name: lazy.read() for name, lazy in store.items()}, scores["head"]


def test_pairs_run_outwards_from_the_cut() -> None:
    assert merge_pairs(10, 7) == [(6, 7), (5, 8), (4, 9)]
    assert merge_pairs(4, 2) == [(1, 2), (0, 3)]
    assert merge_pairs(3, 3) == []


@pytest.mark.parametrize("groups", [1, 2])
def test_query_heads_of_each_group_by_the_formula(groups: int) -> None:
    small = replace(GQA, num_attention_heads=3 * groups, num_query_groups=groups)
    plan, weights, found, scores = pruned(
        GQA, True, num_attention_heads=3 * groups, num_query_groups=groups
    )
    for layer in range(GQA.num_layers):
        name = f"decoder.layers.{layer}.self_attention.linear_qkv.weight"
        before, after = heads_of(GQA, weights[name]), heads_of(small, found[name])
        for position, group in enumerate(plan["query_group"][layer]):
            order = scores[layer, 5 * group : 5 * group + 5].argsort(descending=True) + 5 * group
            merged = by_the_formula([before["q"][head] for head in order], 3)
            expected = {int(head): value for head, value in zip(order, merged, strict=False)}
            kept = [head for head in plan["head"][layer] if head // 5 == group]
            assert sorted(expected) == kept
            for place, head in enumerate(kept, start=3 * position):
                torch.testing.assert_close(after["q"][place], expected[head])
        assert torch.equal(after["k"], before["k"][plan["query_group"][layer]])
        assert torch.equal(after["v"], before["v"][plan["query_group"][layer]])


def test_heads_with_keys_of_their_own_are_merged_whole() -> None:
    small = replace(MHA, num_attention_heads=4, num_query_groups=4)
    plan, weights, found, scores = pruned(MHA, True, num_attention_heads=4, num_query_groups=4)
    for layer in range(MHA.num_layers):
        name = f"decoder.layers.{layer}.self_attention.linear_qkv.weight"
        before, after = heads_of(MHA, weights[name]), heads_of(small, found[name])
        order = scores[layer].argsort(descending=True)
        for part in "qkv":
            merged = by_the_formula([before[part][head] for head in order], 4)
            expected = {int(head): value for head, value in zip(order, merged, strict=False)}
            for place, head in enumerate(plan["head"][layer]):
                torch.testing.assert_close(after[part][place], expected[head])


@pytest.mark.parametrize("config", [GQA, MHA])
def test_nothing_else_changes(config: ModelConfig) -> None:
    target = {"num_attention_heads": 6 if config is GQA else 4}
    if config is MHA:
        target["num_query_groups"] = 4
    plan, _, merged, _ = pruned(config, True, **target)
    plain, _, sliced, _ = pruned(config, False, **target)
    assert replace(plan, merge=[]) == plain
    assert len(plan.merge) == config.num_layers
    for name, tensor in sliced.items():
        assert torch.equal(merged[name], tensor) == ("linear_qkv" not in name), name


def test_a_rank_merges_its_own_groups() -> None:
    torch.manual_seed(0)
    whole = torch.randn((5 + 2) * 2 * GQA.kv_channels, 8)
    terms = merge_terms(GQA, torch.rand(10).tolist(), [0, 1], [0, 1, 2, 5, 6, 7])
    expected = merge_qkv(whole, GQA, terms)
    for group, shard in enumerate(whole.chunk(2)):
        assert torch.equal(merge_qkv(shard, GQA, terms, group), expected.chunk(2)[group])
    bias = merge_qkv(whole[:, 0], GQA, terms)
    assert torch.equal(bias, expected[:, 0])


def test_half_precision_is_rounded_once() -> None:
    torch.manual_seed(0)
    whole = torch.randn((5 + 2) * 2 * GQA.kv_channels, 8).bfloat16()
    terms = merge_terms(GQA, torch.rand(10).tolist(), [0, 1], [0, 1, 2, 5, 6, 7])
    expected = merge_qkv(whole.float(), GQA, terms).bfloat16()
    assert torch.equal(merge_qkv(whole, GQA, terms), expected)


def test_terms_compose() -> None:
    first = [[0, 0, 2], [0, 3, -1], [1, 1, 2], [1, 2, -1]]  # keeps 0 and 1 of a group of four
    second = [[0, 0, 2], [0, 1, -1]]
    assert compose_terms(first, [0, 1], second, [0]) == [
        [0, 0, 4],
        [0, 1, -2],
        [0, 2, 1],
        [0, 3, -2],
    ]
    assert compose_terms([], [4, 7, 9], [[1, 1, 2], [1, 2, -1]], [0, 1]) == [[7, 7, 2], [7, 9, -1]]
    assert compose_terms(first, [0, 1], [], [1]) == first[2:]


@pytest.mark.parametrize(
    ("config", "target", "message"),
    [
        (
            GQA,
            {"num_attention_heads": 4},
            r"at least half of the 5 query heads.*not 2.*iterations=2",
        ),
        (GQA, {"hidden_size": 8}, r"nothing to merge: every query group keeps its 5 query heads"),
        (GQA, {"num_query_groups": 1, "num_attention_heads": 5}, "nothing to merge"),
        (MHA, {"num_query_groups": 2, "num_attention_heads": 2}, r"half of the 6.* every layer"),
    ],
)
def test_bad_merges_are_refused(config: ModelConfig, target: dict[str, int], message: str) -> None:
    pruning = PruningConfig(target=TargetConfig(**target), merge_heads=True)
    with pytest.raises(ValueError, match=message):
        check_pruning(config, pruning)


def test_plans_without_a_merge_are_as_they_were(tmp_path) -> None:
    plan, _, _, _ = pruned(GQA, False, num_attention_heads=6)
    plan.save(tmp_path)
    assert "merge" not in (tmp_path / "plan.json").read_text()
    assert Plan.load(tmp_path) == plan
    merged, _, _, _ = pruned(GQA, True, num_attention_heads=6)
    merged.save(tmp_path)
    assert Plan.load(tmp_path) == merged
