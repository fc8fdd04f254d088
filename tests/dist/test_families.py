"""Every family in and out, pruned along every axis, alone and at TP 2 and PP 2.

What a pruned export must hold is written here in Hugging Face terms, by hand,
without the parameter tables. Expert parallelism: ``test_moe.py``, ``test_moe_shared.py``.
"""

import re
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nemo_minitron.config.axes import AXES, axis_size, has_axis
from nemo_minitron.config.layers import kinds_of
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import (
    ExportConfig,
    ImportanceConfig,
    ImportConfig,
    PruneConfig,
    PruningConfig,
    TargetConfig,
)
from nemo_minitron.families.registry import FAMILIES, family_of, family_of_hf
from nemo_minitron.pruning.plan import Plan
from nemo_minitron.stages import export, import_, prune
from tests.cases.families import family_at
from tests.cases.live_truth import layout
from tests.helpers.pool import WorkerPool
from tests.helpers.tiny import token_batch

SAMPLES, LENGTH = 3, 16
HEAD_DIM = 8
SIZES = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 64,
}
ATTENTION_AND_HIDDEN = {
    "hidden": {"hidden_size": 44},  # no multiple of the heads
    "head": {"num_attention_heads": 4},
    "query_group": {"num_attention_heads": 4, "num_query_groups": 2},
    "layer": {"num_layers": 2},
}
SEVERAL = {
    "hidden_size": 44,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "num_layers": 2,
}
DENSE = {
    **ATTENTION_AND_HIDDEN,
    "ffn": {"ffn_hidden_size": 24},
    "several": {**SEVERAL, "ffn_hidden_size": 24},
}
EVEN = {**DENSE, "hidden": {"hidden_size": 40}}  # a multiple of the heads
EXPERTS = {
    **ATTENTION_AND_HIDDEN,
    "expert": {"num_moe_experts": 2},
    "expert_ffn": {"moe_ffn_hidden_size": 16},
    "several": {**SEVERAL, "num_moe_experts": 2, "moe_ffn_hidden_size": 16},
}
SHARED = {"moe_shared_expert_intermediate_size": 24}
MIXED = {
    **EXPERTS,
    "layer": {"num_layers": 3},
    "ffn": {"ffn_hidden_size": 24},
    "several": {**EXPERTS["several"], "ffn_hidden_size": 24, "num_layers": 3},
}
HYBRID = {
    **ATTENTION_AND_HIDDEN,
    "layer": {"num_layers": 6},
    "ffn": {"ffn_hidden_size": 24},
    "expert": {"num_moe_experts": 2},
    "expert_ffn": {"moe_ffn_hidden_size": 16},
    "shared_expert_ffn": SHARED,
    "mamba_head": {"mamba_num_heads": 4},
    "mamba_head_dim": {"mamba_head_dim": 6},
}
HYBRID["several"] = {size: value for target in HYBRID.values() for size, value in target.items()}
MAMBA_DIM, MAMBA_STATE = 8, 16
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GLM_SHARED = {"moe_shared_expert_intermediate_size": 40, "moe_ffn_hidden_size": 20}
# End of a Hugging Face name -> what each dim holds.
LLAMA_DIMS = {
    r"embed_tokens\.weight|lm_head\.weight": (None, "hidden"),
    r"(model\.norm|\w*layernorm)\.(weight|bias)": ("hidden",),
    r"q_proj\.weight": ("q", "hidden"),
    r"[kv]_proj\.weight": ("kv", "hidden"),
    r"o_proj\.weight": ("hidden", "q"),
    r"(gate|up)_proj\.weight": ("ffn", "hidden"),
    r"down_proj\.weight": ("hidden", "ffn"),
}
GLM_DIMS = {
    r"shared_experts\.(gate|up)_proj\.weight": ("shared_ffn", "hidden"),
    r"shared_experts\.down_proj\.weight": ("hidden", "shared_ffn"),
    r"mlp\.gate\.weight": ("expert", "hidden"),
    r"e_score_correction_bias": ("expert",),
    **LLAMA_DIMS,
    r"q_proj\.bias": ("q",),
    r"[kv]_proj\.bias": ("kv",),
    r"[qk]_norm\.weight": (None,),
}


