"""Pruned weights against a slice of the Hugging Face tensors written without the table."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_minitron.checkpoint.hf import to_hf, to_megatron
from nemo_minitron.checkpoint.lazy import from_tensor
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.llama import LLAMA as FAMILY
from nemo_minitron.pruning.plan import Plan, full_plan, pruned_config
from nemo_minitron.pruning.slicing import dim_indices, prune_store
from tests.helpers.tiny import LLAMA, random_weights

SHAPES = {
    "gqa": LLAMA,
    "mha": replace(LLAMA, num_query_groups=8),
    "mqa": replace(LLAMA, num_query_groups=1),
    "tied": replace(LLAMA, share_embeddings_and_output_weights=True),
}


def hf_tensors(config: ModelConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    hf_config = LlamaConfig(**FAMILY.to_hf(config))
    model = LlamaForCausalLM(hf_config)
    for parameter in model.parameters():
        parameter.data.normal_()
    tensors = model.state_dict()
    if config.share_embeddings_and_output_weights:
        del tensors["lm_head.weight"]
    return tensors


def random_plan(config: ModelConfig, layers: list[int], groups: int, per_group: int) -> Plan:
    generator = torch.Generator().manual_seed(1)

    def pick(size: int, count: int) -> list[int]:
        return sorted(torch.randperm(size, generator=generator)[:count].tolist())

    kept_groups = [pick(config.num_query_groups, groups) for _ in layers]
    width = config.heads_per_group
    heads = [[g * width + i for g in kept for i in pick(width, per_group)] for kept in kept_groups]
    return Plan(
        {
            "layer": layers,
            "hidden": pick(config.hidden_size, 40),
            "ffn": [pick(config.ffn_hidden_size, 50) for _ in layers],
            "head": heads,
            "query_group": kept_groups,
        }
    )


def slice_by_hand(
    hf: dict[str, torch.Tensor], config: ModelConfig, plan: Plan
) -> dict[str, torch.Tensor]:
    """Loops over what is kept; knows Hugging Face's row order and nothing of Megatron's."""
    d, h = config.kv_channels, plan["hidden"]
    out = {
        "model.embed_tokens.weight": hf["model.embed_tokens.weight"][:, h],
        "model.norm.weight": hf["model.norm.weight"][h],
    }
    if "lm_head.weight" in hf:
        out["lm_head.weight"] = hf["lm_head.weight"][:, h]
    for new, old in enumerate(plan.layers):
        a, b = f"model.layers.{old}.", f"model.layers.{new}."
        q_rows = [head * d + i for head in plan["head"][new] for i in range(d)]
        kv_rows = [group * d + i for group in plan["query_group"][new] for i in range(d)]
        f = plan["ffn"][new]
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            out[b + name] = hf[a + name][h]
        for name, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
            name = f"self_attn.{name}_proj.weight"
            out[b + name] = hf[a + name][rows][:, h]
        out[b + "self_attn.o_proj.weight"] = hf[a + "self_attn.o_proj.weight"][h][:, q_rows]
        for name in ("gate", "up"):
            out[b + f"mlp.{name}_proj.weight"] = hf[a + f"mlp.{name}_proj.weight"][f][:, h]
        out[b + "mlp.down_proj.weight"] = hf[a + "mlp.down_proj.weight"][h][:, f]
    return out


def pruned_hf(
    hf: dict[str, torch.Tensor], config: ModelConfig, plan: Plan
) -> dict[str, torch.Tensor]:
    store = to_megatron(FAMILY, config, {name: from_tensor(t) for name, t in hf.items()})
    small = prune_store(FAMILY, config, plan, store)
    for lazy in small.values():
        assert tuple(lazy.read().shape) == lazy.shape
    return {name: t.read() for name, t in to_hf(FAMILY, pruned_config(config, plan), small).items()}


@pytest.mark.parametrize(
    ("shape", "layers", "groups", "per_group"),
    [
        ("gqa", [0, 1, 2, 3], 4, 1),
        ("gqa", [1, 3], 2, 1),
        ("gqa", [0, 3], 3, 2),
        ("mha", [0, 2, 3], 5, 1),
        ("mqa", [2], 1, 3),
        ("tied", [0, 1, 2], 4, 2),
    ],
)
def test_equals_an_independent_slice(
    shape: str, layers: list[int], groups: int, per_group: int
) -> None:
    config = SHAPES[shape]
    plan = random_plan(config, layers, groups, per_group)
    hf = hf_tensors(config)
    expected, found = slice_by_hand(hf, config, plan), pruned_hf(hf, config, plan)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    small = pruned_config(config, plan)
    if small.hidden_size % small.num_attention_heads == 0:  # transformers 5 refuses other Llamas
        model = LlamaForCausalLM(LlamaConfig(**FAMILY.to_hf(small)))
        model.load_state_dict(found, strict=shape != "tied")


def test_a_plan_that_keeps_everything_is_the_identity() -> None:
    hf = hf_tensors(LLAMA)
    found = pruned_hf(hf, LLAMA, full_plan(LLAMA))
    assert found.keys() == hf.keys()
    assert all(torch.equal(found[name], hf[name]) for name in hf)
    store = to_megatron(FAMILY, LLAMA, {name: from_tensor(t) for name, t in hf.items()})
    kept = prune_store(FAMILY, LLAMA, full_plan(LLAMA), store)
    assert all(kept[name] is store[name] for name in store)


def test_only_what_is_read_is_read() -> None:
    reads: list[str] = []

    def noting(name: str, tensor: torch.Tensor):
        def read() -> torch.Tensor:
            reads.append(name)
            return tensor

        return replace(from_tensor(tensor), read=read, read_rows=None)

    store = to_megatron(
        FAMILY, LLAMA, {name: from_tensor(t) for name, t in hf_tensors(LLAMA).items()}
    )
    noted = {name: noting(name, lazy.read()) for name, lazy in store.items()}
    small = prune_store(FAMILY, LLAMA, random_plan(LLAMA, [1], 2, 1), noted)
    assert reads == []
    small["decoder.layers.0.mlp.linear_fc1.weight"].read()
    assert reads == ["decoder.layers.1.mlp.linear_fc1.weight"]


def test_unknown_and_missing_parameters_are_refused() -> None:
    store = to_megatron(
        FAMILY, LLAMA, {name: from_tensor(t) for name, t in hf_tensors(LLAMA).items()}
    )
    extra = {**store, "decoder.layers.0.mlp.gate.weight": store["decoder.final_layernorm.weight"]}
    with pytest.raises(ValueError, match=r"mlp\.gate\.weight has no row in the table"):
        prune_store(FAMILY, LLAMA, full_plan(LLAMA), extra)
    del store["decoder.final_layernorm.weight"]
    with pytest.raises(ValueError, match="lacks 1 parameters"):
        prune_store(FAMILY, LLAMA, full_plan(LLAMA), store)


def test_dtypes_stay() -> None:
    store = {name: from_tensor(t.bfloat16()) for name, t in random_weights(LLAMA).items()}
    for lazy in prune_store(FAMILY, LLAMA, random_plan(LLAMA, [1], 2, 1), store).values():
        assert lazy.read().dtype == lazy.dtype == torch.bfloat16


def test_per_layer_dims_need_a_layer() -> None:
    with pytest.raises(ValueError, match="'ffn' dim needs a layer"):
        dim_indices("ffn", LLAMA, full_plan(LLAMA), None)


@pytest.mark.parametrize("cache_bytes", [1 << 20, 300])
def test_block_by_block_is_the_same(monkeypatch, cache_bytes):
    """Large tensors are pruned some rows at a time, and those in runs that fit a cache."""
    store = {name: from_tensor(t) for name, t in random_weights(LLAMA).items()}
    plan = random_plan(LLAMA, [0, 2, 3], 2, 1)
    whole = {n: t.read() for n, t in prune_store(FAMILY, LLAMA, plan, store).items()}
    monkeypatch.setattr("nemo_minitron.checkpoint.lazy.BLOCK_BYTES", 700)
    monkeypatch.setattr("nemo_minitron.pruning.slicing.CACHE_BYTES", cache_bytes)
    for name, lazy in prune_store(FAMILY, LLAMA, plan, store).items():
        assert torch.equal(lazy.read(), whole[name]), name
        assert lazy.read_rows is not None
        assert torch.equal(lazy.read_rows(1, len(whole[name]) - 3), whole[name][1:-3]), name
