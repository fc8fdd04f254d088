"""Rounds of pruning: their sizes, and that several plans in a row are one plan."""

from dataclasses import replace

import pytest
import torch

from nemo_minitron.checkpoint.lazy import from_tensor
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import PruningConfig, TargetConfig
from nemo_minitron.families.llama import LLAMA as FAMILY
from nemo_minitron.pruning.plan import Plan, full_plan, make_plan, pruned_config
from nemo_minitron.pruning.rounds import compose, pruning_rounds
from nemo_minitron.pruning.scores import Scores, model_meta
from nemo_minitron.pruning.slicing import prune_store
from tests.helpers.tiny import LLAMA, NEMOTRON_H, random_weights

SMOL = replace(
    LLAMA,
    num_layers=30,
    hidden_size=576,
    ffn_hidden_size=1536,
    num_attention_heads=9,
    num_query_groups=3,
)
WIDE = replace(LLAMA, num_attention_heads=16, num_query_groups=4)  # four query heads per group


def sizes(config: ModelConfig, rounds: int, parallel: ParallelConfig | None = None, **target):
    pruning = PruningConfig(target=TargetConfig(**target), iterations=rounds)
    found = []
    for one in pruning_rounds(config, pruning, parallel or ParallelConfig()):
        assert one.iterations == 1
        found.append(tuple(one.target[name] for name in target))
    return found


def test_sizes_go_down_in_equal_steps() -> None:
    assert sizes(SMOL, 4, hidden_size=448) == [(544,), (512,), (480,), (448,)]
    assert sizes(SMOL, 3, ffn_hidden_size=1024, num_layers=24) == [
        (1365, 28),
        (1195, 26),
        (1024, 24),
    ]
    assert sizes(SMOL, 1, hidden_size=448) == [(448,)]


def test_heads_and_groups_stay_whole() -> None:
    assert sizes(SMOL, 2, num_attention_heads=2, num_query_groups=2) == [(6, 3), (2, 2)]
    assert sizes(WIDE, 2, num_attention_heads=8) == [(12,), (8,)]


def test_sizes_between_fit_the_layout() -> None:
    layout = ParallelConfig(tensor_model_parallel_size=3, pipeline_model_parallel_size=2)
    assert sizes(SMOL, 3, layout, ffn_hidden_size=1023, num_layers=23) == [
        (1365, 28),
        (1194, 26),
        (1023, 23),
    ]


def test_rounds_that_change_nothing_are_left_out() -> None:
    assert sizes(LLAMA, 4, num_layers=3) == [(3,)]