QWEN2_MOE_DIMS = {
    r"shared_expert\.(gate|up)_proj\.weight": ("shared_ffn", "hidden"),
    r"shared_expert\.down_proj\.weight": ("hidden", "shared_ffn"),
    r"mlp\.shared_expert_gate\.weight": (None, "hidden"),
    r"mlp\.gate\.weight": ("expert", "hidden"),
    **LLAMA_DIMS,
    r"q_proj\.bias": ("q",),
    r"[kv]_proj\.bias": ("kv",),
}
QWEN_EXPERTS = {
    **SIZES,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
}
QWEN3_MOE_DIMS = {
    **LLAMA_DIMS,
    r"[qk]_norm\.weight": (None,),
    r"mlp\.gate\.weight": ("expert", "hidden"),
}
PHI3_DIMS = {
    **LLAMA_DIMS,
    r"qkv_proj\.weight": ("packed_qkv", "hidden"),
    r"gate_up_proj\.weight": ("packed_gate_up", "hidden"),
}
LONGROPE = {
    **SIZES,
    "hidden_size": 64,
    "pad_token_id": None,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.1, 1.5],
        "long_factor": [1.0, 2.0, 6.5],
    },
}
LONGROPE_TARGETS = {
    "ffn": {"ffn_hidden_size": 24},
    "layer": {"num_layers": 2},
    "head": {"hidden_size": 32, "num_attention_heads": 4},
    "several": {**DENSE["several"], "hidden_size": 32},
}
"""Of a hidden size that is heads x head dim, as transformers demands."""
# Of experts: all in one tensor, as (input, output), gate and up by turns.
GPT_OSS_DIMS = {
    **LLAMA_DIMS,
    r"q_proj\.bias": ("q",),
    r"[kv]_proj\.bias": ("kv",),
    r"o_proj\.bias": ("hidden",),
    r"sinks": ("head",),
    r"router\.weight": ("expert", "hidden"),
    r"router\.bias": ("expert",),
    r"gate_up_proj\[\]": ("hidden", "gate_up_by_turns"),
    r"gate_up_proj_bias\[\]": ("gate_up_by_turns",),
    r"experts\.down_proj\[\]": ("ffn", "hidden"),
    r"down_proj_bias\[\]": ("hidden",),
}
# Multi-latent attention: rotated channels are in neither of the sizes that are called head dim.
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "num_key_value_heads": 8,
}
LATENT_SIZES = {key: value for key, value in SIZES.items() if key != "head_dim"} | LATENT
LATENT_ROWS = {"latent_query": 20, "latent_kv": 22, "latent_out": 10}
"""Rows of a head."""
LATENT_DIMS = {
    r"(q|kv)_a_layernorm\.weight": (None,),
    r"self_attn\.q_proj\.weight": ("latent_query", "hidden"),
    r"q_b_proj\.weight": ("latent_query", None),
    r"(q_a_proj|kv_a_proj_with_mqa)\.weight": (None, "hidden"),
    r"kv_b_proj\.weight": ("latent_kv", None),
    r"self_attn\.o_proj\.weight": ("hidden", "latent_out"),
    **LLAMA_DIMS,
}
LATENT_MOE_DIMS = {
    r"shared_experts\.(gate|up)_proj\.weight": ("shared_ffn", "hidden"),
    r"shared_experts\.down_proj\.weight": ("hidden", "shared_ffn"),
    r"mlp\.gate\.weight": ("expert", "hidden"),
    **LATENT_DIMS,
}
ABOUT_0 = ("Nemotron", "Gemma2", "Gemma3", "Qwen3Next", "Qwen3_5", "Qwen3_5Moe")
"""Whose norms have weights that are the distance from 1."""
TINY = {"NemotronH": 1e-6, "DeepseekV3": 2e-6, "Glm4Moe": 2e-6}
"""Errors of scores that count for nothing, as a part of the largest score."""
PREDICTION_NORMS = ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")
PREDICTION_DIMS = {
    r"(enorm|hnorm|shared_head\.norm)\.weight": ("hidden",),
    r"eh_proj\.weight": ("hidden", "hidden_twice"),
    r"shared_head\.head\.weight": (None, "hidden"),
}
PREDICTION = {
    "hidden": {"hidden_size": 44},
    "layer": {"num_layers": 3},
    "several": {"hidden_size": 44, "num_layers": 3},
}
LATENT_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "mscale": 0.7,
    "mscale_all_dim": 1.2,
    "original_max_position_embeddings": 16,
}
LATENT_EXPERTS = {"moe_intermediate_size": 40}
TWO_SHARED = {"moe_shared_expert_intermediate_size": 32}
LATENT_HEADS = {"num_attention_heads": 4, "num_query_groups": 4}


LINEAR_SIZES = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 3,
}
# Rows of a query head are followed by those of its gate; of a gated delta net nothing is cut.
DELTA_DIMS = {
    r"linear_attn\.in_proj_\w+\.weight": (None, "hidden"),
    r"linear_attn\.out_proj\.weight": ("hidden", None),
    r"linear_attn\.(conv1d\.weight|A_log|dt_bias|norm\.weight)": (None,),
    r"[qk]_norm\.weight": (None,),
    r"q_proj\.weight": ("q_and_gate", "hidden"),
}
QWEN35_ROPE = {
    "rope_type": "default",
    "rope_theta": 1e6,
    "partial_rotary_factor": 0.5,
    "mrope_section": [1, 1, 0],
    "mrope_interleaved": True,
}
DELTA_LAYERS = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]


@dataclass(frozen=True)
class Case:
    """A tiny model of a family."""

    model: str
    fields: dict[str, Any]
    dims: dict[str, tuple[str | None, ...]]
    targets: dict[str, dict[str, int]] = field(default_factory=lambda: DENSE)
    sequence_parallel: bool = False
    """In the tensor-parallel layout."""
    prediction: bool = False
    """Whether there is a layer for multi-token prediction."""


