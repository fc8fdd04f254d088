"""The local layers of hybrid models: transformers' logits at every layout."""

from pathlib import Path

import pytest
import torch
from transformers import NemotronHConfig, NemotronHForCausalLM

from tests.dist.hybrid_cases import PATTERN, SIZES, VOCAB, hybrid_logits, save_hybrid
from tests.dist.live_truth import layout
from tests.pool import WorkerPool

LENGTH = 20  # is split over two context-parallel ranks in four parts


def model() -> NemotronHForCausalLM:
    torch.manual_seed(0)
    config = NemotronHConfig(
        vocab_size=VOCAB,
        hybrid_override_pattern=PATTERN,
        hidden_size=SIZES["hidden_size"],
        intermediate_size=SIZES["ffn_hidden_size"],
        num_attention_heads=SIZES["num_attention_heads"],
        num_key_value_heads=SIZES["num_query_groups"],
        head_dim=SIZES["kv_channels"],
        mamba_num_heads=SIZES["mamba_num_heads"],
        mamba_head_dim=SIZES["mamba_head_dim"],
        n_groups=SIZES["mamba_num_groups"],
        ssm_state_size=SIZES["mamba_state_dim"],
        n_routed_experts=SIZES["num_moe_experts"],
        moe_intermediate_size=SIZES["moe_ffn_hidden_size"],
        num_experts_per_tok=SIZES["moe_router_topk"],
        moe_shared_expert_intermediate_size=SIZES["moe_shared_expert_intermediate_size"],
        routed_scaling_factor=SIZES["moe_router_topk_scaling_factor"],
        chunk_size=8,
    )
    found = NemotronHForCausalLM(config).eval()
    for name, tensor in found.state_dict().items():
        torch.nn.init.normal_(tensor, mean=1.0 if "norm" in name else 0.0, std=0.1)
    return found


def by_megatron_names(hf: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of transformers' model as Megatron-Core's HybridModel names them on one rank."""
    out = {
        "embedding.word_embeddings.weight": hf["model.embeddings.weight"],
        "decoder.final_norm.weight": hf["model.norm_f.weight"],
        "output_layer.weight": hf["lm_head.weight"],
    }
    for number, letter in enumerate(PATTERN):
        theirs = f"model.layers.{number}."
        layer = {k.removeprefix(theirs): v for k, v in hf.items() if k.startswith(theirs)}
        norm = {"M": "norm", "*": "input_layernorm"}.get(letter, "pre_mlp_layernorm")
        named = {f"{norm}.weight": layer.pop("norm.weight")}
        for name, tensor in layer.items():
            name = name.removeprefix("mixer.")
            named |= {"M": _mamba, "*": _same, "-": _mlp, "E": _experts}[letter](name, tensor)
        if letter == "*":
            named = _attention(named)
        out |= {f"decoder.layers.{number}.{name}": tensor for name, tensor in named.items()}
    return out


def _same(name, tensor):
    return {name: tensor}


def _mamba(name, tensor):
    return {f"mixer.{name.replace('conv1d.', 'conv1d_')}": tensor}


def _mlp(name, tensor):
    parts = {"up_proj": "linear_fc1", "down_proj": "linear_fc2"}
    return {f"mlp.{parts[name.split('.')[0]]}.weight": tensor}


def _experts(name, tensor):
    kinds = {"up_proj": "linear_fc1", "down_proj": "linear_fc2"}
    if name.startswith("experts."):
        kind = kinds[name.removeprefix("experts.")]
        return {f"mlp.experts.local_experts.{i}.{kind}.weight": one for i, one in enumerate(tensor)}
    if name.startswith("shared_experts."):
        return {f"mlp.shared_experts.{kinds[name.split('.')[1]]}.weight": tensor}
    return {f"mlp.router.{'weight' if name == 'gate.weight' else 'expert_bias'}": tensor}


def _attention(named):
    """Queries, keys and values in one matrix, group by group."""
    groups = SIZES["num_query_groups"]
    q, k, v = (named.pop(f"{kind}_proj.weight") for kind in "qkv")
    parts = [t.view(groups, -1, t.shape[1]) for t in (q, k, v)]
    named["self_attention.linear_qkv.weight"] = torch.cat(parts, 1).flatten(0, 1)
    named["self_attention.linear_proj.weight"] = named.pop("o_proj.weight")
    return named


@pytest.fixture(scope="module")
def hybrid(ranks: WorkerPool, tmp_path_factory) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """A checkpoint, token ids, and transformers' logits."""
    theirs, folder = model(), tmp_path_factory.mktemp("hybrid")
    ranks.run(1, save_hybrid, by_megatron_names(theirs.state_dict()), str(folder))
    ids = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return folder, ids, theirs(ids, use_cache=False).logits


LAYOUTS = {
    "one rank": (1, layout()),
    "TP2": (2, layout(tp=2)),
    "TP2 SP": (2, layout(tp=2, sp=True)),
    "PP2": (2, layout(pp=2)),
    "CP2": (2, layout(cp=2)),
    "EP2": (2, layout(dp=2, ep=2)),
    "TP2 PP2": (4, layout(tp=2, pp=2, sp=True)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_transformers_logits_at_every_layout(ranks, hybrid, name):
    folder, ids, wanted = hybrid
    size, parallel = LAYOUTS[name]
    found = ranks.run(size, hybrid_logits, str(folder), ids, parallel)
    logits = next(one for one in found if one is not None)
    torch.testing.assert_close(logits, wanted, atol=2e-4, rtol=2e-4)
