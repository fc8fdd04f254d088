"""Enumeration against brute force, and search spaces that hold nothing."""

import itertools
import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.search import SearchSpaceConfig, ShortDistillConfig
from nemo_minitron.config.stages import SearchConfig
from nemo_minitron.families.registry import family_of
from nemo_minitron.families.table import active_parameters, parameter_count
from nemo_minitron.pruning.plan import make_plan, pruned_config
from nemo_minitron.pruning.scores import Scores, model_meta
from nemo_minitron.search import candidates, kept_layers, pareto_front
from nemo_minitron.stages import candidates as scoring
from nemo_minitron.stages.candidate_stages import pruning_of
from nemo_minitron.stages.search import ranked
from tests.helpers.tiny import (
    DEEPSEEK_EXPERTS,
    GLM4_MOE,
    LLAMA,
    NEMOTRON_H,
    QWEN3_NEXT,
    random_weights,
)

LISTS: dict[str, Any] = {
    "num_layers": [2, 3, 4],
    "hidden_size": [32, 40, 48, 64],
    "ffn_hidden_size": [48, 64, 96],
    "num_attention_heads": [2, 4, 6, 8],
    "num_query_groups": [2, 4],
}


def llama_parameters(layers: int, hidden: int, ffn: int, heads: int, groups: int) -> int:
    """Written out for the tiny Llama: head dim 12, vocabulary 101, untied."""
    attention = hidden * 12 * (heads + 2 * groups) + heads * 12 * hidden
    return layers * (attention + 3 * hidden * ffn + 2 * hidden) + hidden + 2 * 101 * hidden


def brute_force(low: float, high: float, divisor: int, tp: int, memory: float) -> list[tuple]:
    found = []
    for shape in itertools.product(*LISTS.values()):
        layers, hidden, ffn, heads, groups = shape
        count = llama_parameters(*shape)
        cache = 2 * layers * groups * 12 * 4 * 100  # 4 sequences of 100 tokens
        if (
            shape != (4, 64, 96, 8, 4)
            and heads % groups == 0
            and heads <= 2 * groups
            and (hidden % divisor == 0 or hidden == 64)
            and (ffn % divisor == 0 or ffn == 96)
            and heads % tp == groups % tp == ffn % tp == 0
            and low <= count <= high
            and 4 * (count + cache) <= memory * 2**30
        ):
            found.append((count, shape))
    return sorted(found)


@pytest.mark.parametrize(
    ("keys", "limits"),
    [
        ({}, (0, 1e9, 1, 1, 1)),
        ({"target_params": 60_000, "tolerance": 0.1}, (54_000, 66_000, 1, 1, 1)),
        ({"max_params": 50_000, "divisor": 16}, (0, 50_000, 16, 1, 1)),
        ({"tensor_model_parallel_size": 4, "divisor": 8}, (0, 1e9, 8, 4, 1)),
        ({"max_memory_gb": 0.0003, "batch_size": 4, "seq_length": 100}, (0, 1e9, 1, 1, 0.0003)),
    ],
)
def test_enumeration_is_brute_force(keys, limits):
    space = SearchSpaceConfig(**LISTS, **keys, max_candidates=1000)
    found = candidates(LLAMA, space)
    wanted = brute_force(*limits)
    assert wanted
    assert sorted((one.parameters, tuple(one.sizes.values())) for one in found) == wanted
    assert len({one.name for one in found}) == len(found)


def test_sizes_of_experts_and_mamba_layers() -> None:
    """In total and active parameters, and with the states of Mamba layers in the memory."""
    lists: dict[str, Any] = {"num_moe_experts": [2, 3, 4], "mamba_num_heads": [4, 6, 8]}
    lists |= {"mamba_head_dim": [6, 8], "batch_size": 2, "seq_length": 10}
    found = {c.name: c for c in candidates(NEMOTRON_H, SearchSpaceConfig(**lists))}
    one = found["l8_h64_f96_n8_g4_e2_m4_p6"]
    small = NEMOTRON_H.resized({"num_moe_experts": 2, "mamba_num_heads": 4, "mamba_head_dim": 6})
    expert = 2 * 64 * 24
    assert one.parameters == sum(t.numel() for t in random_weights(small).values())
    assert one.active == one.parameters  # both experts are picked
    more = found["l8_h64_f96_n8_g4_e4_m4_p6"]
    router = 2 * (64 + 1)  # of two more experts, with their bias
    assert more.parameters == one.parameters + 2 * expert + router
    assert more.active == one.active + router
    limit = sorted(candidate.active for candidate in found.values())[5]
    bounded = candidates(NEMOTRON_H, SearchSpaceConfig(**lists, max_active_params=limit))
    assert {c.name for c in bounded} == {c.name for c in found.values() if c.active <= limit}
    keys = 2 * 4 * 12 * 10  # one layer of attention
    states = 4 * (4 * 6 * 16 + (4 * 6 + 2 * 2 * 16) * 4)
    assert one.memory_gib * 2**30 == 4 * (one.parameters + 2 * (keys + states))


