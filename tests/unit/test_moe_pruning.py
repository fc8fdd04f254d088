"""Experts in plans: what is chosen, what is refused, and the weights against slices by hand."""

from dataclasses import replace

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from nemo_minitron.checkpoint.hf import to_hf, to_megatron
from nemo_minitron.checkpoint.lazy import from_tensor
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import PruningConfig, TargetConfig
from nemo_minitron.families.mixtral import MIXTRAL as FAMILY
from nemo_minitron.importance.scores import Scores, check_axes, model_meta
from nemo_minitron.pruning.plan import Plan, full_plan, make_plan, pruned_config
from nemo_minitron.pruning.rounds import compose, pruning_rounds
from nemo_minitron.pruning.slicing import dim_indices, prune_store
from nemo_minitron.pruning.targets import check_pruning
from tests.tiny import LLAMA, MIXTRAL, random_weights

TARGET = {
    "num_layers": 3,
    "hidden_size": 40,
    "num_attention_heads": 4,
    "num_moe_experts": 3,
    "moe_ffn_hidden_size": 24,
}


def random_scores(config, seed: int = 0) -> Scores:
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    layers, experts = config.num_layers, config.num_moe_experts
    return Scores(
        hidden=rand(config.hidden_size),
        head=rand(layers, config.num_attention_heads),
        expert=rand(layers, experts),
        expert_ffn=rand(layers, experts, config.moe_ffn_hidden_size),
        layer=rand(layers),
        meta={"model": model_meta(config)},
    )


def targets(**sizes: int) -> PruningConfig:
    return PruningConfig(target=TargetConfig(**sizes))


def test_experts_first_then_channels_inside_those_that_stay(tmp_path):
    scores = random_scores(MIXTRAL)
    plan = make_plan(MIXTRAL, targets(**TARGET), scores)
    for position, layer in enumerate(plan.layers):
        ranked = sorted(range(4), key=lambda e: -scores.expert[layer, e])
        assert plan.expert[position] == sorted(ranked[:3])
        for expert, channels in zip(plan.expert[position], plan.expert_ffn[position], strict=True):
            best = sorted(range(40), key=lambda f: -scores.expert_ffn[layer, expert, f])[:24]
            assert channels == sorted(best)
    small = pruned_config(MIXTRAL, plan)
    assert {name: getattr(small, name) for name in TARGET} == TARGET
    plan.save(tmp_path)
    assert Plan.load(tmp_path) == plan


def test_equals_an_independent_slice():
    plan = make_plan(MIXTRAL, targets(**TARGET), random_scores(MIXTRAL))
    store = {name: from_tensor(t) for name, t in random_weights(MIXTRAL).items()}
    small = pruned_config(MIXTRAL, plan)
    before = {name: t.read() for name, t in to_hf(FAMILY, MIXTRAL, store).items()}
    pruned = to_hf(FAMILY, small, prune_store(FAMILY, MIXTRAL, plan, store))
    after = {name: t.read() for name, t in pruned.items()}
    h = plan.hidden
    for new, old in enumerate(plan.layers):
        a = f"model.layers.{old}.block_sparse_moe."
        b = f"model.layers.{new}.block_sparse_moe."
        gate = before[a + "gate.weight"][plan.expert[new]][:, h]
        assert torch.equal(after[b + "gate.weight"], gate)
        for e, expert in enumerate(plan.expert[new]):
            f = plan.expert_ffn[new][e]
            for name in ("w1", "w3"):
                whole = before[f"{a}experts.{expert}.{name}.weight"]
                assert torch.equal(after[f"{b}experts.{e}.{name}.weight"], whole[f][:, h])
            whole = before[f"{a}experts.{expert}.w2.weight"]
            assert torch.equal(after[f"{b}experts.{e}.w2.weight"], whole[h][:, f])
        norm = "input_layernorm.weight"
        assert torch.equal(
            after[f"model.layers.{new}.{norm}"], before[f"model.layers.{old}.{norm}"][h]
        )
    back = to_megatron(FAMILY, small, {name: from_tensor(t) for name, t in after.items()})
    assert back.keys() == {name for name, _, _ in FAMILY.parameters(small)}
    config = MixtralConfig(**FAMILY.to_hf(small))
    shapes = {n: tuple(p.shape) for n, p in MixtralForCausalLM(config).named_parameters()}
    assert shapes["model.layers.0.mlp.experts.gate_up_proj"] == (3, 48, 40)


def test_a_plan_that_keeps_everything_is_the_identity():
    store = {name: from_tensor(t) for name, t in random_weights(MIXTRAL).items()}
    kept = prune_store(FAMILY, MIXTRAL, full_plan(MIXTRAL), store)
    assert kept.keys() == store.keys()
    assert all(kept[name] is store[name] for name in store)
    assert pruned_config(MIXTRAL, full_plan(MIXTRAL)) == MIXTRAL


def test_rounds_are_one_plan():
    pruning = replace(targets(**TARGET), iterations=2)
    one, two = pruning_rounds(MIXTRAL, pruning, ParallelConfig())
    first = make_plan(MIXTRAL, one, random_scores(MIXTRAL, 1))
    middle = pruned_config(MIXTRAL, first)
    second = make_plan(middle, two, random_scores(middle, 2))
    store = {name: from_tensor(t) for name, t in random_weights(MIXTRAL).items()}
    stepwise = prune_store(FAMILY, middle, second, prune_store(FAMILY, MIXTRAL, first, store))
    at_once = prune_store(FAMILY, MIXTRAL, compose(first, second), store)
    assert stepwise.keys() == at_once.keys()
    assert all(torch.equal(stepwise[name].read(), at_once[name].read()) for name in at_once)


@pytest.mark.parametrize(
    ("config", "sizes", "words"),
    [
        (MIXTRAL, {"num_moe_experts": 1}, "num_moe_experts=1 is fewer than moe_router_topk=2"),
        (MIXTRAL, {"num_moe_experts": 5}, "num_moe_experts=5 must be between 1 and 4"),
        (MIXTRAL, {"ffn_hidden_size": 8}, "pruning.target.moe_ffn_hidden_size is their width"),
        (LLAMA, {"num_moe_experts": 2}, "num_moe_experts=2 is a size .* it has no experts"),
        (LLAMA, {"moe_ffn_hidden_size": 2}, "it has no experts"),
    ],
)
def test_targets_refused(config, sizes, words):
    with pytest.raises(ValueError, match=words):
        check_pruning(config, targets(**sizes))


def test_axes_that_a_model_lacks():
    check_axes(LLAMA, ["expert", "ffn"])
    with pytest.raises(ValueError, match=r"which has no experts; set scores\.axes to some of"):
        check_axes(LLAMA, ["expert", "expert_ffn"])
    with pytest.raises(ValueError, match="which has experts in every layer"):
        check_axes(MIXTRAL, ["ffn"])


def test_channels_need_an_expert():
    with pytest.raises(ValueError, match="'expert_ffn' dim needs an expert"):
        dim_indices("expert_ffn", MIXTRAL, full_plan(MIXTRAL), 0)