def test_sizes_of_a_hybrid_go_down_too() -> None:
    """As many Mamba heads stay of every group, in every round."""
    assert sizes(NEMOTRON_H, 2, hidden_size=32) == [(48,), (32,)]
    assert sizes(NEMOTRON_H, 2, mamba_num_heads=2) == [(6,), (2,)]
    many = replace(NEMOTRON_H, mamba_num_heads=20, mamba_num_groups=4)
    assert sizes(many, 3, mamba_num_heads=4, hidden_size=32) == [(16, 53), (8, 43), (4, 32)]


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_hybrid_without_attention(rounds: int) -> None:
    """It has no heads to keep a multiple of anything."""
    pattern = "M-" * (NEMOTRON_H.num_layers // 2)
    config = replace(NEMOTRON_H, hybrid_layer_pattern=pattern, num_layers=len(pattern))
    assert sizes(config, rounds, hidden_size=32)[-1] == (32,)
    assert compose(full_plan(config), full_plan(config)) == full_plan(config)
    with pytest.raises(ValueError, match="it has no attention"):
        sizes(config, rounds, num_attention_heads=2)


@pytest.mark.parametrize(
    ("heads", "says"),
    [(7, "use 6 or 8"), (5, "use 4 or 6"), (1, "use 2$")],
)
@pytest.mark.parametrize("rounds", [1, 3])
def test_mamba_heads_that_the_groups_do_not_share(heads: int, says: str, rounds: int) -> None:
    wanted = rf"mamba_num_heads={heads} must be a multiple of mamba_num_groups=2; {says}"
    with pytest.raises(ValueError, match=wanted):
        sizes(NEMOTRON_H, rounds, mamba_num_heads=heads)


@pytest.mark.parametrize("config", [LLAMA, NEMOTRON_H], ids=lambda config: config.family)
def test_one_round_where_the_target_is_what_the_model_has(config: ModelConfig) -> None:
    target = TargetConfig(hidden_size=64, num_layers=config.num_layers)
    pruning = PruningConfig(target=target, iterations=3)
    assert pruning_rounds(config, pruning, ParallelConfig()) == [pruning]


def test_drop_layers_goes_last() -> None:
    pruning = PruningConfig(target=TargetConfig(hidden_size=32), drop_layers=[2], iterations=2)
    first, second = pruning_rounds(LLAMA, pruning, ParallelConfig())
    assert (first.target["hidden_size"], first.drop_layers) == (48, None)
    assert (second.target["hidden_size"], second.drop_layers) == (32, [2])


def test_each_round_names_its_own_block() -> None:
    pruning = PruningConfig(
        target=TargetConfig(num_layers=20), layer_criterion="block_angular", iterations=2
    )
    rounds = pruning_rounds(SMOL, pruning, ParallelConfig())
    assert [(r.target["num_layers"], r.layer_criterion) for r in rounds] == [
        (25, "block_angular"),
        (20, "block_angular"),
    ]


def random_scores(config: ModelConfig, seed: int) -> Scores:
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    return Scores(
        hidden=rand(config.hidden_size),
        ffn=rand(config.num_layers, config.ffn_hidden_size),
        head=rand(config.num_layers, config.num_attention_heads),
        layer=rand(config.num_layers),
        meta={"model": model_meta(config)},
    )


def apply(config: ModelConfig, plan: Plan, weights: dict) -> dict[str, torch.Tensor]:
    store = {name: from_tensor(tensor) for name, tensor in weights.items()}
    return {n: lazy.read() for n, lazy in prune_store(FAMILY, config, plan, store).items()}


@pytest.mark.parametrize("merge", [False, True])
def test_composed_plan_equals_its_rounds(merge: bool) -> None:
    pruning = PruningConfig(
        target=TargetConfig(
            num_layers=2,
            hidden_size=33,
            ffn_hidden_size=50,
            num_attention_heads=3,
            num_query_groups=3,
        ),
        iterations=3,
        merge_heads=merge,
    )
    weights, plan, small = random_weights(WIDE), full_plan(WIDE), WIDE
    stepwise = weights
    for number, one in enumerate(pruning_rounds(WIDE, pruning, ParallelConfig())):
        step = make_plan(small, one, random_scores(small, number))
        stepwise, small = apply(small, step, stepwise), pruned_config(small, step)
        plan = compose(plan, step)
    assert pruned_config(WIDE, plan) == small
    assert bool(plan.merge) == merge
    found = apply(WIDE, plan, weights)
    assert found.keys() == stepwise.keys()
    for name, tensor in stepwise.items():
        if merge and "linear_qkv" in name:  # rounded once, not once per round
            torch.testing.assert_close(found[name], tensor)
        else:
            assert torch.equal(found[name], tensor), name


def test_merging_more_than_half_in_rounds() -> None:
    pruning = PruningConfig(
        target=TargetConfig(num_attention_heads=4), merge_heads=True, iterations=3
    )
    rounds = pruning_rounds(WIDE, pruning, ParallelConfig())
    assert [(r.target["num_attention_heads"], r.merge_heads) for r in rounds] == [
        (12, True),
        (8, True),
        (4, True),
    ]
    # Groups of one head that began larger are not merged with one another.
    target = TargetConfig(num_attention_heads=2, num_query_groups=2)
    pruning = PruningConfig(target=target, merge_heads=True, iterations=4)
    rounds = pruning_rounds(LLAMA, pruning, ParallelConfig())
    assert [
        (r.target["num_attention_heads"], r.target["num_query_groups"], r.merge_heads)
        for r in rounds
    ] == [(6, 3, False), (3, 3, True), (2, 2, False)]
