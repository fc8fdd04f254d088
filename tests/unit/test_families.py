import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2MoeConfig

from nemo_minitron.checkpoint.hf_checks import without_prediction_layers
from nemo_minitron.checkpoint.lazy import from_tensor
from nemo_minitron.families.dims import DIMS
from nemo_minitron.families.fuse import fuse, hf_shapes, split
from nemo_minitron.families.llama import from_hf, to_hf
from nemo_minitron.families.prediction import MTP_LAYERS
from nemo_minitron.families.registry import (
    FAMILIES,
    family_of,
    family_of_hf,
    read_config,
    written_config,
)
from nemo_minitron.families.table import parameter_count
from tests.helpers.tiny import GLM4_MOE, LLAMA, MIXTRAL, QWEN2_MOE

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def hf_llama(**overrides) -> LlamaConfig:
    sizes = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 101,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    return LlamaConfig(**deepcopy({**sizes, **overrides}))  # it writes into what it is given


@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_exactly_the_parameters_of_transformers(tied):
    hf = hf_llama(tie_word_embeddings=tied)
    config = from_hf(hf.to_dict())
    shapes = {}
    for _, row, layer in family_of(config).parameters(config):
        for name, shape in zip(row.hf, hf_shapes(row, config), strict=True):
            shapes[name.format(layer=layer)] = shape
    model = LlamaForCausalLM(hf)
    assert shapes == {name: tuple(p.shape) for name, p in model.named_parameters()}
    total = sum(p.numel() for p in model.parameters())
    embedding = 101 * 48 * (1 if tied else 2)
    count = parameter_count(family_of(config), config)
    assert count == {"total": total, "non_embedding": total - embedding}


def test_dims_of_every_row_are_known():
    for row in (row for family in FAMILIES.values() for row in family.rows):
        assert set(row.dims) <= set(DIMS)
        assert row.tp_dim is None or row.tp_dim < len(row.dims)
        parts = DIMS[row.dims[0]].parts
        assert len(row.hf) in (1, len(row.hf_dims) or len(parts))
        if row.hf_dims:
            held = [part for name in row.hf_dims for part in DIMS[name].parts]
            assert tuple(held) == parts


def test_find_knows_both_layer_specs():
    family = family_of(LLAMA)
    local = family.find("decoder.layers.3.input_layernorm.weight", LLAMA)
    fused = family.find("decoder.layers.3.self_attention.linear_qkv.layer_norm_weight", LLAMA)
    assert local == fused
    assert local[1] == 3
    assert family.find("decoder.final_layernorm.weight", LLAMA)[1] is None


def test_experts_are_rows_of_their_own():
    family = family_of(MIXTRAL)
    name = "decoder.layers.2.mlp.experts.local_experts.3.linear_fc1.weight"
    row, layer = family.find(name, MIXTRAL)
    assert (layer, row.expert) == (2, 3)
    assert row.hf[1] == "model.layers.{layer}.block_sparse_moe.experts.3.w3.weight"
    assert row.shape(MIXTRAL) == (80, 64)
    found = {name: (row, layer) for name, row, layer in family.parameters(MIXTRAL)}
    assert found[name] == (row, layer)
    assert sum("local_experts" in name for name in found) == 4 * 4 * 2
    norm, _ = family.find("decoder.layers.0.pre_mlp_layernorm.weight", MIXTRAL)
    assert norm.te_name is None


@pytest.mark.parametrize("config", [MIXTRAL, QWEN2_MOE], ids=["mixtral", "qwen2_moe"])
def test_find_knows_experts_in_one_module(config):
    """As Transformer Engine's grouped products name them; the row is the one of the other form."""
    family = family_of(config)
    for matrix in ("linear_fc1", "linear_fc2"):
        grouped, layer = family.find(f"decoder.layers.1.mlp.experts.{matrix}.weight3", config)
        alone = family.find(f"decoder.layers.1.mlp.experts.local_experts.3.{matrix}.weight", config)
        assert (grouped, layer) == alone
        assert (grouped.expert, layer) == (3, 1)
        assert grouped.template is not None
        assert grouped.template.grouped_name is not None
        assert grouped.template.grouped_name.endswith(f"mlp.experts.{matrix}.weight{{expert}}")
    others = [row for row in family.rows if not row.per_expert]
    assert all(row.grouped_name is None for row in others)