def test_layers_of_several_kinds_are_those_that_stay() -> None:
    """Budgets hold for the model that is pruned, not for one of the first layers."""
    count = NEMOTRON_H.num_layers - 2
    layers = torch.ones(NEMOTRON_H.num_layers)
    layers[[0, 2]] = 0  # two of the Mamba layers are worth least
    scores = Scores(layer=layers, meta={"model": model_meta(NEMOTRON_H)})
    cfg = SearchConfig(output_dir="out", checkpoint="in", importance="scores")
    cfg.search = SearchSpaceConfig(num_layers=[count])
    kept = kept_layers(NEMOTRON_H, cfg, scores)
    (one,) = candidates(NEMOTRON_H, cfg.search, kept)
    plan = make_plan(NEMOTRON_H, pruning_of(cfg, NEMOTRON_H, one), scores)
    pruned = random_weights(pruned_config(NEMOTRON_H, plan))
    assert one.parameters == sum(tensor.numel() for tensor in pruned.values())
    (first,) = candidates(NEMOTRON_H, cfg.search)
    assert first.parameters != one.parameters
    limits = [one.parameters, first.parameters]
    cfg.search.target_params, cfg.search.tolerance = limits[0], 1e-6
    assert candidates(NEMOTRON_H, cfg.search, kept)
    cfg.search.target_params = limits[1]
    with pytest.raises(ValueError, match="no shape of 1 meets"):
        candidates(NEMOTRON_H, cfg.search, kept)
    assert kept_layers(LLAMA, cfg, scores) == {}


GROUPS = replace(GLM4_MOE, moe_router_topk=2, moe_router_num_groups=2, moe_router_group_topk=1)


def test_numbers_of_experts_that_the_groups_of_a_router_can_hold() -> None:
    """A number too small for what a token is routed to is left out, as other misfits are."""
    found = candidates(GROUPS, SearchSpaceConfig(num_moe_experts=[2, 4, 6, 7]))
    assert [one.sizes["num_moe_experts"] for one in found] == [4, 6]


@pytest.mark.parametrize("config", [GLM4_MOE, DEEPSEEK_EXPERTS])
def test_widths_of_shared_experts_that_config_json_cannot_say(config: ModelConfig) -> None:
    """There the shared expert is as wide as a number of the others: such shapes are left out."""
    lists: dict[str, Any] = {"moe_ffn_hidden_size": [12, 16, 24]}
    lists["moe_shared_expert_intermediate_size"] = [24, 36, 40, 48]
    said: list[str] = []
    found = candidates(config, SearchSpaceConfig(**lists), say=said.append)
    sizes = {tuple(one.sizes[name] for name in lists) for one in found}
    assert sizes == {(12, 24), (12, 36), (12, 48), (16, 48), (24, 24)}
    (line,) = said
    assert line.startswith("6 of 11 shapes are left out: moe_shared_expert_intermediate_size=40 ")
    lists["moe_shared_expert_intermediate_size"] = [25]
    with pytest.raises(ValueError, match=r"none of the 3 shapes can be exported: .*=25 must be a "):
        candidates(config, SearchSpaceConfig(**lists))


