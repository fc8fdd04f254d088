"""Pipeline stages after layers were dropped."""

import itertools
from dataclasses import replace
from typing import Any

import pytest

from nemo_minitron.config.balance import balanced_layout, balanced_pipeline
from nemo_minitron.config.layout import check_pipeline
from nemo_minitron.config.parallel import ParallelConfig
from tests.helpers.tiny import LLAMA, QWEN2_MOE


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
    ends = itertools.product((None, short, short + 1), repeat=2)
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