def test_experts_the_model_cannot_route_to_are_refused():
    with pytest.raises(ValueError, match="moe_router_topk=5 must be between 1 and num_moe_experts"):
        replace(MIXTRAL, moe_router_topk=5)
    with pytest.raises(ValueError, match="moe_ffn_hidden_size=None must be at least 1"):
        replace(MIXTRAL, moe_ffn_hidden_size=None)
    hf = {**family_of(MIXTRAL).to_hf(MIXTRAL), "num_experts_per_tok": 1}
    with pytest.raises(ValueError, match="num_experts_per_tok=1 is not supported"):
        family_of_hf(hf).from_hf(hf)


def test_mixtral_config_survives():
    family = family_of(MIXTRAL)
    written = family.to_hf(MIXTRAL)
    assert family_of_hf(written) is family
    assert family.from_hf(written) == replace(MIXTRAL, hf=written)


def test_qwen2_moe_config_survives():
    family = family_of(QWEN2_MOE)
    for config in (
        QWEN2_MOE,
        replace(QWEN2_MOE, add_qkv_bias=False, moe_router_pre_softmax=False),
        replace(QWEN2_MOE, moe_router_topk=1),
    ):
        written = family.to_hf(config)
        assert family_of_hf(written) is family
        assert family.from_hf(written) == replace(config, hf=written)
        # and transformers reads the same, adding fields of its own
        again = family.from_hf(Qwen2MoeConfig(**written).to_dict())
        assert replace(again, hf={}, dtype="float32") == config


def test_qwen2_moe_of_long_ago_says_less():
    """Qwen1.5-MoE-A2.7B's config.json has no qkv_bias and no mlp_only_layers."""
    hf = family_of(QWEN2_MOE).to_hf(QWEN2_MOE)
    for key in ("qkv_bias", "mlp_only_layers", "decoder_sparse_step", "norm_topk_prob"):
        del hf[key]
    assert replace(family_of_hf(hf).from_hf(hf), hf={}) == QWEN2_MOE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp_only_layers": [0, 1, 2, 3]}, r"mlp_only_layers=\[0, 1, 2, 3\] .* leave no layer"),
        ({"decoder_sparse_step": 5}, "decoder_sparse_step=5 leave no layer"),
        (
            {"layer_types": ["sliding_attention", "full_attention"] * 2},
            "layer_types holds 'sliding_attention' with use_sliding_window=false",
        ),
        (
            {"layer_types": ["chunked_attention", "full_attention"] * 2},
            r"layer_types holds \['chunked_attention'\], not supported",
        ),
        ({"norm_topk_prob": True, "num_experts_per_tok": 1}, "num_experts_per_tok=1 with norm_top"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu is not supported"),
        (
            {"shared_expert_intermediate_size": 0},
            "moe_shared_expert_intermediate_size=0 must be at least 1",
        ),
    ],
)
def test_qwen2_moe_configs_refused(change, message):
    hf = {**family_of(QWEN2_MOE).to_hf(QWEN2_MOE), **change}
    with pytest.raises(ValueError, match=message):
        family_of_hf(hf).from_hf(hf)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first_k_dense_replace": 4}, "first_k_dense_replace=4 leaves no layer with experts"),
        ({"n_shared_experts": 0}, "n_shared_experts=0 is not supported; at least 1"),
        ({"norm_topk_prob": False}, "norm_topk_prob=false is not supported"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok=1 is not supported"),
        ({"num_experts_per_tok": 3}, "topk_group=2 must be half of num_experts_per_tok"),
        ({"n_group": 3}, "num_moe_experts=8 must be a multiple of moe_router_num_groups=3"),
        (
            {"num_nextn_predict_layers": 2},
            r"num_nextn_predict_layers=2 .* set source_ignore=\[num_nextn_predict_layers\]",
        ),
    ],
)
def test_glm4_moe_configs_refused(change, message):
    hf = {**family_of(GLM4_MOE).to_hf(GLM4_MOE), **change}
    with pytest.raises(ValueError, match=message):
        family_of_hf(hf).from_hf(hf)


def test_layers_of_multi_token_prediction_are_left_out_on_request():
    """The written config.json says so, and tensors of such layers are no others' names."""
    hf = {**family_of(GLM4_MOE).to_hf(GLM4_MOE), MTP_LAYERS: 1}
    family, config = read_config(hf, [MTP_LAYERS])
    assert replace(config, hf={}) == GLM4_MOE
    assert written_config(config)[MTP_LAYERS] == 0
    weight = from_tensor(torch.zeros(2))
    names = ["model.norm.weight", "model.layers.3.x", "model.layers.4.enorm.weight", "lm_head.x"]
    kept = without_prediction_layers(family, config, dict.fromkeys(names, weight))
    assert [*kept] == ["model.norm.weight", "model.layers.3.x", "lm_head.x"]