@pytest.mark.parametrize(
    "config",
    [GLM4_MOE, replace(GLM4_MOE, mtp_num_layers=1), LLAMA, NEMOTRON_H, QWEN3_NEXT],
    ids=["experts", "prediction", "dense", "hybrid", "linear"],
)
def test_parameters_are_counted_without_a_look_at_each(config: ModelConfig, monkeypatch) -> None:
    """A search counts those of thousands of shapes, of which each may have 10,000 of experts."""
    family = family_of(config)
    shapes = [(row, math.prod(row.shape(config))) for _, row, _ in family.parameters(config)]
    total = sum(size for _, size in shapes)
    routed = [size for row, size in shapes if row.expert is not None and not row.predicts]
    active = sum(size for row, size in shapes if row.expert is None and not row.predicts)
    active += sum(routed) * config.moe_router_topk // (config.num_moe_experts or 1)
    monkeypatch.delattr(type(family), "parameters")
    assert parameter_count(family, config)["total"] == total
    assert active_parameters(family, config) == active
    assert candidates(config, SearchSpaceConfig(hidden_size=[32]))


@pytest.mark.parametrize(
    ("model", "keys", "says"),
    [
        (GROUPS, {"num_moe_experts": [2]}, "group_topk=1 of .*=2 must hold .*=2 exp"),
        (
            LLAMA,
            {"mamba_num_heads": [4]},
            r"search.mamba_num_heads=\[4\] is a size that this model",
        ),
        (NEMOTRON_H, {"mamba_num_heads": [5]}, "mamba_num_heads must be a multiple of .*=2"),
        (NEMOTRON_H, {"num_moe_experts": [1]}, "num_moe_experts must be at least .*topk=2"),
        (NEMOTRON_H, {"num_moe_experts": [2], "max_active_params": 10}, "no shape of 1 meets"),
    ],
)
def test_what_no_such_model_can_be(model: ModelConfig, keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        candidates(model, SearchSpaceConfig(**keys))


def test_ranges_are_inclusive():
    space = SearchSpaceConfig(hidden_size=["32:64:16", 40], num_layers=[3])
    assert space.hidden_size == [32, 40, 48, 64]
    space = SearchSpaceConfig(num_layers=["1:4:2"])
    assert space.num_layers == [1, 3]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({}, "holds nothing but the model itself; set one of search.num_layers"),
        ({"hidden_size": [65]}, "search.hidden_size holds 65, more than 64 of the model"),
        ({"hidden_size": ["8-16"]}, "search.hidden_size holds 8-16; give sizes and ranges"),
        ({"hidden_size": [0]}, "search.hidden_size holds 0; give sizes and ranges"),
        (
            {"hidden_size": ["64:32:16"]},
            "search.hidden_size holds 64:32:16, whose start is above its stop",
        ),
        (
            {"num_attention_heads": [3, 5]},
            r"search space is empty: no shape keeps this: num_attention_heads must be a multiple "
            r"of num_query_groups .* \(of 2 shapes 2 kept",
        ),
        (
            {"num_query_groups": [1], "num_attention_heads": [4, 8]},
            "a query group holds at most 2 heads",
        ),
        ({"hidden_size": [33, 35], "divisor": 16}, "search.divisor=16 must divide hidden_size"),
        (
            {"ffn_hidden_size": [49, 51], "tensor_model_parallel_size": 2},
            "search.tensor_model_parallel_size=2 must divide num_query_groups",
        ),
        (
            {"hidden_size": [32, 48], "target_params": 1000},
            "no shape of 2 meets search.target_params=1000 within 0.05; the nearest is "
            f"num_layers=4 hidden_size=32 .* with {llama_parameters(4, 32, 96, 8, 4):,} parameters",
        ),
        (
            {"hidden_size": [32, 48], "max_params": 10, "max_memory_gb": 1},
            "search.max_params=10 and search.max_memory_gb=1",
        ),
        (
            {"hidden_size": ["32:60:1"], "max_candidates": 20},
            "29 shapes are within the budget, more than search.max_candidates=20",
        ),
        ({"tolerance": 0}, "search.tolerance=0 must lie between"),
        ({"tolerance": 0.1}, "search.tolerance=0.1 is for search.target_params, which is not set"),
        ({"max_params": -1}, "search.max_params=-1 must be above 0"),
    ],
)
def test_spaces_that_hold_nothing(keys, says):
    with pytest.raises(ValueError, match=says):
        candidates(LLAMA, SearchSpaceConfig(**keys))


