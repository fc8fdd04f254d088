"""config.json is read through an allow list: what is published passes, unknown keys do not."""

import json
from copy import deepcopy
from typing import Any

import pytest
import transformers

from nemo_minitron.families.registry import FAMILIES, family_of_hf, read_config

LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
MISTRAL_NEMO = {
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 128000,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 131072,
}
QWEN25_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3_30B_A3B = {
    **QWEN25_7B,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-2-7b": {
        **{key: value for key, value in LLAMA31_8B.items() if key != "rope_theta"},
        "_name_or_path": "meta-llama/Llama-2-7b-hf",
        "max_position_embeddings": 4096,
        "num_key_value_heads": 32,
        "rope_scaling": None,
        "vocab_size": 32000,
    },
    "Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.34.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
    },
    "Qwen2.5-7B for long texts": {
        **QWEN25_7B,
        "rope_scaling": {
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
            "type": "yarn",
        },
    },
    "granite-3.3-2b-instruct": {
        "architectures": ["GraniteForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_multiplier": 0.015625,
        "bos_token_id": 0,
        "embedding_multiplier": 12.0,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "logits_scaling": 8.0,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "granite",
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "pad_token_id": 0,
        "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 49159,
    },
    "Llama-3.1-8B": LLAMA31_8B,
    "Llama-3.2-1B": {
        **LLAMA31_8B,
        "head_dim": 64,
        "hidden_size": 2048,
        "tie_word_embeddings": True,
    },
    "Llama-3.1-Minitron-4B-Width": {**LLAMA31_8B, "hidden_size": 3072, "head_dim": 128},
    "SmolLM2-135M": {
        **LLAMA31_8B,
        "hidden_size": 576,
        "is_llama_config": True,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rope_interleaved": False,
        "rope_scaling": None,
        "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
    },
    "Mistral-7B-v0.3": {**MISTRAL_NEMO, "hidden_size": 4096, "max_position_embeddings": 32768},
    "Mistral-Nemo-Base-2407": MISTRAL_NEMO,
    "Qwen2.5-7B": QWEN25_7B,
    "Qwen3-8B": {
        **{key: value for key, value in QWEN25_7B.items() if key != "use_mrope"},
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "num_attention_heads": 32,
        "rope_scaling": None,
        "sliding_window": None,
    },
    "Qwen3-30B-A3B": QWEN3_30B_A3B,
    "Qwen1.5-MoE-A2.7B": {
        **{key: value for key, value in QWEN3_30B_A3B.items() if key != "mlp_only_layers"},
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "norm_topk_prob": False,
        "qkv_bias": True,
        "shared_expert_intermediate_size": 5632,
        "sliding_window": 32768,
    },
    "Mixtral-8x7B-v0.1": {
        **MISTRAL_NEMO,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.02,
        "router_jitter_noise": 0.0,
    },
    "Minitron-4B-Base": {
        "architectures": ["NemotronForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "head_dim": 128,
        "hidden_act": "relu2",
        "hidden_dropout": 0.0,
        "hidden_size": 3072,
        "initializer_range": 0.0134,
        "intermediate_size": 9216,
        "kv_channels": 128,
        "max_position_embeddings": 4096,
        "mlp_bias": False,
        "model_type": "nemotron",
        "norm_eps": 1e-05,
        "num_attention_heads": 24,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "partial_rotary_factor": 0.5,
        "rope_percent": 0.5,
        "rope_theta": 10000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.32.0.dev0",
        "use_cache": True,
        "vocab_size": 256000,
    },
    "Phi-4": {
        **{key: value for key, value in LLAMA31_8B.items() if key != "pretraining_tp"},
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "embd_pdrop": 0.0,
        "max_position_embeddings": 16384,
        "original_max_position_embeddings": 16384,
        "resid_pdrop": 0.0,
        "rope_scaling": None,
        "sliding_window": None,
    },
    "Phi-4-mini": {
        **{key: value for key, value in LLAMA31_8B.items() if key != "pretraining_tp"},
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "rope_scaling": None,
        "sliding_window": 262144,
    },
    "Qwen3-Coder-30B-A3B": {
        **QWEN3_30B_A3B,
        "qkv_bias": False,
        "shared_expert_intermediate_size": 0,
        "use_qk_norm": True,
    },
    "gpt2-medium": {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 1024,
        "n_head": 16,
        "n_layer": 24,
        "n_positions": 1024,
        "n_special": 0,
        "predict_special_tokens": True,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 50257,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_pass(name: str) -> None:
    hf = PUBLISHED[name]
    family, config = read_config(json.loads(json.dumps(hf)))
    assert config.hf == hf
    assert config.num_layers == hf.get("num_hidden_layers", hf.get("n_layer"))
    assert hf["architectures"][0] in family.hf_architectures
    # none of it needs the list of architectures, which transformers does not look at
    alone = {key: value for key, value in hf.items() if key != "architectures"}
    assert read_config(alone)[0] is family


# Defaults that are refused or are no sizes.
INSTEAD: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "deepseek_v3": {"num_nextn_predict_layers": 0},
    "glm4_moe": {"num_nextn_predict_layers": 0},
}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_whatever_transformers_writes_passes(name: str) -> None:
    """All keys of its config class, with its defaults."""
    for model_type in FAMILIES[name].hf_architectures.values():
        theirs = transformers.AutoConfig.for_model(model_type).to_dict()
        theirs |= INSTEAD.get(model_type, {})
        family, config = read_config(json.loads(json.dumps(theirs)))
        assert family.name == config.family == name


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        # Granite's and MiniCPM's keys
        ("Llama-3.1-8B", {"embedding_multiplier": 12.0}, "embedding_multiplier=12.0 .only 1 would"),
        ("Llama-3.1-8B", {"residual_multiplier": 0.22}, "residual_multiplier=0.22 .only 1 would"),
        ("Llama-3.1-8B", {"attention_multiplier": 0.01}, "attention_multiplier=0.01 .only 0.088"),
        ("Llama-3.1-8B", {"logits_scaling": 8.0}, "logits_scaling=8.0 .only 1 would"),
        ("Mistral-7B-v0.3", {"scale_emb": 12}, "scale_emb=12 .only 1 would change nothing"),
        (
            "Qwen2.5-7B",
            {"scale_depth": 1.4, "dim_model_base": 256},
            r"keys that .* 'qwen2' does not know: scale_depth=1.4, dim_model_base=256\. .*"
            r"source_ignore=\[scale_depth,dim_model_base\]",
        ),
        # of others
        ("Llama-3.1-8B", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("Llama-3.1-8B", {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar=256 .only 128"),
        ("Llama-3.1-8B", {"clip_qkv": 8}, "clip_qkv=8"),
        ("Llama-3.1-8B", {"text_config": {"hidden_size": 64}}, "text_config="),
        ("Llama-3.1-8B", {"no_rope_layers": [1, 0] * 16}, "no_rope_layers="),
        ("Llama-3.1-8B", {"layer_types": ["sliding_attention"] * 32}, "layer_types="),
        ("Llama-3.1-8B", {"layer_types": ["full_attention"] * 31}, "layer_types="),
        ("Llama-3.1-8B", {"use_sliding_window": True}, "use_sliding_window=true .only false"),
        ("Llama-3.1-8B", {"sliding_window": 4096}, "sliding_window=4096 .* is not supported"),
        ("Llama-3.1-8B", {"qkv_bias": True}, "qkv_bias=true .only false"),
        ("Qwen2.5-7B", {"layer_types": ["full_attention"] * 27}, "layer_types is of 27 layers"),
        ("Minitron-4B-Base", {"kv_channels": 64}, "kv_channels=64 .only 128 would"),
        ("gpt2-medium", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn=true"),
        ("gpt2-medium", {"hidden_size": 1024}, "hidden_size=1024"),
        (
            "Qwen3-30B-A3B",
            {"shared_expert_intermediate_size": 64},
            "shared_expert_intermediate_size",
        ),
        ("Qwen3-30B-A3B", {"num_local_experts": 64}, "num_experts=128 and num_local_experts=64"),
        ("Mixtral-8x7B-v0.1", {"num_experts": 8}, "num_experts=8"),
        ("Phi-4", {"interpolate_factor": 2}, "interpolate_factor=2"),
    ],
)
def test_keys_that_may_change_the_network_are_refused(name, change, message):
    with pytest.raises(ValueError, match=message):
        read_config({**PUBLISHED[name], **change})


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_family_refuses_what_nobody_reads(name: str) -> None:
    hf = {**PUBLISHED[name], "new_network": 1, "nothing": None}
    with pytest.raises(ValueError, match=r"has keys that .*: new_network=1\. .*\[new_network\]"):
        family_of_hf(hf).from_hf(hf)
    assert read_config(hf, ["new_network"])[1].hf == hf


def test_values_that_change_nothing_pass() -> None:
    neutral = {
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 128**-0.5,
        "logits_scaling": 1.0,
        "attn_logit_softcapping": None,
        "clip_qkv": None,
        "query_pre_attn_scalar": 128,
        "layer_types": ["full_attention"] * 32,
        "no_rope_layers": [1] * 32,
        "attention_dropout": 0.1,
        "use_sliding_window": False,
        "partial_rotary_factor": 1.0,
    }
    assert read_config({**LLAMA31_8B, **neutral})[1].num_layers == 32


def test_only_unknown_keys_can_be_passed_over() -> None:
    with pytest.raises(
        ValueError, match=r"source_ignore=\['nothing'\]: config.json has no nothing"
    ):
        read_config(LLAMA31_8B, ["nothing"])
    with pytest.raises(ValueError, match=r"source_ignore=\['rope_scaling'\]: rope_scaling is read"):
        read_config(LLAMA31_8B, ["rope_scaling"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "granite"}, r"model_type=granite and architectures=\['LlamaForCausalLM'\]"),
        ({"model_type": "mistral"}, "disagree .* that architecture has model_type=llama"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "is not supported; supported: "),
        ({"architectures": None, "model_type": "minicpm"}, "model_type=minicpm in config.json is"),
        ({"architectures": "LlamaForCausalLM"}, "is not a list of names"),
        ({"architectures": [], "model_type": None}, r"architectures=\[\] in config.json is not"),
    ],
)
def test_two_names_of_two_networks(change, message):
    with pytest.raises(ValueError, match=message):
        read_config({**deepcopy(LLAMA31_8B), **change})


def test_bare_models_are_of_their_family() -> None:
    for name in ("LlamaModel", "MistralModel", "GPT2Model"):
        family = family_of_hf({"architectures": [name]})
        assert any(
            known.startswith(name.removesuffix("Model")) for known in family.hf_architectures
        )