def test_a_shared_expert_needs_others():
    with pytest.raises(ValueError, match="moe_shared_expert_intermediate_size=8 needs experts"):
        replace(LLAMA, moe_shared_expert_intermediate_size=8)


def test_unknown_parameter_is_named_with_the_known_rows():
    with pytest.raises(ValueError, match=r"decoder\.layers\.0\.x\.weight has no row") as error:
        family_of(LLAMA).find("decoder.layers.0.x.weight", LLAMA)
    assert "decoder.layers.{layer}.mlp.linear_fc2.weight" in str(error.value)
    tied = replace(LLAMA, share_embeddings_and_output_weights=True)
    with pytest.raises(ValueError, match=r"output_layer\.weight has no row"):
        family_of(tied).find("output_layer.weight", tied)


def test_unknown_family_and_architecture():
    with pytest.raises(
        ValueError,
        match=r"family 'bert' is unknown; known: .*'gpt_oss', 'granite', 'llama', .*'mixtral', ",
    ):
        family_of(replace(LLAMA, family="bert"))
    with pytest.raises(ValueError, match=r"BertModel.*supported: .*LlamaForCausalLM"):
        family_of_hf({"architectures": ["BertModel"]})
    with pytest.raises(ValueError, match=r"architectures=\[\]"):
        family_of_hf({})


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("rest", [(5,), ()])
def test_qkv_interleaves_per_query_group(heads, groups, rest):
    config = replace(LLAMA, num_attention_heads=heads, num_query_groups=groups, kv_channels=3)
    q = torch.randn(heads * 3, *rest)
    k, v = torch.randn(2, groups * 3, *rest)
    fused = fuse(DIMS["qkv"], config, [q, k, v])
    expected, per = [], heads // groups * 3
    for g in range(groups):
        expected += [q[g * per : (g + 1) * per], k[g * 3 : g * 3 + 3], v[g * 3 : g * 3 + 3]]
    assert torch.equal(fused, torch.cat(expected))
    parts = split(DIMS["qkv"], config, fused)
    for part, original in zip(parts, (q, k, v), strict=True):
        assert torch.equal(part, original)
        assert part.is_contiguous()


def test_gate_comes_before_up():
    config = replace(LLAMA, ffn_hidden_size=3)
    gate, up = torch.randn(2, 3, 5)
    fused = fuse(DIMS["gate_up"], config, [gate, up])
    assert torch.equal(fused, torch.cat([gate, up]))
    parts = split(DIMS["gate_up"], config, fused)
    assert torch.equal(parts[0], gate)
    assert torch.equal(parts[1], up)


@pytest.mark.parametrize("scaling", [None, LLAMA3_ROPE])
def test_rope_survives_whichever_transformers_wrote_it(scaling):
    base = hf_llama().to_dict()
    base.pop("rope_parameters")
    old = {**base, "rope_theta": 5e5, "rope_scaling": scaling}
    new = {
        **base,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": 5e5},
    }
    wanted = LlamaConfig(**deepcopy(old)).rope_parameters
    for source in (old, new):
        config = from_hf(source)
        assert (config.rotary_base, config.rope_scaling) == (5e5, scaling)
        written = json.loads(json.dumps(to_hf(config)))
        # what transformers 4.x reads, and nothing that contradicts it
        assert (written["rope_theta"], written["rope_scaling"]) == (5e5, scaling)
        assert "rope_parameters" not in written
        assert LlamaConfig(**written).rope_parameters == wanted


def test_head_dim_is_pinned_and_other_fields_carried_over():
    source = {**hf_llama(head_dim=16).to_dict(), "eos_token_id": [7, 8], "use_cache": False}
    written = to_hf(replace(from_hf(source), hidden_size=40))
    assert written["head_dim"] == 16
    assert written["hidden_size"] == 40
    assert (written["eos_token_id"], written["use_cache"]) == ([7, 8], False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias=true is not supported"),
        ({"mlp_bias": True}, "mlp_bias=true is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu is not supported"),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_scaling type 'ntk'"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple"),
    ],
)
def test_configs_the_table_cannot_hold_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_hf({**hf_llama().to_dict(), **change})
