"""An export's config.json is its source's, but for what pruning changed."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from nemo_minitron.checkpoint.hf import model_config, open_hf, to_hf, to_megatron, write_hf
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.registry import FAMILIES, read_config, written_config
from tests.helpers.tiny import PHI3_LONG, SMOLLM3
from tests.unit.test_config_keys import LLAMA3, LLAMA31_8B, MISTRAL_NEMO, PUBLISHED, QWEN25_7B

CODE = ("auto_map",)
NEW_ROPE = {
    **{
        k: v
        for k, v in LLAMA31_8B.items()
        if k not in ("rope_theta", "rope_scaling", "torch_dtype")
    },
    "rope_parameters": {**LLAMA3, "rope_theta": 500000.0},
    "dtype": "bfloat16",
    "layer_types": ["full_attention"] * 32,
    "mlp_bias": False,
}
SOURCES: dict[str, dict[str, Any]] = {
    **PUBLISHED,
    "of transformers 5": NEW_ROPE,
    "with a key that was passed over": {**LLAMA31_8B, "embedding_multiplier": 12.0},
    "experts under their other name": {
        **{key: value for key, value in PUBLISHED["Qwen3-30B-A3B"].items() if key != "num_experts"},
        "num_local_experts": 128,
    },
    "layers that do not rotate": {
        **transformers.SmolLM3Config(
            num_hidden_layers=8, no_rope_layers=[1, 0, 1, 1, 0, 1, 1, 1], dtype="bfloat16"
        ).to_diff_dict(),
        "architectures": ["SmolLM3ForCausalLM"],
    },
    "windows in some layers": {
        **transformers.Qwen3Config(
            num_hidden_layers=8,
            use_sliding_window=True,
            sliding_window=512,
            layer_types=["full_attention", "sliding_attention"] * 4,
            dtype="bfloat16",
        ).to_diff_dict(),
        "architectures": ["Qwen3ForCausalLM"],
    },
    "a window that nothing leaves": {**MISTRAL_NEMO, "sliding_window": 128000},
}


def read(hf: dict[str, Any]) -> ModelConfig:
    passed_over = () if hf.get("model_type") == "granite" else ("embedding_multiplier",)
    ignored = [key for key in passed_over if key in hf]
    return read_config(json.loads(json.dumps(hf)), ignored)[1]


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_changes_without_pruning(name: str) -> None:
    hf = SOURCES[name]
    written = written_config(read(hf))
    assert written == {key: value for key, value in hf.items() if key not in CODE}
    assert list(written) == [key for key in hf if key not in CODE]


@pytest.mark.parametrize("name", SOURCES)
def test_only_sizes_change_with_pruning(name: str) -> None:
    """And head_dim, where it no longer follows from the others."""
    hf, config = SOURCES[name], read(SOURCES[name])
    sizes: dict[str, Any] = {}
    width = config.ffn_hidden_size // 2
    if config.num_moe_experts:
        sizes |= {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": width}
    sizes["ffn_hidden_size"] = width
    if config.family != "gpt2":
        groups = config.num_query_groups
        sizes |= {"hidden_size": config.hidden_size // 2, "num_attention_heads": groups}
    small = config.resized(sizes, [0, 1, 2, 4, 5])
    written = written_config(small)
    assert replace(read(written), hf={}, kept_layers=[], dtype="") == replace(
        small, hf={}, kept_layers=[], dtype=""
    )
    changed = {key for key in {*written, *hf} if written.get(key) != hf.get(key)}
    allowed = (
        *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"),
        *("head_dim", "num_local_experts", "num_experts", "num_experts_per_tok", "layer_types"),
        *("moe_intermediate_size", "n_layer", "n_inner", "no_rope_layers", *CODE),
    )
    uneven = small.hidden_size % small.num_attention_heads
    moved = {"architectures", "model_type"} if uneven and config.family == "llama" else set()
    assert changed <= {*allowed, *moved}
    if "layer_types" in hf:
        assert written["layer_types"] == [hf["layer_types"][layer] for layer in (0, 1, 2, 4, 5)]
    if "no_rope_layers" in hf:
        assert written["no_rope_layers"] == [1, 0, 1, 0, 1]


def test_mistral_stays_mistral() -> None:
    for hidden in (5120, 2560, 2500):
        written = written_config(replace(read(MISTRAL_NEMO), hidden_size=hidden))
        assert (written["architectures"], written["model_type"]) == (
            ["MistralForCausalLM"],
            "mistral",
        )
    assert written["head_dim"] == 128


def test_llama_becomes_mistral_only_where_transformers_has_no_other() -> None:
    """Its LlamaConfig wants hidden_size to be a multiple of the heads."""
    written = written_config(replace(read(LLAMA31_8B), hidden_size=3000))
    assert written["model_type"] == "mistral"
    assert written["sliding_window"] is None
    transformers.AutoConfig.for_model(**json.loads(json.dumps(written)))
    assert written_config(read(written)) == written


def test_head_dim_stays_left_out_while_it_follows() -> None:
    assert "head_dim" not in written_config(replace(read(QWEN25_7B), num_layers=3))
    assert written_config(replace(read(QWEN25_7B), hidden_size=3500))["head_dim"] == 128


def test_models_of_other_formats_get_a_whole_one() -> None:
    """GGUF and Megatron say token ids at most; so did results of earlier versions."""
    config = replace(read(LLAMA31_8B), hf={"eos_token_id": 7, "auto_map": {}})
    written = written_config(config)
    assert written["torch_dtype"] == config.dtype
    assert written["eos_token_id"] == 7
    assert "auto_map" not in written
    assert replace(read(written), hf={}) == replace(config, hf={})


@pytest.mark.parametrize("config", [replace(PHI3_LONG, hf={}), replace(SMOLLM3, hf={})])
def test_a_padding_token_that_nobody_named_is_none(config: ModelConfig) -> None:
    """Config classes of transformers have one of their own, beyond this vocabulary."""
    written = json.loads(json.dumps(written_config(config)))
    theirs = transformers.AutoConfig.for_model(**written)
    transformers.AutoModelForCausalLM.from_config(theirs)  # refuses what it has no embedding of
    named = written_config(replace(config, hf={"pad_token_id": 3}))
    assert (theirs.pad_token_id, named["pad_token_id"]) == (None, 3)


@pytest.mark.parametrize("hf", [LLAMA31_8B, NEW_ROPE], ids=["torch_dtype", "dtype"])
def test_the_dtype_is_that_of_the_weights(hf: dict[str, Any]) -> None:
    """Under the name that the source has for it; a source that says none of it keeps silent."""
    (key,) = {"dtype", "torch_dtype"} & {*hf}
    trained = replace(read(hf), dtype="float32")
    assert written_config(trained) == {**hf, key: "float32"}
    for unsaid in ({}, {key: None}):
        bare = {**{name: value for name, value in hf.items() if name != key}, **unsaid}
        assert written_config(replace(read(bare), dtype="float32")) == bare


# ---------------------------------------------------------------- with weights, in transformers

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LATENT = {
    **TINY,
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LINEAR = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": TINY,
    "mistral": TINY,
    "qwen2": TINY,
    "qwen3": TINY | {"head_dim": 16},
    "nemotron": TINY,
    "phi3": TINY,
    "smollm3": TINY,
    "olmo2": TINY,
    "gemma2": TINY | {"head_dim": 16, "query_pre_attn_scalar": 12},
    "gemma3_text": TINY | {"head_dim": 16, "num_hidden_layers": 6, "sliding_window": 8},
    "granite": TINY | {"embedding_multiplier": 6.0, "logits_scaling": 4.0},
    "gpt2": {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "mixtral": TINY | {"num_local_experts": 4},
    "qwen2_moe": TINY | ROUTED | {"shared_expert_intermediate_size": 48},
    "qwen3_moe": TINY | ROUTED,
    "deepseek_v2": LATENT | {"q_lora_rank": None},
    "deepseek_v3": LATENT | {"q_lora_rank": 16, "n_group": 1, "topk_group": 1, "num_mtp_layers": 0},
    "glm4_moe": TINY
    | {
        "head_dim": 16,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "num_nextn_predict_layers": 0,
    },
    "ministral": TINY | {"head_dim": 16, "sliding_window": 8},
    "ministral3": TINY | {"head_dim": 16},
    "gpt_oss": TINY | {"head_dim": 16, "num_local_experts": 4, "sliding_window": 8},
    "qwen3_next": TINY | ROUTED | LINEAR | {"shared_expert_intermediate_size": 48},
    "qwen3_5_text": TINY | LINEAR,
    "qwen3_5_moe_text": TINY | ROUTED | LINEAR | {"shared_expert_intermediate_size": 48},
    "nemotron_h": {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 8,
        "n_routed_experts": 4,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 24,
        "hybrid_override_pattern": "M*-E",
    },
}


def test_all_kinds_of_models_are_here() -> None:
    assert set(MODELS) == {t for f in FAMILIES.values() for t in f.hf_architectures.values()}


@pytest.mark.parametrize("model_type", MODELS)
def test_source_and_export_are_one_model(model_type: str, tmp_path) -> None:
    """The same config.json, the same tensors, the same logits."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **MODELS[model_type])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    source, exported = tmp_path / "source", tmp_path / "exported"
    model.save_pretrained(source)
    exported.mkdir()
    hf_config, hf_store = open_hf(source)
    family, ours = model_config(hf_config, hf_store)
    store = to_hf(family, ours, to_megatron(family, ours, hf_store))
    write_hf(exported, store, written_config(ours), "5GB")
    first, second = (json.loads((f / "config.json").read_text()) for f in (source, exported))
    assert first == second
    tensors = [load_file(folder / "model.safetensors") for folder in (source, exported)]
    assert tensors[0].keys() == tensors[1].keys()
    ids = torch.arange(20)[None]
    again = transformers.AutoModelForCausalLM.from_pretrained(exported)
    assert type(again) is type(model)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "ministral", "gpt_oss"])
def test_a_model_runs_whose_layers_with_windows_are_gone(model_type: str) -> None:
    """Transformers makes the mask of windows of these for any model, and refuses null for it."""
    kinds = ["sliding_attention", "full_attention"]
    sizes = {**MODELS[model_type], "num_hidden_layers": 2, "layer_types": kinds}
    source = transformers.AutoConfig.for_model(model_type, **{**sizes, "sliding_window": 8})
    family = next(f for f in FAMILIES.values() if model_type in f.hf_architectures.values())
    hf = {**source.to_diff_dict(), "architectures": [*family.hf_architectures]}
    written = written_config(read(hf).resized({}, [1]))
    assert written["layer_types"] == kinds[1:]
    theirs = transformers.AutoConfig.for_model(**written)
    model = transformers.AutoModelForCausalLM.from_config(theirs).eval()
    with torch.no_grad():
        assert model(torch.arange(20)[None]).logits.shape[1] == 20
    assert read(written).window_size is None
