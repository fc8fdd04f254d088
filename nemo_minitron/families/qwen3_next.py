"""Qwen3-Next: gated delta nets beside gated attention, and the experts of Qwen2-MoE.

Hugging Face keeps the projections of a gated delta net in two tensors, each with the rows of one
key head after those of another.
"""

from dataclasses import replace
from typing import Any

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families import delta_net, llama, qwen2_moe
from nemo_minitron.families.config_json import check_keys
from nemo_minitron.families.experts import beside_dense
from nemo_minitron.families.rope import read_rope
from nemo_minitron.families.table import Family

_PROJECTIONS = {"in_proj_qkvz": "linear_qkvz", "in_proj_ba": "linear_ba"}
ROWS = beside_dense(delta_net.dense_rows(_PROJECTIONS), qwen2_moe.ROUTED)

# What transformers' Qwen3NextConfig takes where config.json says nothing.
_DEFAULTS = {
    **delta_net.DEFAULTS,
    "num_key_value_heads": 2,
    "intermediate_size": 5632,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "norm_topk_prob": True,
}
READS = (
    (qwen2_moe.ROUTED_READS - {"sliding_window", "use_sliding_window", "max_window_layers"})
    | delta_net.READS
    | {"shared_expert_intermediate_size"}
)


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the Megatron sizes of a Hugging Face Qwen3-Next config.

    Raises:
        ValueError: the config asks for something this table does not hold.
    """
    check_keys("qwen3_next", hf, READS)
    known = {**_DEFAULTS, **hf}
    qwen2_moe.refuse(known)
    return replace(
        llama.dense(known, read_rope(known, share=delta_net.ROTATED)),
        family="qwen3_next",
        moe_shared_expert_intermediate_size=known["shared_expert_intermediate_size"],
        moe_shared_expert_gate=True,
        hf=dict(hf),
        **delta_net.read_layers(known),
        **qwen2_moe.router(known),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a (pruned) model."""
    written = {
        **qwen2_moe.to_hf_routed(config),
        **delta_net.written_layers(config),
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "shared_expert_intermediate_size": config.moe_shared_expert_intermediate_size,
    }
    return {key: value for key, value in written.items() if "window" not in key}


QWEN3_NEXT = Family(
    "qwen3_next",
    {"Qwen3NextForCausalLM": "qwen3_next"},
    ROWS,
    from_hf,
    to_hf,
    READS,
    models="Qwen3-Next",
    refuses=(*qwen2_moe.REFUSES, *delta_net.REFUSES),
    layer_spec=delta_net.LAYER_SPEC,
    left_out=delta_net.LEFT_OUT,
)