def test_nearest_is_the_nearest():
    """Whichever side of the budget it is on."""
    space = SearchSpaceConfig(hidden_size=[32, 48], target_params=105_000, tolerance=0.001)
    near = llama_parameters(4, 48, 96, 8, 4)
    assert abs(near - 105_000) < abs(llama_parameters(4, 32, 96, 8, 4) - 105_000)
    with pytest.raises(ValueError, match=f"{near:,} parameters"):
        candidates(LLAMA, space)


def test_memory_counts_the_stored_precision():
    half = replace(LLAMA, dtype="bfloat16")
    whole, halved = (candidates(c, SearchSpaceConfig(num_layers=[2]))[0] for c in (LLAMA, half))
    assert whole.memory_gib == 2 * halved.memory_gib


def test_pareto_front_is_what_nobody_beats():
    generator = random.Random(0)
    for count in (1, 2, 30):
        points = [(generator.randrange(8), generator.randrange(8)) for _ in range(count)]
        wanted = {
            i
            for i, p in enumerate(points)
            if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)
        }
        assert set(pareto_front(points)) == wanted


def record(name: str, loss: float, distilled: float | None, latency: float = 1.0) -> dict:
    return {"name": name, "loss": loss, "distilled_loss": distilled, "latency_ms": latency}


def test_ranks():
    """A short distillation outranks the loss before it; too slow ones have no rank."""
    records = [record("a", 5, None), record("b", 3, 2.5), record("c", 4, 2.0), record("d", 1, 1, 9)]
    found = ranked(records, 2.0)
    assert [(r["name"], r["rank"]) for r in found] == [("c", 1), ("b", 2), ("a", 3), ("d", None)]
    with pytest.raises(ValueError, match=r"no candidate runs within search.max_latency_ms=0.5"):
        ranked(records, 0.5)


@pytest.mark.parametrize("limit", [2.0, 0.5])
def test_candidates_that_are_too_slow_are_not_distilled(monkeypatch, tmp_path, limit):
    """The best of the others are, and nothing is when all are too slow."""
    lists = {"ffn_hidden_size": [48, 64, 80], "max_latency_ms": limit}
    space = SearchSpaceConfig(**lists, distill=ShortDistillConfig(steps=2, top=1))
    cfg = SearchConfig(output_dir="out", checkpoint="in", search=space)
    speeds = {48: (1.0, 3.0), 64: (1.5, 2.0), 80: (3.0, 1.0)}

    def scored(cfg, config, plan, dataset):
        latency, loss = speeds[plan.target["ffn_hidden_size"]]
        return {"latency_ms": latency, "loss": loss}

    def distilled(cfg, config, record, plans, dataset, work):
        names.append(record["sizes"]["ffn_hidden_size"])
        return {"loss": 0.5}

    names: list[int] = []
    for name in ("stage_dataset", "check_shared", "barrier"):
        monkeypatch.setattr(scoring, name, lambda *args: None)
    monkeypatch.setattr(scoring, "make_plan", lambda config, pruning, scores: pruning)
    monkeypatch.setattr(scoring, "seen_by_all", lambda path: path.exists())
    monkeypatch.setattr(scoring, "_layout", lambda cfg: {})
    monkeypatch.setattr(scoring, "_zero_shot", scored)
    monkeypatch.setattr(scoring, "_short_distillation", distilled)
    if limit < 1:
        with pytest.raises(ValueError, match=r"no candidate runs within search.max_latency_ms"):
            scoring.score_candidates(cfg, LLAMA, tmp_path)
        assert names == []
    else:
        scoring.score_candidates(cfg, LLAMA, tmp_path)
        assert names == [64]


def test_latencies_of_another_micro_batch_are_measured_again(monkeypatch):
    """What an earlier version did not note is trusted."""
    monkeypatch.setattr(scoring.dist, "get_world_size", lambda: 1)
    cfg = SearchConfig(output_dir="out", checkpoint="in")
    cfg.search = SearchSpaceConfig(ffn_hidden_size=[48], max_latency_ms=1)
    then = scoring._layout(cfg)
    assert not scoring._at_another_layout(cfg, {"layout": then})
    cfg.data = replace(cfg.data, micro_batch_size=2)
    assert scoring._at_another_layout(cfg, {"layout": then})
    del then["micro_batch_size"]
    assert not scoring._at_another_layout(cfg, {"layout": then})
    assert not scoring._at_another_layout(cfg, {})
