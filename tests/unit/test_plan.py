"""Which indices a plan keeps, and what it refuses."""

from dataclasses import replace

import pytest
import torch

from nemo_minitron.config.stages import PruningConfig, ScoreConfig, TargetConfig
from nemo_minitron.pruning.plan import Plan, full_plan, make_plan, pruned_config
from nemo_minitron.pruning.scores import Scores, layer_scores, model_meta
from nemo_minitron.pruning.targets import check_pruning
from tests.helpers.tiny import LLAMA

L, H, F, N, G = 4, 64, 96, 8, 4  # LLAMA: two query heads per group


def random_scores(seed: int = 0) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    return Scores(
        hidden=torch.rand(H, generator=generator),
        ffn=torch.rand(L, F, generator=generator),
        head=torch.rand(L, N, generator=generator),
        layer=torch.rand(L, generator=generator),
        meta={"model": model_meta(LLAMA)},
    )


def prune(drop_layers: list[int] | None = None, **target: int) -> PruningConfig:
    return PruningConfig(target=TargetConfig(**target), drop_layers=drop_layers)


def test_top_scores_win_and_are_stored_ascending() -> None:
    scores = random_scores()
    plan = make_plan(LLAMA, prune(hidden_size=10, ffn_hidden_size=20), scores)
    assert plan["hidden"] == sorted(scores["hidden"].topk(10).indices.tolist())
    for layer in range(L):
        assert plan["ffn"][layer] == sorted(scores["ffn"][layer].topk(20).indices.tolist())
    assert plan["head"] == full_plan(LLAMA)["head"]
    assert plan.layers == list(range(L))


def test_ties_go_to_the_lower_index() -> None:
    scores = random_scores()
    scores["hidden"] = torch.ones(H)
    scores["hidden"][50] = 2.0
    plan = make_plan(LLAMA, prune(hidden_size=4), scores)
    assert plan["hidden"] == [0, 1, 2, 50]


def test_heads_stay_inside_their_groups() -> None:
    scores = random_scores()
    scores["head"] = torch.tensor([[1.0, 2, 9, 8, 0, 1, 5, 4]]).repeat(L, 1)
    plan = make_plan(LLAMA, prune(num_attention_heads=4), scores)
    assert plan["head"] == [[1, 2, 5, 6]] * L
    assert plan["query_group"] == [[0, 1, 2, 3]] * L


def test_groups_are_ranked_by_the_sum_of_their_heads() -> None:
    scores = random_scores()
    # Group sums 10, 9, 8, 11: the best single head (9) is in a group that goes.
    scores["head"] = torch.tensor([[5.0, 5, 9, 0, 4, 4, 6, 5]]).repeat(L, 1)
    plan = make_plan(LLAMA, prune(num_query_groups=2, num_attention_heads=4), scores)
    assert plan["query_group"] == [[0, 3]] * L
    assert plan["head"] == [[0, 1, 6, 7]] * L
    plan = make_plan(LLAMA, prune(num_query_groups=2, num_attention_heads=2), scores)
    assert plan["head"] == [[0, 6]] * L


def test_layers_by_score_take_their_own_rows_of_the_other_scores() -> None:
    scores = random_scores()
    scores["layer"] = torch.tensor([0.1, 0.4, 0.2, 0.3])
    plan = make_plan(LLAMA, prune(num_layers=2, ffn_hidden_size=5), scores)
    assert plan.layers == [1, 3]
    assert plan["ffn"] == [sorted(scores["ffn"][i].topk(5).indices.tolist()) for i in (1, 3)]
    assert len(plan["head"]) == len(plan["query_group"]) == 2


def depth(criterion: str, layers: int) -> PruningConfig:
    return PruningConfig(target=TargetConfig(num_layers=layers), layer_criterion=criterion)


def test_layers_by_lm_loss() -> None:
    scores = random_scores()
    scores["layer_lm_loss"] = torch.tensor([3.0, 3.2, 3.1, 3.3])
    assert make_plan(LLAMA, depth("lm_loss", 2), scores).layers == [1, 3]


