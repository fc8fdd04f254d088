"""Pipeline stages after layers were dropped."""

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest

from nemo_minitron.config.balance import balanced_layout, balanced_pipeline, by_cost, layer_cost
from nemo_minitron.config.layout import check_pipeline, layers_of_stages
from nemo_minitron.config.parallel import ParallelConfig
from tests.helpers.tiny import LLAMA, NEMOTRON_H, QWEN2_MOE


def layout(pp: int = 1, vpp: int | None = None, tp: int = 1, **more: Any) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        **more,
    )


def stage_sizes(num_layers: int, parallel: ParallelConfig) -> list[int]:
    """Megatron's rule: first and last as told, the rest evenly."""
    pp = parallel.pipeline_model_parallel_size
    told = {
        0: parallel.num_layers_in_first_pipeline_stage,
        pp - 1: parallel.num_layers_in_last_pipeline_stage,
    }
    fixed = {stage: size for stage, size in told.items() if size is not None}
    rest = num_layers - sum(fixed.values())
    return [fixed.get(stage, rest // max(pp - len(fixed), 1)) for stage in range(pp)]


@pytest.mark.parametrize("pp", range(2, 9))
@pytest.mark.parametrize("num_layers", range(1, 26))
def test_every_split_that_megatron_can_express_is_found(num_layers: int, pp: int) -> None:
    short, longer = divmod(num_layers, pp)
    wanted = [short] * (pp - longer) + [short + 1] * longer
    ends = itertools.product((None, *({short, short + 1} - {0})), repeat=2)
    tried = [
        replace(
            layout(pp),
            num_layers_in_first_pipeline_stage=first,
            num_layers_in_last_pipeline_stage=last,
        )
        for first, last in ends
    ]
    if short == 0 or all(sorted(stage_sizes(num_layers, p)) != wanted for p in tried):
        with pytest.raises(ValueError, match=r"keep .*\d layers .*minitron prune"):
            balanced_pipeline(num_layers, layout(pp))
        return
    found = balanced_pipeline(num_layers, layout(pp))
    check_pipeline(replace(LLAMA, num_layers=num_layers), found)
    assert sorted(stage_sizes(num_layers, found)) == wanted


@pytest.mark.parametrize(("num_layers", "fits"), [(8, True), (4, True), (6, False), (5, False)])
def test_interleaved_stages_are_equal(num_layers: int, fits: bool) -> None:
    if fits:
        found = balanced_pipeline(num_layers, layout(2, vpp=2))
        assert found.num_layers_in_first_pipeline_stage is None
    else:
        with pytest.raises(ValueError, match=r"virtual_pipeline_model_parallel_size=2 .* 4 or 8"):
            balanced_pipeline(num_layers, layout(2, vpp=2))


def test_the_nearest_numbers_of_layers_are_named() -> None:
    with pytest.raises(ValueError, match=r"num_layers=9 after .*=6 .*keep 8 or 10 layers"):
        balanced_pipeline(9, layout(6))
    with pytest.raises(ValueError, match=r"num_layers=3 after .*=4 .*keep 4 layers"):
        balanced_pipeline(3, layout(4))


def test_an_uneven_split_stays_when_no_layer_is_dropped() -> None:
    parallel = layout(2, num_layers_in_first_pipeline_stage=1)
    assert balanced_layout(LLAMA, replace(LLAMA, hidden_size=40), parallel) == parallel
    found = balanced_layout(LLAMA, replace(LLAMA, num_layers=3), parallel)
    assert stage_sizes(3, found) == [2, 1]


@pytest.mark.parametrize(
    ("name", "size", "ways"), [("ffn_hidden_size", 50, "48 or 52"), ("num_query_groups", 2, "4")]
)
def test_sizes_that_do_not_split_are_refused(name: str, size: int, ways: str) -> None:
    sizes: dict[str, Any] = {name: size}
    small = replace(LLAMA, **sizes)
    with pytest.raises(ValueError, match=f"{name}={size} after .*pruning.target.{name} to {ways}"):
        balanced_layout(LLAMA, small, layout(tp=4))


def test_a_shared_expert_that_does_not_split_is_refused() -> None:
    small = replace(QWEN2_MOE, moe_shared_expert_intermediate_size=31)
    message = r"pruning\.target\.moe_shared_expert_intermediate_size to 30 or 32"
    with pytest.raises(ValueError, match=message):
        balanced_layout(QWEN2_MOE, small, layout(tp=2, sequence_parallel=True))


def test_interleaving_needs_a_pipeline() -> None:
    with pytest.raises(ValueError, match=r"=2 needs .*pipeline_model_parallel_size of at least 2"):
        layout(1, vpp=2)


# ---------------------------------------------------------------- hybrid models: by cost


@pytest.mark.parametrize("seed", range(20))
def test_the_costliest_stage_of_a_hybrid_model_costs_least(seed: int) -> None:
    """Against all ways to cut the layers into stages."""
    draw = random.Random(seed)
    pattern = "M*-E" + "".join(draw.choice("MMM--*E") for _ in range(draw.randrange(2, 8)))
    model = replace(NEMOTRON_H, num_layers=len(pattern), hybrid_layer_pattern=pattern)
    costs = [layer_cost(model, kind) for kind in pattern]
    for parallel in (layout(2), layout(3), layout(2, vpp=2)):
        found = by_cost(model, parallel)
        assert found is not None
        sizes = [
            size for chunk in zip(*layers_of_stages(model, found), strict=True) for size in chunk
        ]
        parts, inner = len(sizes), range(1, len(pattern))
        ways = itertools.combinations(inner, parts - 1)
        best = min(largest(costs, [0, *cuts, len(pattern)]) for cuts in ways)
        ends = [0, *itertools.accumulate(sizes)]
        assert largest(costs, ends) == best
        check_pipeline(model, found)


def largest(costs: list[int], ends: list[int]) -> int:
    return max(sum(costs[start:stop]) for start, stop in itertools.pairwise(ends))


def test_costs_are_multiplications() -> None:
    """Of matrix products by hand, for one token of the tiny hybrid."""
    hidden, inner, groups = 64, 8 * 8, 2 * 16
    assert layer_cost(NEMOTRON_H, "*") == hidden * (8 + 4 + 4) * 12 + 8 * 12 * hidden
    assert layer_cost(NEMOTRON_H, "-") == 2 * hidden * 96
    assert layer_cost(NEMOTRON_H, "E") == 2 * hidden * (2 * 24 + 32) + hidden * 4
    projections = hidden * (2 * inner + 2 * groups + 8) + inner * hidden
    assert layer_cost(NEMOTRON_H, "M") == projections + 3 * inner * 16


def test_fewer_layers_than_stages_are_refused_for_hybrids_too() -> None:
    small = replace(NEMOTRON_H, num_layers=3, hybrid_layer_pattern="M*E")
    with pytest.raises(ValueError, match=r"num_layers=3 after pruning cannot be spread"):
        balanced_layout(NEMOTRON_H, small, layout(4))
