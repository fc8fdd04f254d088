"""Phi-3, Phi-3.5 and Phi-4: Llama's network with fused weights, maybe partly rotated heads.

Hugging Face keeps query, key and value in one matrix, all queries first; Megatron interleaves them
per query group (form ``packed_qkv``). Gate and up are fused as Megatron fuses them.
"""

from dataclasses import replace
from typing import Any

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families import llama, windows
from nemo_minitron.families.config_json import check_keys
from nemo_minitron.families.rope import read_rope
from nemo_minitron.families.table import Family, Row

_HF_LAYER = "model.layers.{layer}."


def _fused(row: Row) -> Row:
    if row.name.endswith("linear_qkv.weight"):
        return replace(row, hf=(_HF_LAYER + "self_attn.qkv_proj.weight",), hf_form="packed_qkv")
    if row.name.endswith("linear_fc1.weight"):
        return replace(row, hf=(_HF_LAYER + "mlp.gate_up_proj.weight",))
    return row


ROWS = tuple(map(_fused, llama.ROWS))

# What transformers' Phi3Config takes where config.json says nothing.
_DEFAULTS = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
READS = llama.READS | {"rope_percent"}


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Megatron sizes of a Hugging Face Phi-3 config.

    Raises:
        ValueError: the config asks for something this table does not hold.
    """
    check_keys("phi3", hf, READS)
    known = {**_DEFAULTS, **hf}
    rope = read_rope(known)
    if rope.scaling is not None:
        kind = rope.scaling["rope_type"]
        raise ValueError(
            f"rope_scaling type '{kind}' is not supported: transformers' Phi-3 has none"
        )
    dense = llama.dense(known, rope)
    return replace(dense, family="phi3", window_size=windows.everywhere(known), hf=dict(hf))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json of a (pruned) model."""
    return {
        **llama.to_hf(config),
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "sliding_window": windows.width_of(config),
        "partial_rotary_factor": config.rotary_percent,
        "original_max_position_embeddings": config.max_position_embeddings,
    }


PHI3 = Family(
    "phi3",
    {"Phi3ForCausalLM": "phi3"},
    ROWS,
    from_hf,
    to_hf,
    READS,
    models="Phi-3, Phi-3.5, Phi-4 (short context)",
    refuses=(
        "`rope_scaling` of type `longrope` (the 128k variants): Megatron-Core's GPT model does not "
        "have it",
    ),
)