@pytest.mark.parametrize("criterion", ["block_angular", "block_lm_loss"])
def test_the_lowest_block_goes(criterion: str) -> None:
    scores = random_scores()
    scores |= {
        f"{criterion}.1": torch.tensor([0.2, 0.3, 0.1, 0.4]),
        f"{criterion}.2": torch.tensor([0.3, 0.2, 0.4]),
        f"{criterion}.3": torch.tensor([0.1, 0.2]),
    }
    kept = [make_plan(LLAMA, depth(criterion, n), scores).layers for n in (3, 2, 1)]
    assert kept == [[0, 1, 3], [0, 3], [3]]


def test_of_equal_blocks_the_last_one_goes() -> None:
    scores = random_scores()
    scores |= {"block_angular.2": torch.tensor([0.1, 0.5, 0.1])}
    assert make_plan(LLAMA, depth("block_angular", 2), scores).layers == [0, 1]


def test_first_and_last_layers_may_go() -> None:
    scores = random_scores()
    scores["layer"] = torch.tensor([0.1, 0.4, 0.3, 0.2])
    assert make_plan(LLAMA, prune(num_layers=2), scores).layers == [1, 2]


def test_blocks_with_width() -> None:
    scores = random_scores()
    scores |= {"block_lm_loss.2": torch.tensor([4.0, 3.0, 5.0])}
    pruning = PruningConfig(
        target=TargetConfig(num_layers=2, ffn_hidden_size=5), layer_criterion="block_lm_loss"
    )
    plan = make_plan(LLAMA, pruning, scores)
    assert plan.layers == [0, 3]
    assert plan["ffn"] == [sorted(scores["ffn"][i].topk(5).indices.tolist()) for i in (0, 3)]


def test_drop_layers_is_one_indexed_and_needs_no_scores() -> None:
    plan = make_plan(LLAMA, prune(drop_layers=[1, 3]), None)
    assert plan.layers == [1, 3]
    config = pruned_config(LLAMA, plan)
    assert (config.num_layers, config.kept_layers) == (2, [1, 3])


def test_drop_layers_with_width() -> None:
    plan = make_plan(LLAMA, prune(drop_layers=[2], hidden_size=7), random_scores())
    assert plan.layers == [0, 2, 3]
    assert len(plan["hidden"]) == 7


def test_kept_layers_compose() -> None:
    once = pruned_config(LLAMA, make_plan(LLAMA, prune(drop_layers=[1]), None))
    assert once.kept_layers == [1, 2, 3]
    twice = pruned_config(once, make_plan(once, prune(drop_layers=[2]), None))
    assert twice.kept_layers == [1, 3]
    width_only = full_plan(twice).replaced(hidden=[0, 1])
    assert pruned_config(twice, width_only).kept_layers == [1, 3]


def test_explicit_current_sizes_are_the_identity_and_need_no_scores() -> None:
    plan = make_plan(LLAMA, prune(hidden_size=H, num_layers=L, num_attention_heads=N), None)
    assert plan == full_plan(LLAMA)
    assert pruned_config(LLAMA, plan) == LLAMA


def test_json_round_trip(tmp_path) -> None:
    plan = make_plan(
        LLAMA, prune(hidden_size=9, num_attention_heads=4, drop_layers=[4]), random_scores()
    )
    plan.save(tmp_path)
    assert Plan.load(tmp_path) == plan
    (tmp_path / "plan.json").write_text('{"format": 1, "layers": []}')
    with pytest.raises(ValueError, match="must hold"):
        Plan.load(tmp_path)


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        (prune(), r"nothing to prune: set pruning\.target"),
        (prune(hidden_size=65), r"pruning\.target\.hidden_size=65 must be between 1 and 64"),
        (prune(num_layers=5), r"pruning\.target\.num_layers=5 must be between 1 and 4"),
        (prune(ffn_hidden_size=0), r"pruning\.target\.ffn_hidden_size=0 must be between"),
        (prune(num_attention_heads=5), r"multiple of num_query_groups=4; .*heads=4 or 8"),
        (prune(num_attention_heads=3), r"multiple of num_query_groups=4; .*heads=4"),
        (prune(num_query_groups=3), r"multiple of num_query_groups=3; .*heads=6"),
        (prune(num_query_groups=2), r"hold only 4 query heads \(2 each\).*heads=4"),
        (prune(drop_layers=[0]), r"holds \[0\], out of range: layers are counted from 1"),
        (prune(drop_layers=[5, 1]), r"holds \[5\], out of range"),
        (prune(drop_layers=[2, 2]), r"holds \[2\] more than once"),
        (prune(drop_layers=[1, 2, 3, 4]), r"drops all 4 layers"),
        (prune(drop_layers=[1], num_layers=2), r"both choose layers; set only one"),
        (PruningConfig(target=TargetConfig(hidden_size=8), layer_criterion="lm_loss"), "no layer"),
    ],
)
def test_bad_targets_are_refused(pruning: PruningConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_pruning(LLAMA, pruning)


def test_missing_importance_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hidden_size=8 needs importance scores .* set importanc"):
        make_plan(LLAMA, prune(hidden_size=8), None)
    scores = random_scores()
    del scores["hidden"]
    with pytest.raises(ValueError, match=r"target\.hidden_size=8 needs 'hidden' scores"):
        make_plan(LLAMA, prune(hidden_size=8), scores)


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (
            "block_lm_loss",
            r"target\.num_layers=2 with .*'block_lm_loss\.2'.*block_sizes including 2",
        ),
        (
            "block_angular",
            r"'block_angular\.2'.*\['hidden', 'ffn', 'head', 'layer', 'block_angular.1",
        ),
        ("lm_loss", r"needs 'layer_lm_loss' scores.*scores\.layer_criteria including lm_loss"),
    ],
)
def test_layers_that_were_not_scored_that_way_are_refused(criterion: str, message: str) -> None:
    scores = random_scores()
    scores |= {"block_angular.1": torch.rand(L)}
    with pytest.raises(ValueError, match=message):
        make_plan(LLAMA, depth(criterion, 2), scores)


