"""Experts in plans: what is chosen, what is refused, and the weights against slices by hand."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from nemo_minitron.checkpoint.hf import to_hf, to_megatron
from nemo_minitron.checkpoint.lazy import from_tensor
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import PruningConfig, TargetConfig
from nemo_minitron.families.mixtral import MIXTRAL as FAMILY
from nemo_minitron.families.qwen2_moe import QWEN2_MOE as SHARED_FAMILY
from nemo_minitron.families.registry import family_of
from nemo_minitron.families.table import active_parameters
from nemo_minitron.pruning.plan import Plan, full_plan, make_plan, pruned_config
from nemo_minitron.pruning.plan_check import check_plan
from nemo_minitron.pruning.rounds import compose, pruning_rounds
from nemo_minitron.pruning.scores import Scores, check_axes, model_meta
from nemo_minitron.pruning.slicing import dim_indices, prune_store
from nemo_minitron.pruning.targets import check_pruning
from tests.helpers.tiny import (
    GLM4_MOE,
    GPT2,
    LLAMA,
    MIXTRAL,
    NEMOTRON_H,
    QWEN2_MOE,
    random_weights,
)

TARGET = {
    "num_layers": 3,
    "hidden_size": 40,
    "num_attention_heads": 4,
    "num_moe_experts": 3,
    "moe_ffn_hidden_size": 24,
}
SHARED_TARGET = {**TARGET, "moe_shared_expert_intermediate_size": 30}


def random_scores(config, seed: int = 0) -> Scores:
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    layers, experts = config.num_layers, config.num_moe_experts
    shared = config.moe_shared_expert_intermediate_size
    named = {} if shared is None else {"shared_expert_ffn": rand(layers, shared)}
    return Scores(
        named,
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
        ranked = sorted(range(4), key=lambda e: -scores["expert"][layer, e])
        assert plan["expert"][position] == sorted(ranked[:3])
        rows = plan["expert"][position], plan["expert_ffn"][position]
        for expert, channels in zip(*rows, strict=True):
            best = sorted(range(40), key=lambda f: -scores["expert_ffn"][layer, expert, f])[:24]
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
    h = plan["hidden"]
    for new, old in enumerate(plan.layers):
        a = f"model.layers.{old}.block_sparse_moe."
        b = f"model.layers.{new}.block_sparse_moe."
        gate = before[a + "gate.weight"][plan["expert"][new]][:, h]
        assert torch.equal(after[b + "gate.weight"], gate)
        for e, expert in enumerate(plan["expert"][new]):
            f = plan["expert_ffn"][new][e]
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


def test_shared_expert_equals_an_independent_slice(tmp_path):
    scores = random_scores(QWEN2_MOE)
    plan = make_plan(QWEN2_MOE, targets(**SHARED_TARGET), scores)
    small = pruned_config(QWEN2_MOE, plan)
    assert {name: getattr(small, name) for name in SHARED_TARGET} == SHARED_TARGET
    plan.save(tmp_path)
    assert Plan.load(tmp_path) == plan
    store = {name: from_tensor(t) for name, t in random_weights(QWEN2_MOE).items()}
    before = {name: t.read() for name, t in to_hf(SHARED_FAMILY, QWEN2_MOE, store).items()}
    pruned = to_hf(SHARED_FAMILY, small, prune_store(SHARED_FAMILY, QWEN2_MOE, plan, store))
    after = {name: t.read() for name, t in pruned.items()}
    h, d = plan["hidden"], QWEN2_MOE.kv_channels
    for new, old in enumerate(plan.layers):
        best = sorted(range(56), key=lambda f: -scores["shared_expert_ffn"][old, f])[:30]
        f = plan["shared_expert_ffn"][new]
        assert f == sorted(best)
        a, b = f"model.layers.{old}.", f"model.layers.{new}."
        for name in ("gate", "up"):
            name = f"mlp.shared_expert.{name}_proj.weight"
            assert torch.equal(after[b + name], before[a + name][f][:, h])
        name = "mlp.shared_expert.down_proj.weight"
        assert torch.equal(after[b + name], before[a + name][h][:, f])
        name = "mlp.shared_expert_gate.weight"
        assert torch.equal(after[b + name], before[a + name][:, h])
        rows = [head * d + i for head in plan["head"][new] for i in range(d)]
        name = "self_attn.q_proj.bias"
        assert torch.equal(after[b + name], before[a + name][rows])
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**SHARED_FAMILY.to_hf(small)))
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    fused = {name: shape for name, shape in shapes.items() if ".experts." in name}
    assert fused["model.layers.0.mlp.experts.gate_up_proj"] == (3, 48, 40)
    found = {name: tuple(t.shape) for name, t in after.items() if ".experts." not in name}
    assert found == {name: shape for name, shape in shapes.items() if name not in fused}


def test_only_the_shared_expert():
    """Its scores are all that is needed, and all that changes."""
    sizes: dict[str, Any] = {"moe_shared_expert_intermediate_size": 8}
    scores = random_scores(QWEN2_MOE)
    only = Scores(shared_expert_ffn=scores["shared_expert_ffn"], meta=scores.meta)
    plan = make_plan(QWEN2_MOE, targets(**sizes), only)
    assert pruned_config(QWEN2_MOE, plan) == replace(QWEN2_MOE, **sizes)
    del scores["shared_expert_ffn"]
    with pytest.raises(ValueError, match="needs 'shared_expert_ffn' scores"):
        make_plan(QWEN2_MOE, targets(**sizes), scores)


@pytest.mark.parametrize("config", [MIXTRAL, QWEN2_MOE], ids=lambda c: c.family)
def test_a_plan_that_keeps_everything_is_the_identity(config):
    store = {name: from_tensor(t) for name, t in random_weights(config).items()}
    kept = prune_store(family_of(config), config, full_plan(config), store)
    assert kept.keys() == store.keys()
    assert all(kept[name] is store[name] for name in store)
    assert pruned_config(config, full_plan(config)) == config


@pytest.mark.parametrize(
    ("config", "target"),
    [(MIXTRAL, TARGET), (QWEN2_MOE, SHARED_TARGET)],
    ids=["mixtral", "qwen2_moe"],
)
def test_rounds_are_one_plan(config, target):
    pruning, family = replace(targets(**target), iterations=2), family_of(config)
    one, two = pruning_rounds(config, pruning, ParallelConfig())
    first = make_plan(config, one, random_scores(config, 1))
    middle = pruned_config(config, first)
    assert all(getattr(middle, name) > size for name, size in target.items() if "num" not in name)
    second = make_plan(middle, two, random_scores(middle, 2))
    store = {name: from_tensor(t) for name, t in random_weights(config).items()}
    stepwise = prune_store(family, middle, second, prune_store(family, config, first, store))
    at_once = prune_store(family, config, compose(first, second), store)
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
        (LLAMA, {"moe_shared_expert_intermediate_size": 2}, "it has no experts"),
        (MIXTRAL, {"moe_shared_expert_intermediate_size": 2}, "it has no shared expert"),
        (
            QWEN2_MOE,
            {"moe_shared_expert_intermediate_size": 57},
            "moe_shared_expert_intermediate_size=57 must be between 1 and 56",
        ),
        (QWEN2_MOE, {"moe_shared_expert_intermediate_size": 0}, "must be between 1 and 56"),
        (QWEN2_MOE, {"ffn_hidden_size": 8}, "pruning.target.moe_ffn_hidden_size is their width"),
        (QWEN2_MOE, {"moe_router_topk": 5}, "moe_router_topk=5 must be between 1 and 4, the exp"),
        (MIXTRAL, {"moe_router_topk": 3, "num_moe_experts": 2}, "topk=3 must be between 1 and 2"),
        (QWEN2_MOE, {"moe_router_topk": 0}, "moe_router_topk=0 must be between 1 and 4"),
        (LLAMA, {"moe_router_topk": 1}, "moe_router_topk=1 is a size .* it has no experts"),
    ],
)
def test_targets_refused(config, sizes, words):
    with pytest.raises(ValueError, match=words):
        check_pruning(config, targets(**sizes))


def test_axes_that_a_model_lacks():
    check_axes(LLAMA, ["expert", "ffn"])
    with pytest.raises(ValueError, match=r"which has no experts; set scores\.axes to some of"):
        check_axes(LLAMA, ["expert", "expert_ffn", "shared_expert_ffn"])
    with pytest.raises(ValueError, match="which has experts in every layer"):
        check_axes(MIXTRAL, ["ffn"])
    with pytest.raises(ValueError, match="in every layer, none of them shared; set"):
        check_axes(MIXTRAL, ["shared_expert_ffn"])
    check_axes(QWEN2_MOE, ["shared_expert_ffn"])
    with pytest.raises(ValueError, match="which has experts in every layer; set"):
        check_axes(QWEN2_MOE, ["ffn"])


def test_channels_need_an_expert():
    with pytest.raises(ValueError, match="'expert_ffn' dim needs an expert"):
        dim_indices("expert_ffn", MIXTRAL, full_plan(MIXTRAL), 0)


@pytest.mark.parametrize(("dropped", "kind"), [([2], "\\*-"), ([1, 3, 4], "\\*E")])
def test_layers_of_either_kind_stay(dropped: list[int], kind: str) -> None:
    """Nothing could be said of the width of dense layers, or of experts, without one."""
    mixed = replace(QWEN2_MOE, ffn_hidden_size=64, moe_layer_freq=[1, 0, 1, 1])
    says = rf"all layers of kind '{kind}' of moe_layer_freq=\[1, 0, 1, 1\]"
    with pytest.raises(ValueError, match=says):
        make_plan(mixed, PruningConfig(drop_layers=dropped), None)
    plan = make_plan(mixed, PruningConfig(drop_layers=[1, 3]), None)
    assert pruned_config(mixed, plan).moe_layer_freq == [0, 1]
    assert [len(channels) for channels in plan["ffn"]] == [64, 0]
    assert [len(experts) for experts in plan["expert"]] == [0, 4]


def test_every_group_of_experts_keeps_as_many() -> None:
    """And so the router picks groups that are those of the model before pruning."""
    model = replace(GLM4_MOE, moe_router_topk=2)
    scores = random_scores(model)
    scores["expert"] = torch.tensor([9.0, 8, 7, 6, 1, 2, 4, 3]).expand(4, 8)
    plan = make_plan(model, PruningConfig(target=TargetConfig(num_moe_experts=4)), scores)
    assert plan["expert"][0] == []
    assert plan["expert"][1] == [0, 2, 5, 6]  # the best of each pair


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"num_moe_experts": 6}, "num_moe_experts=6 must be a multiple of .*=4.* set it to 4 or 8"),
        (
            {"moe_ffn_hidden_size": 20},
            "moe_shared_expert_intermediate_size=48 must be a multiple of moe_ffn_hidden_size=20",
        ),
        (
            {"moe_router_topk": 2},
            "target.moe_router_topk=2: .* must be half of num_experts_per_tok",
        ),
    ],
)
def test_targets_that_groups_and_config_json_cannot_hold(
    target: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pruning_rounds(GLM4_MOE, targets(**target), ParallelConfig())


def test_groups_that_hold_too_few_experts_are_refused() -> None:
    """Two of each of the two groups that a token may be routed to, four in all."""
    wide = replace(GLM4_MOE, moe_router_num_groups=2, moe_router_group_topk=1)
    with pytest.raises(ValueError, match=r"num_moe_experts=6 leaves 3 .* keep at least 8"):
        check_pruning(wide, targets(num_moe_experts=6))


def test_experts_of_a_token_need_no_scores_and_cut_no_weight(tmp_path) -> None:
    """The plan says it, rounds set it first, and fewer parameters are active."""
    plan = make_plan(QWEN2_MOE, targets(moe_router_topk=1), None)
    assert plan.settings == {"moe_router_topk": 1}
    plan.save(tmp_path)
    assert Plan.load(tmp_path) == plan
    small = pruned_config(QWEN2_MOE, plan)
    assert small == replace(QWEN2_MOE, moe_router_topk=1)
    store = {name: from_tensor(t) for name, t in random_weights(QWEN2_MOE).items()}
    assert prune_store(SHARED_FAMILY, QWEN2_MOE, plan, store) == store
    expert = 3 * QWEN2_MOE.hidden_size * 40 * QWEN2_MOE.num_layers
    active = [active_parameters(SHARED_FAMILY, config) for config in (QWEN2_MOE, small)]
    assert active[0] - active[1] == expert
    both = replace(targets(moe_router_topk=1, num_moe_experts=2), iterations=2)
    one, two = pruning_rounds(QWEN2_MOE, both, ParallelConfig())
    assert [one.target["moe_router_topk"], two.target["moe_router_topk"]] == [1, 1]
    first = make_plan(QWEN2_MOE, one, random_scores(QWEN2_MOE))
    middle = pruned_config(QWEN2_MOE, first)
    whole = compose(first, make_plan(middle, two, random_scores(middle)))
    assert pruned_config(QWEN2_MOE, whole).moe_router_topk == 1
    with pytest.raises(ValueError, match=r"the plan sets .*, but the model has no experts"):
        check_plan(LLAMA, Plan(full_plan(LLAMA).kept, settings={"moe_router_topk": 1}))


def test_a_single_expert_that_megatron_would_not_scale() -> None:
    with pytest.raises(ValueError, match=r"pruning\.target\.moe_router_topk=1: .* at least 2"):
        pruning_rounds(MIXTRAL, targets(moe_router_topk=1), ParallelConfig())


def edited(config, *, settings=None, merge=(), **lists) -> Plan:
    """The plan that keeps everything, but for some lists."""
    return Plan({**full_plan(config).kept, **lists}, list(merge), settings=settings or {})


PAIRS = replace(GLM4_MOE, moe_router_topk=2)  # 8 experts in 4 groups, after a dense layer
UNEVEN = [[], *[[0, 1, 2, 4]] * 3]
DENSE = {name: lists if name == "hidden" else lists[:1] for name, lists in full_plan(PAIRS).items()}
BEFORE = [[[0, 0, 2], [0, 1, -1]]]


@pytest.mark.parametrize(
    ("config", "plan", "message"),
    [
        (
            PAIRS,
            edited(PAIRS, expert=UNEVEN, expert_ffn=[[[0]] * len(kept) for kept in UNEVEN]),
            r"'expert of layer 2' must keep as many of each of moe_router_num_groups=4 groups",
        ),
        (PAIRS, Plan(DENSE), "would drop all layers of kind"),
        (PAIRS, edited(PAIRS, settings={"moe_router_topk": 9}), "moe_router_topk=9 must be"),
        (LLAMA, edited(LLAMA, ffn=5), "'ffn' must be a list, not 5"),
        (LLAMA, edited(LLAMA, ffn=[5] * 4), "'ffn of layer 1' must be a list, not 5"),
        (LLAMA, edited(LLAMA, ffn=[[5, "6"]] * 4), "it has 2 from 5 to 5"),
        (LLAMA, edited(LLAMA, merge=BEFORE), "keeps 4 layers, but has 'merge' of 1"),
        (LLAMA, edited(LLAMA, merge=[["a"]] * 4), "'merge of layer 1' must hold .* it has a"),
        (LLAMA, edited(LLAMA, merge=[[[0, 8, 1]]] * 4), r"head 0 to 7, factor\]; it has \[0, 8"),
        (LLAMA, edited(LLAMA, merge=[[[8, 0, 1]]] * 4), r"it has \[8, 0, 1\]"),
        (LLAMA, edited(LLAMA, merge=[[[0, 2, 1]]] * 4), "heads of two query groups"),
        (
            replace(GLM4_MOE, mtp_num_layers=1),
            edited(GLM4_MOE, ffn=[list(range(48)), [], [], []]),
            "ffn_hidden_size=48 is not supported for a model with mtp_num_layers=1",
        ),
        (
            NEMOTRON_H,  # one of two groups, and the heads in it
            edited(
                NEMOTRON_H,
                mamba_group=[kept[:1] for kept in full_plan(NEMOTRON_H)["mamba_group"]],
                mamba_head=[kept[:4] for kept in full_plan(NEMOTRON_H)["mamba_head"]],
            ),
            r"'mamba_group of layer 1' must hold all .* 0 to 1, as mamba_num_groups cannot be",
        ),
        (GPT2, edited(GPT2, hidden=list(range(32))), "hidden_size=32 is not supported for family"),
    ],
)
def test_plans_that_were_edited_by_hand(config, plan: Plan, message: str) -> None:
    """What no executor could carry out is said before one begins."""
    with pytest.raises(ValueError, match=message):
        check_plan(config, plan)


def test_a_plan_that_merges_is_its_models() -> None:
    scores = Scores(head=torch.rand(4, 8), meta={"model": model_meta(LLAMA)})
    merged = replace(targets(num_attention_heads=4), merge_heads=True)
    check_plan(LLAMA, make_plan(LLAMA, merged, scores))
