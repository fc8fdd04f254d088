"""Qwen3.5 (text), dense and with experts: Qwen3-Next with each projection in a tensor of its own.

Every layer of the one has an MLP, every layer of the other experts, and the weights of those that
the router picks sum to 1. Images would have positions in three directions, in sections of the
rotated channels; a token of a text has the same position in all three, so these change nothing.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families import delta_net, llama, qwen2_moe
from nemo_minitron.families.config_json import check_keys, words
from nemo_minitron.families.experts import beside_dense
from nemo_minitron.families.rope import REFUSED_SCALINGS, read_rope
from nemo_minitron.families.table import Family

_PROJECTIONS = {
    "in_proj_qkv": "linear_conv",
    "in_proj_z": "linear_inner",
    "in_proj_b": "linear_value_head",
    "in_proj_a": "linear_value_head",
}
ROWS = delta_net.dense_rows(_PROJECTIONS)
ROUTED_ROWS = beside_dense(ROWS, qwen2_moe.ROUTED)

# Of images, or how it is computed, or of layers that transformers does not have.
_NO_MATTER = words("mamba_ssm_dtype mtp_num_hidden_layers mtp_use_dedicated_embeddings")
_SECTIONS = ("mrope_section", "mrope_interleaved")
READS = (llama.READS - {"sliding_window"}) | delta_net.READS | _NO_MATTER | {"attn_output_gate"}
_EXPERT_KEYS = words(
    "num_experts num_local_experts num_experts_per_tok moe_intermediate_size "
    "shared_expert_intermediate_size"
)
ROUTED_READS = READS | _EXPERT_KEYS
# What transformers' configs take where config.json says nothing.
_DEFAULTS = {**delta_net.DEFAULTS, "num_key_value_heads": 4, "intermediate_size": 12288}
_ROUTED_DEFAULTS = {
    **delta_net.DEFAULTS,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts_per_tok": 8,
    "num_experts": 256,
}


def _without_sections(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values without the keys about positions of images."""

    def plain(value: Any) -> Any:
        keep = isinstance(value, dict)
        return {k: v for k, v in value.items() if k not in _SECTIONS} if keep else value

    return {
        key: plain(value) if key in ("rope_scaling", "rope_parameters") else value
        for key, value in hf.items()
    }


def _network(family: str, known: Mapping[str, Any]) -> ModelConfig:
    """Return a config.json's fields but the experts', defaults filled in.

    Raises:
        ValueError: the config asks for something this table does not hold.
    """
    if known.get("attn_output_gate", True) is not True:
        raise ValueError(
            f"config.json attn_output_gate={known['attn_output_gate']} is not supported: "
            "transformers gates what attention puts out; only true"
        )
    said = _without_sections(known)
    return replace(
        llama.dense(said, read_rope(said, share=delta_net.ROTATED)),
        family=family,
        **delta_net.read_layers(said),
    )


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the Megatron sizes of a Hugging Face Qwen3.5 config (text).

    Raises:
        ValueError: the config asks for something this table does not hold.
    """
    check_keys("qwen3_5", hf, READS)
    return replace(_network("qwen3_5", {**_DEFAULTS, **hf}), hf=dict(hf))


def routed_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the Megatron sizes of a Hugging Face Qwen3.5-MoE config (text).

    Raises:
        ValueError: the config asks for something this table does not hold.
    """
    check_keys("qwen3_5_moe", hf, ROUTED_READS)
    known = {**_ROUTED_DEFAULTS, **hf, "norm_topk_prob": True}
    known["intermediate_size"] = known["moe_intermediate_size"]  # no layer has an MLP
    qwen2_moe.refuse(known)
    return replace(
        _network("qwen3_5_moe", known),
        moe_shared_expert_intermediate_size=known["shared_expert_intermediate_size"],
        moe_shared_expert_gate=True,
        hf=dict(hf),
        **qwen2_moe.router(known),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a (pruned) model."""
    return {
        **llama.to_hf(replace(config, hf=_carried(config, READS))),
        **delta_net.written_layers(config),
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
    }


def routed_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a (pruned) model with experts."""
    written = {
        **llama.to_hf(replace(config, hf=_carried(config, ROUTED_READS))),
        **delta_net.written_layers(config),
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "model_type": "qwen3_5_moe_text",
        "num_experts": config.num_moe_experts,
        "num_experts_per_tok": config.moe_router_topk,
        "moe_intermediate_size": config.moe_ffn_hidden_size,
        "shared_expert_intermediate_size": config.moe_shared_expert_intermediate_size,
    }
    del written["intermediate_size"]
    return written


def _carried(config: ModelConfig, reads: frozenset[str]) -> dict[str, Any]:
    return {key: value for key, value in config.hf.items() if key not in reads - _NO_MATTER}


_REFUSES = (*REFUSED_SCALINGS, *delta_net.REFUSES, "images: only the text model opens")
QWEN3_5 = Family(
    "qwen3_5",
    {"Qwen3_5ForCausalLM": "qwen3_5_text"},
    ROWS,
    from_hf,
    to_hf,
    READS,
    models="Qwen3.5 (text)",
    refuses=_REFUSES,
    layer_spec=delta_net.LAYER_SPEC,
    left_out=delta_net.LEFT_OUT,
)
QWEN3_5_MOE = Family(
    "qwen3_5_moe",
    {"Qwen3_5MoeForCausalLM": "qwen3_5_moe_text"},
    ROUTED_ROWS,
    routed_from_hf,
    routed_to_hf,
    ROUTED_READS,
    models="Qwen3.5 with experts (text)",
    refuses=(*_REFUSES, "one expert per token: Megatron-Core's router needs two"),
    layer_spec=delta_net.LAYER_SPEC,
    left_out=delta_net.LEFT_OUT,
)