@pytest.mark.parametrize("values", [{"layer_criterion": "ppl"}, {"iterations": 0}])
def test_bad_pruning_keys_are_refused(values: dict) -> None:
    with pytest.raises(ValueError, match=r"pruning\.(layer_criterion=ppl must be|iterations=0)"):
        PruningConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer_criteria": ["ppl"]}, r"layer_criteria=\['ppl'\] must be a non-empty list"),
        ({"layer_criteria": []}, "non-empty"),
        ({"layer_criteria": ["block_angular"]}, r"set scores\.block_sizes=\[n\]"),
        ({"block_sizes": [2]}, r"block_sizes=\[2\] is for block_angular and block_lm_loss"),
        ({"layer_criteria": ["block_lm_loss"], "block_sizes": [0]}, "at least 1 each"),
        ({"axes": ["ffn"], "layer_criteria": ["lm_loss"]}, r"add layer to scores\.axes"),
        ({"lm_loss_samples": 0}, "lm_loss_samples=0 must be at least 1"),
    ],
)
def test_bad_score_keys_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScoreConfig(**values)


def test_scores_of_another_model_are_refused() -> None:
    scores = random_scores()
    scores.meta = {"model": model_meta(replace(LLAMA, num_layers=3, hidden_size=32))}
    with pytest.raises(ValueError, match=r"num_layers=3 \(checkpoint: 4\), hidden_size=32"):
        make_plan(LLAMA, prune(hidden_size=8), scores)


HYBRID = replace(
    LLAMA,
    num_layers=6,
    hybrid_layer_pattern="M-M*M-",
    mamba_num_heads=2,
    mamba_head_dim=2,
    mamba_num_groups=2,
    mamba_state_dim=2,
)


@pytest.mark.parametrize(
    ("criterion", "scores", "layers", "kept"),
    [
        ("lm_loss", [9.0, 5, 8, 1, 7, 6], 4, [0, 2, 3, 5]),  # the only attention has the lowest
        ("lm_loss", [9.0, 5, 8, 1, 7, 6], 3, [0, 3, 5]),
        ("block_lm_loss", [4.0, 2, 1, 3, 5], 4, [0, 3, 4, 5]),  # the best block holds the attention
    ],
)
def test_the_best_layer_of_every_kind_stays(
    criterion: str, scores: list[float], layers: int, kept: list[int]
) -> None:
    name = layer_scores(criterion, 6 - layers)
    given = Scores({name: torch.tensor(scores)}, meta={"model": model_meta(HYBRID)})
    assert make_plan(HYBRID, depth(criterion, layers), given).layers == kept


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        (prune(num_layers=2), "3 kinds .* keep at least 3 layers"),
        (prune([4]), "all layers of kind '\\*' .* leave it out of pruning.drop_layers"),
    ],
)
def test_a_kind_that_would_be_gone_is_refused(pruning: PruningConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_pruning(HYBRID, pruning)