CASES = {
    "llama": Case(
        "Llama", {**SIZES, "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": False}, LLAMA_DIMS
    ),
    "llama_tied": Case(
        "Llama",
        {**SIZES, "tie_word_embeddings": True},
        LLAMA_DIMS,
        {"several": DENSE["several"]},
        sequence_parallel=True,
    ),
    "llama_linear": Case(
        "Llama",
        {**SIZES, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        LLAMA_DIMS,
        {"several": DENSE["several"]},
    ),
    "mistral_dynamic": Case(
        "Mistral",
        {**SIZES, "sliding_window": None,
         "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        LLAMA_DIMS,
        {"several": DENSE["several"]},
    ),
    "qwen2_moe_windows": Case(
        "Qwen2Moe",
        {**QWEN_EXPERTS, "shared_expert_intermediate_size": 56, "use_sliding_window": True,
         "sliding_window": 5},
        QWEN2_MOE_DIMS,
        {"several": {**EXPERTS["several"], **SHARED}},
        sequence_parallel=True,
    ),
    "qwen2_yarn": Case(
        "Qwen2",
        {**SIZES, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
                                      "original_max_position_embeddings": 16, "beta_fast": 4.0,
                                      "truncate": False, "attention_factor": 1.5}},
        {**LLAMA_DIMS, r"q_proj\.bias": ("q",), r"[kv]_proj\.bias": ("kv",)},
        {name: DENSE[name] for name in ("hidden", "query_group", "several")},
    ),
    "mistral_window": Case(
        "Mistral",
        {**SIZES, "sliding_window": 5},
        LLAMA_DIMS,
        {name: DENSE[name] for name in ("head", "layer", "several")},
    ),
    # As Mistral-NeMo: heads x head_dim is not the hidden size.
    "mistral": Case(
        "Mistral",
        {**SIZES, "sliding_window": None, "rope_parameters": {"rope_type": "default",
                                                              "rope_theta": 1e6}},
        LLAMA_DIMS,
        {name: DENSE[name] for name in ("hidden", "several")},
    ),
    "mixtral": Case(
        "Mixtral",
        {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
        {
            **LLAMA_DIMS,
            r"block_sparse_moe\.gate\.weight": ("expert", "hidden"),
            r"w[13]\.weight": ("ffn", "hidden"),
            r"w2\.weight": ("hidden", "ffn"),
        },
        {**EXPERTS, "topk": {"moe_router_topk": 3}},
        sequence_parallel=True,
    ),
    "qwen2_moe": Case(
        "Qwen2Moe",
        {**QWEN_EXPERTS, "shared_expert_intermediate_size": 56},
        QWEN2_MOE_DIMS,
        {**EXPERTS, "shared_expert_ffn": SHARED, "topk": {"moe_router_topk": 3},
         "several": {**EXPERTS["several"], **SHARED, "moe_router_topk": 1}},
        sequence_parallel=True,
    ),
    "qwen2": Case(
        "Qwen2",
        {**SIZES, "tie_word_embeddings": True},
        {**LLAMA_DIMS, r"q_proj\.bias": ("q",), r"[kv]_proj\.bias": ("kv",)},
    ),
    "qwen3": Case("Qwen3", SIZES, {**LLAMA_DIMS, r"[qk]_norm\.weight": (None,)}),
    "qwen3_windows": Case(
        "Qwen3",
        {**SIZES, "use_sliding_window": True, "sliding_window": 6,
         "layer_types": ["sliding_attention", "full_attention"] * 2},
        {**LLAMA_DIMS, r"[qk]_norm\.weight": (None,)},
        {name: DENSE[name] for name in ("layer", "several")},
        sequence_parallel=True,
    ),
    "qwen3_yarn": Case(
        "Qwen3",
        {**SIZES, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
                                      "original_max_position_embeddings": 16}},
        {**LLAMA_DIMS, r"[qk]_norm\.weight": (None,)},
        {name: DENSE[name] for name in ("hidden", "several")},
        sequence_parallel=True,
    ),
    "ministral": Case(
        "Ministral",
        {**SIZES, "sliding_window": 5,
         "layer_types": ["sliding_attention", "full_attention"] * 2},
        LLAMA_DIMS,
        sequence_parallel=True,
    ),
    # Of 16 tokens those after the first 4 and after each 4 more have larger queries.
    "ministral3": Case(
        "Ministral3",
        {**SIZES, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "mscale": 1.0,
            "mscale_all_dim": 1.0, "original_max_position_embeddings": 4,
            "llama_4_scaling_beta": 0.5}},
        LLAMA_DIMS,
        sequence_parallel=True,
    ),
    "ministral3_window": Case(
        "Ministral3",
        {**SIZES, "sliding_window": 5},
        LLAMA_DIMS,
        {"several": DENSE["several"]},
    ),
    "phi3_longrope": Case(
        "Phi3",
        {**LONGROPE, "original_max_position_embeddings": 8},
        PHI3_DIMS,
        LONGROPE_TARGETS,
        sequence_parallel=True,
    ),
    "phi3_shortrope": Case(
        "Phi3",
        {**LONGROPE, "original_max_position_embeddings": 16},
        PHI3_DIMS,
        {"several": LONGROPE_TARGETS["several"]},
    ),
    "phi3_window": Case(
        "Phi3",
        {**SIZES, "pad_token_id": None, "sliding_window": 4},
        PHI3_DIMS,
        {"several": DENSE["several"]},
    ),
    "smollm3_windows": Case(
        "SmolLM3",
        {**SIZES, "no_rope_layers": [1, 0, 1, 0], "use_sliding_window": True, "sliding_window": 7,
         "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0},
        LLAMA_DIMS,
        {name: DENSE[name] for name in ("layer", "several")},
    ),
    "smollm3": Case(
        "SmolLM3",
        {**SIZES, "no_rope_layers": [1, 0, 1, 0], "pad_token_id": None, "bos_token_id": 0,
         "eos_token_id": 0},
        LLAMA_DIMS,
    ),
    "olmo2": Case(
        "Olmo2",
        {**SIZES, "pad_token_id": None, "eos_token_id": 0},
        {
            **LLAMA_DIMS,
            r"q_norm\.weight": ("q",),
            r"k_norm\.weight": ("kv",),
        },
        sequence_parallel=True,
    ),
    "granite": Case(
        "Granite",
        {**SIZES, "embedding_multiplier": 6.0, "attention_multiplier": 0.2,
         "residual_multiplier": 0.5, "logits_scaling": 4.0},
        LLAMA_DIMS,
        sequence_parallel=True,
    ),
    "gemma2": Case(
        "Gemma2",
        {**SIZES, "sliding_window": 5, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0,
         "final_logit_softcapping": 3.0},
        LLAMA_DIMS,
        EVEN,
        sequence_parallel=True,
    ),
    "gemma3": Case(
        "Gemma3",
        {**SIZES, "sliding_window": 5, "query_pre_attn_scalar": 20, "final_logit_softcapping": 4.0,
         "layer_types": ["sliding_attention", "full_attention"] * 2,
         "rope_parameters": {
             "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
             "sliding_attention": {"rope_type": "default", "rope_theta": 1e3}}},
        {**LLAMA_DIMS, r"[qk]_norm\.weight": (None,)},
        EVEN,
        sequence_parallel=True,
    ),
    "nemotron": Case("Nemotron", SIZES, LLAMA_DIMS, sequence_parallel=True),
    "phi3": Case(
        "Phi3",
        {**SIZES, "pad_token_id": None, "partial_rotary_factor": 0.5},
        {
            **LLAMA_DIMS,
            r"qkv_proj\.weight": ("packed_qkv", "hidden"),
            r"gate_up_proj\.weight": ("packed_gate_up", "hidden"),
        },
    ),
    "gpt2": Case(
        "GPT2LMHead",
        {"vocab_size": 101, "n_embd": 48, "n_layer": 4, "n_head": 4, "n_inner": 56,
         "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0},
        {
            r"c_fc\.weight": (None, "ffn"),
            r"c_fc\.bias": ("ffn",),
            r"mlp\.c_proj\.weight": ("ffn", None),
            r"(wte|wpe|ln_\w+|c_attn|c_proj)\.(weight|bias)": (None, None),
        },
        {
            "ffn": {"ffn_hidden_size": 24},
            "layer": {"num_layers": 2},
            "several": {"ffn_hidden_size": 24, "num_layers": 2},
        },
        sequence_parallel=True,
    ),
    "qwen3_moe": Case(
        "Qwen3Moe",
        {**QWEN_EXPERTS, "norm_topk_prob": True},
        QWEN3_MOE_DIMS,
        EXPERTS,
        sequence_parallel=True,
    ),
    # In a pipeline one stage has no experts, the other nothing else.
    "qwen3_moe_dense": Case(
        "Qwen3Moe",
        {**QWEN_EXPERTS, "norm_topk_prob": True, "mlp_only_layers": [0, 1]},
        QWEN3_MOE_DIMS,
        MIXED,
        sequence_parallel=True,
    ),
    "qwen2_moe_dense": Case(
        "Qwen2Moe",
        {**QWEN_EXPERTS, "shared_expert_intermediate_size": 56, "decoder_sparse_step": 2},
        QWEN2_MOE_DIMS,
        {"layer": MIXED["layer"], "several": {**MIXED["several"], **SHARED}},
        sequence_parallel=True,
    ),
    "deepseek_v3": Case(
        "DeepseekV3",
        {**LATENT_SIZES, **LATENT_EXPERTS, "first_k_dense_replace": 1, "num_mtp_layers": 0,
         "n_shared_experts": 2, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2,
         "topk_group": 1, "rope_parameters": LATENT_YARN},
        {**LATENT_MOE_DIMS, r"e_score_correction_bias": ("expert",)},
        {**MIXED, "head": LATENT_HEADS, "query_group": LATENT_HEADS,
         "expert": {"num_moe_experts": 4}, "expert_ffn": {"moe_ffn_hidden_size": 16, **TWO_SHARED},
         "shared_expert_ffn": {"moe_shared_expert_intermediate_size": 40},
         "several": {**MIXED["several"], **LATENT_HEADS, **TWO_SHARED, "num_moe_experts": 4}},
        sequence_parallel=True,
    ),
    "deepseek_v2": Case(
        "DeepseekV2",
        {**LATENT_SIZES, **LATENT_EXPERTS, "first_k_dense_replace": 1, "q_lora_rank": None,
         "n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
         "routed_scaling_factor": 1.5},
        LATENT_MOE_DIMS,
        {"hidden": {"hidden_size": 40},
         "several": {**MIXED["several"], **LATENT_HEADS, "hidden_size": 40,
                     "moe_shared_expert_intermediate_size": 16}},
        sequence_parallel=True,
    ),
    "deepseek_v3_dense": Case(
        "DeepseekV3",
        {**LATENT_SIZES, "first_k_dense_replace": 4, "num_mtp_layers": 0,
         "rope_parameters": LATENT_YARN},
        LATENT_DIMS,
        {**DENSE, "head": LATENT_HEADS, "query_group": LATENT_HEADS,
         "several": {**DENSE["several"], **LATENT_HEADS}},
    ),
    "deepseek_v2_dense": Case(
        "DeepseekV2",
        {**LATENT_SIZES, "first_k_dense_replace": 4, "q_lora_rank": None},
        LATENT_DIMS,
        {"hidden": {"hidden_size": 40},
         "several": {**DENSE["several"], **LATENT_HEADS, "hidden_size": 40}},
        sequence_parallel=True,
    ),
    "glm4_moe": Case(
        "Glm4Moe",
        {**SIZES, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
         "n_shared_experts": 2, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5,
         "first_k_dense_replace": 1, "attention_bias": True, "use_qk_norm": True,
         "num_nextn_predict_layers": 0},
        GLM_DIMS,
        {**MIXED, "expert": {"num_moe_experts": 4}, "shared_expert_ffn": GLM_SHARED,
         "several": {**MIXED["several"], **GLM_SHARED, "num_moe_experts": 4}},
        sequence_parallel=True,
    ),
    "glm4_moe_mtp": Case(
        "Glm4Moe",
        {**SIZES, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
         "first_k_dense_replace": 1, "attention_bias": True, "use_qk_norm": True,
         "num_nextn_predict_layers": 1},
        {**PREDICTION_DIMS, **GLM_DIMS},
        PREDICTION,
        sequence_parallel=True,
        prediction=True,
    ),
    "deepseek_v3_mtp": Case(
        "DeepseekV3",
        {**LATENT_SIZES, **LATENT_EXPERTS, "first_k_dense_replace": 1, "num_mtp_layers": 1,
         "n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
         "topk_group": 1, "rope_parameters": LATENT_YARN},
        {**PREDICTION_DIMS, **LATENT_MOE_DIMS, r"e_score_correction_bias": ("expert",)},
        PREDICTION,
        sequence_parallel=True,
        prediction=True,
    ),
    "glm4_moe_air": Case(
        "Glm4Moe",
        {**SIZES, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
         "first_k_dense_replace": 0, "num_nextn_predict_layers": 0},
        GLM_DIMS,
        {"topk": {"moe_router_topk": 4},
         "several": {**EXPERTS["several"], "moe_shared_expert_intermediate_size": 32}},
        sequence_parallel=True,
    ),
    "gpt_oss": Case(
        "GptOss",
        {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5,
         "swiglu_limit": 0.5, "rope_parameters": {
             "rope_type": "yarn", "rope_theta": 1.5e5, "factor": 4.0, "truncate": False,
             "original_max_position_embeddings": 16}},
        GPT_OSS_DIMS,
        EXPERTS,
        sequence_parallel=True,
    ),
    "nemotron_h": Case(
        "NemotronH",
        {"vocab_size": 101, "hybrid_override_pattern": "ME*-M-ME", "hidden_size": 48,
         "intermediate_size": 56, "num_attention_heads": 8, "num_key_value_heads": 4,
         "head_dim": HEAD_DIM, "max_position_embeddings": 64, "mamba_num_heads": 8,
         "mamba_head_dim": MAMBA_DIM, "n_groups": 2, "ssm_state_size": MAMBA_STATE,
         "n_routed_experts": 4, "moe_intermediate_size": 40, "num_experts_per_tok": 2,
         "moe_shared_expert_intermediate_size": 56, "routed_scaling_factor": 2.5},
        {
            r"mixer\.norm\.weight": ("mamba_inner",),
            r"norm(_f)?\.weight": ("hidden",),
            r"embeddings\.weight|lm_head\.weight": (None, "hidden"),
            r"in_proj\.weight": ("mamba_in", "hidden"),
            r"conv1d\.weight": ("mamba_conv", None, None),
            r"conv1d\.bias": ("mamba_conv",),
            r"A_log|D|dt_bias": ("mamba_head",),
            r"out_proj\.weight": ("hidden", "mamba_inner"),
            r"gate\.weight": ("expert", "hidden"),
            r"e_score_correction_bias": ("expert",),
            r"shared_experts\.up_proj\.weight": ("shared_ffn", "hidden"),
            r"shared_experts\.down_proj\.weight": ("hidden", "shared_ffn"),
            **LLAMA_DIMS,
        },
        HYBRID,
        sequence_parallel=True,
    ),
    "qwen3_next": Case(
        "Qwen3Next",
        {**QWEN_EXPERTS, **LINEAR_SIZES, "shared_expert_intermediate_size": 56,
         "partial_rotary_factor": 0.5, "layer_types": DELTA_LAYERS, "mlp_only_layers": [0]},
        {**QWEN2_MOE_DIMS, **DELTA_DIMS},
        {**MIXED, "shared_expert_ffn": SHARED, "several": {**MIXED["several"], **SHARED}},
        sequence_parallel=True,
    ),
    "qwen3_5": Case(
        "Qwen3_5",
        {**SIZES, **LINEAR_SIZES, "rope_parameters": QWEN35_ROPE, "layer_types": DELTA_LAYERS},
        {**LLAMA_DIMS, **DELTA_DIMS},
        {name: DENSE[name] for name in ("hidden", "ffn", "layer", "several")},
    ),
    "qwen3_5_moe": Case(
        "Qwen3_5Moe",
        {**QWEN_EXPERTS, **LINEAR_SIZES, "shared_expert_intermediate_size": 56,
         "rope_parameters": QWEN35_ROPE, "layer_types": DELTA_LAYERS},
        {**QWEN2_MOE_DIMS, **DELTA_DIMS},
        {"several": {**EXPERTS["several"], **SHARED}},
        sequence_parallel=True,
    ),
}  # fmt: skip


ROUTED = [
    name
    for name, case in CASES.items()
    if "num_moe_experts" in case.targets["several"] or case.prediction
]


# ---------------------------------------------------------------- a family's models


@dataclass
class Models:
    """A random model, imported, pruned in every way and exported again; logits of transformers."""

    case: Case
    home: Path
    ids: torch.Tensor
    want: dict[str, torch.Tensor]

    def folders(self) -> dict[str, str]:
        return {name: str(self.home / name) for name in self.want}


def architecture(case: Case) -> str:
    return case.model + ("Model" if case.model.endswith("LMHead") else "ForCausalLM")


def write_random(case: Case, folder: Path) -> None:
    torch.manual_seed(0)
    name = case.model.removesuffix("LMHead")
    name = f"{name}Text" if name in ("Gemma3", "Qwen3_5", "Qwen3_5Moe") else name
    config = getattr(transformers, f"{name}Config")(**deepcopy(case.fields))
    model = getattr(transformers, architecture(case))(config).eval()
    biases = ((name, b) for name, b in model.named_buffers() if "e_score_correction_bias" in name)
    for name, parameter in [*model.named_parameters(), *biases]:
        # Norm weights around 1, or around 0 where that is what they are the distance from.
        norm = re.search(r"norm\w*\.weight|ln_\w\.weight", name)
        about_0 = case.model in ABOUT_0 and "linear_attn" not in name
        around = 1.0 if norm and not about_0 else 0.0
        torch.nn.init.normal_(parameter, mean=around, std=0.15)
    model.save_pretrained(folder)
    if case.prediction:
        add_prediction_layer(folder / "model.safetensors", case.fields["num_hidden_layers"])


def add_prediction_layer(file: Path, layers: int) -> None:
    """A random layer for multi-token prediction, like the last one inside, as it is published."""
    tensors, last, new = load_file(file), f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    hidden = tensors["model.norm.weight"].size(0)
    shapes: dict[str, tuple[int, ...]] = {new + name: (hidden,) for name in PREDICTION_NORMS}
    shapes[new + "eh_proj.weight"] = (hidden, 2 * hidden)
    inner = {name: t for name, t in tensors.items() if name.startswith(last)}
    shapes |= {name.replace(last, new): tuple(tensor.shape) for name, tensor in inner.items()}
    for name, shape in shapes.items():
        around = 1.0 if "norm" in name else 0.0
        tensors[name] = around + 0.15 * torch.randn(shape)
    tensors[new + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[new + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})


def transformers_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids).logits


def write_scores(folder: Path, config: ModelConfig) -> None:
    """Random scores of every axis as a result folder."""
    from nemo_minitron.checkpoint.artifact import output_folder
    from nemo_minitron.pruning.scores import Scores, model_meta

    torch.manual_seed(1)
    layers, experts = config.num_layers, config.num_moe_experts
    shared = config.moe_shared_expert_intermediate_size
    scores = Scores(
        hidden=torch.rand(config.hidden_size),
        head=torch.rand(layers, config.num_attention_heads),
        layer=torch.rand(layers),
    )
    if experts:
        scores["expert"] = torch.rand(layers, experts)
        scores["expert_ffn"] = torch.rand(layers, experts, axis_size(config, "expert_ffn"))
    if config.mamba_num_heads:
        scores["mamba_head"] = torch.rand(
            layers, config.mamba_num_heads, axis_size(config, "mamba_head_dim")
        )
    if has_axis(config, AXES["ffn"]):
        scores["ffn"] = torch.rand(layers, config.ffn_hidden_size)
    if shared:
        scores["shared_expert_ffn"] = torch.rand(layers, shared)
    scores.meta = {"model": model_meta(config), "layers": list(range(layers))}
    cfg = ImportanceConfig(checkpoint="-", output_dir=str(folder))
    cfg.data.path = "-"
    with output_folder(cfg, "importance", {}) as work:
        scores.save(work)


def make_models(case: Case, home: Path) -> Models:
    ids = token_batch(SAMPLES, LENGTH, 101)[:, :LENGTH].contiguous()
    write_random(case, home / "hf")
    importing = ImportConfig(source=str(home / "hf"), output_dir=str(home / "whole"))
    import_.check(importing)
    import_.run(importing)
    write_scores(home / "scores", ModelConfig.load(home / "whole" / "checkpoint"))
    want = {"whole": transformers_logits(home / "hf", ids)}
    for name, target in case.targets.items():
        cfg = PruneConfig(
            checkpoint=str(home / "whole"),
            importance=str(home / "scores"),
            output_dir=str(home / name),
            pruning=PruningConfig(target=TargetConfig(**target)),
        )
        prune.check(cfg)
        prune.run(cfg)
        out = home / f"{name}_hf"
        export.run(ExportConfig(checkpoint=str(home / name), output_dir=str(out)))
        want[name] = transformers_logits(out, ids)
    return Models(case, home, ids, want)


@pytest.fixture(scope="module", params=CASES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(CASES[request.param], tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def alone(ranks: WorkerPool, models: Models) -> dict[str, Any]:
    """Everything at one rank."""
    plan = Plan.load(models.home / "several")
    return ranks.run(1, family_at, models.folders(), plan, models.ids, layout())[0]


def check_logits(found: dict[str, Any], models: Models) -> None:
    for name, got in found["logits"].items():
        if got is not None:  # not the last stage
            error = (got[..., :101] - models.want[name]).abs().max()
            assert error < 2e-4, f"{name}: {error:.2e}"
    assert found["differ"] == []


# ---------------------------------------------------------------- what must hold


def test_export_gives_the_very_tensors_back(models: Models) -> None:
    out = models.home / "out"
    export.run(ExportConfig(checkpoint=str(models.home / "whole"), output_dir=str(out)))
    before, after = (load_file(f / "model.safetensors") for f in (models.home / "hf", out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(transformers_logits(out, models.ids), models.want["whole"])


def test_alone(alone: dict[str, Any], models: Models) -> None:
    check_logits(alone, models)


@pytest.mark.parametrize("kind", ["tp2", "pp2"])
def test_at_layout(ranks: WorkerPool, models: Models, alone: dict[str, Any], kind: str) -> None:
    """Logits, scores and what live pruning leaves."""
    sp = models.case.sequence_parallel
    parallel = layout(tp=2, sp=sp) if kind == "tp2" else layout(pp=2)
    check_layout(ranks, models, alone, parallel)


@pytest.mark.parametrize("models", ROUTED, indirect=True)
def test_experts_on_two_ranks(ranks: WorkerPool, models: Models, alone: dict[str, Any]) -> None:
    """Logits and checkpoints are the same under expert parallelism."""
    check_layout(ranks, models, alone, layout(dp=2, ep=2))


def check_layout(
    ranks: WorkerPool, models: Models, alone: dict[str, Any], parallel: ParallelConfig
) -> None:
    plan = Plan.load(models.home / "several")
    for found in ranks.run(2, family_at, models.folders(), plan, models.ids, parallel):
        check_logits(found, models)
        for axis, want in alone["scores"].items():
            # The square of a ReLU just above 0 has a large relative error, and counts for nothing;
            # so has the product of a channel near 0 in an expert that few tokens reach.
            tiny = TINY.get(models.case.model, 0.0) * float(want.max()) + 1e-9
            torch.testing.assert_close(found["scores"][axis], want, rtol=1e-5, atol=tiny)


def missing_rows(names: list[str], config: ModelConfig, family: Any) -> str:
    """Parameters of Megatron's model and of the table that the other does not have."""
    table = {name for name, _, _ in family.parameters(config)}
    lacks, extra = sorted(set(names) - table), sorted(table - set(names))
    return f"the table lacks {lacks}, the model {extra}" if lacks or extra else ""


def test_every_parameter_has_a_row(alone: dict[str, Any], models: Models) -> None:
    config = ModelConfig.load(models.home / "whole" / "checkpoint")
    assert missing_rows(alone["names"], config, family_of(config)) == ""


def test_a_forgotten_row_is_named(alone: dict[str, Any], models: Models) -> None:
    config = ModelConfig.load(models.home / "whole" / "checkpoint")
    family = family_of(config)
    for row in (row for row in family.rows if row.when(config)):
        shorter = replace(family, rows=tuple(other for other in family.rows if other != row))
        having = (i for i, kinds in enumerate(kinds_of(config)) if row.kind in kinds)
        first = len(kinds_of(config)) - 1 if row.predicts else next(having, None)
        if row.predicts and row.kind not in kinds_of(config)[-1]:
            continue
        if first is None:
            continue  # of dense layers, where all layers have experts
        name = row.name.format(layer=first, expert=0, mtp=0)
        assert f"'{name}'" in missing_rows(alone["names"], config, shorter)
        with pytest.raises(ValueError, match=f"{re.escape(name)} has no row"):
            shorter.find(name, config)


def kept_indices(kind: str, plan: Plan, layer: int, expert: int | None, case: Case) -> list[int]:
    """Rows (or columns) of a Hugging Face tensor that a plan keeps."""

    def rows(blocks: list[int], first: int = 0, each: int = HEAD_DIM) -> list[int]:
        return [first + b * each + i for b in blocks for i in range(each)]

    if kind == "hidden":
        return plan["hidden"]
    if kind == "hidden_twice":
        width = case.fields["hidden_size"]
        return plan["hidden"] + [width + index for index in plan["hidden"]]
    if kind.startswith("mamba"):
        return kept_of_mamba(kind, plan, layer, case)
    heads, groups = plan["head"][layer], plan["query_group"][layer]
    if kind in LATENT_ROWS:
        return rows(heads, each=LATENT_ROWS[kind])
    if kind == "q":
        return rows(heads)
    if kind == "q_and_gate":
        return rows(heads, each=2 * HEAD_DIM)
    if kind == "kv":
        return rows(groups)
    if kind == "packed_qkv":
        queries, keys = (case.fields[f"num_{x}_heads"] for x in ("attention", "key_value"))
        k, v = queries * HEAD_DIM, (queries + keys) * HEAD_DIM
        return rows(heads) + rows(groups, k) + rows(groups, v)
    if kind == "head":
        return heads
    if kind == "expert":
        return plan["expert"][layer]
    if kind == "shared_ffn":
        return plan["shared_expert_ffn"][layer]
    ffn = plan["ffn"][layer] if expert is None else plan["expert_ffn"][layer][expert]
    if kind == "gate_up_by_turns":
        return rows(ffn, each=2)
    if kind == "packed_gate_up":
        return ffn + [case.fields["intermediate_size"] + i for i in ffn]
    assert kind == "ffn"
    return ffn


def kept_of_mamba(kind: str, plan: Plan, layer: int, case: Case) -> list[int]:
    """Cut the tensors of a Mamba layer, in which z, x, B, C and dt follow one another."""
    heads, channels = plan["mamba_head"][layer], plan["mamba_head_dim"][layer]
    x = [head * MAMBA_DIM + channel for head in heads for channel in channels]
    inner = case.fields["mamba_num_heads"] * MAMBA_DIM
    states = list(range(2 * case.fields["n_groups"] * MAMBA_STATE))
    if kind == "mamba_head":
        return heads
    if kind == "mamba_inner":
        return x
    if kind == "mamba_conv":
        return x + [inner + row for row in states]
    assert kind == "mamba_in"
    after = 2 * inner + len(states)
    return [
        *x,
        *(inner + row for row in x),
        *(2 * inner + row for row in states),
        *(after + head for head in heads),
    ]


def each_expert(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors with ``name[i]`` for each expert in place of one for all experts."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if re.search(r"experts\.\w+$", name):
            found |= {f"{name}[{index}]": part for index, part in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


def test_pruned_exports_are_slices(models: Models) -> None:
    """Pruned exports are slices of the Hugging Face tensors, along one axis and several."""
    whole = each_expert(load_file(models.home / "hf" / "model.safetensors"))
    for target in models.case.targets:
        plan = Plan.load(models.home / target)
        exported = each_expert(load_file(models.home / f"{target}_hf" / "model.safetensors"))
        assert exported
        for name, got in exported.items():
            old, layer, expert, after = name, 0, None, False
            if found := re.search(r"(layers|h)\.(\d+)\.", name):
                layer = int(found[2])
                after = layer >= len(plan.layers)  # which is for multi-token prediction
                number = models.case.fields["num_hidden_layers"] if after else plan.layers[layer]
                old = name.replace(found[0], f"{found[1]}.{number}.", 1)
            if found := re.search(r"(experts\.|\[)(\d+)([.\]])", name):
                expert = int(found[2])
                kept = expert if after else plan["expert"][layer][expert]
                old = old.replace(found[0], f"{found[1]}{kept}{found[3]}")
            want, whose = whole[old], re.sub(r"\[\d+\]", "[]", name)
            ends = models.case.dims.items()
            dims = next(dims for end, dims in ends if re.search(rf"\b({end})$", whose))
            for dim, kind in enumerate(dims):
                if kind is not None and (not after or kind.startswith("hidden")):
                    kept = kept_indices(kind, plan, layer, expert, models.case)
                    want = want.index_select(dim, torch.tensor(kept))
            assert torch.equal(got, want), f"{target}: {name}"


def test_all_families_are_tested() -> None:
    classes = [architecture(case) for case in CASES.values()]
    assert {family_of_hf({"architectures": [name]}).name for name in classes} == FAMILIES.keys()
