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
_DEFAULTS = {
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
}
READS = llama.READS | {"rope_percent"}
# In published files, read by nobody, and nothing in the sense of their names.
_NEUTRAL = {"full_attn_mod": (1,), "interpolate_factor": (1,), "lm_head_bias": (False,)}
_ORIGINAL = "original_max_position_embeddings"
_ROPE_DICTIONARIES = ("rope_scaling", "rope_parameters")


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the Megatron sizes of a Hugging Face Phi-3 config.

    Raises:
        ValueError: the config asks for something this table does not hold.
    """
    check_keys("phi3", hf, READS, _NEUTRAL)
    known = {**_DEFAULTS, **hf}
    rope = read_rope({**known, **{key: _renamed(known.get(key)) for key in _ROPE_DICTIONARIES}})
    if rope.scaling is not None and rope.scaling["rope_type"] != "longrope":
        kind = rope.scaling["rope_type"]
        raise ValueError(
            f"rope_scaling type '{kind}' is not supported: transformers' Phi-3 has longrope alone"
        )
    dense = llama.dense(known, rope)
    return replace(dense, family="phi3", window_size=windows.everywhere(known), hf=dict(hf))


def _renamed(scaling: Any) -> Any:
    """Rename ``su``, as the first files of Phi-3 call LongRoPE."""
    if not isinstance(scaling, dict):
        return scaling
    return {key: "longrope" if value == "su" else value for key, value in scaling.items()}


def _check_heads(config: ModelConfig) -> None:
    """Refuse head sizes for which transformers computes other LongRoPE frequencies.

    Raises:
        ValueError: names the sizes and the keys.
    """
    hidden, heads, width = config.hidden_size, config.num_attention_heads, config.kv_channels
    if config.rope_scaling is not None and hidden // heads != width:
        raise ValueError(
            f"hidden_size={hidden} by num_attention_heads={heads} must be kv_channels={width} in "
            "a Phi-3 with rope_scaling of type longrope, as transformers demands; set "
            f"pruning.target.hidden_size={heads * width} and pruning.target.num_attention_heads="
            f"{heads}, or others that fit"
        )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a (pruned) model.

    Raises:
        ValueError: transformers' config class does not take the sizes.
    """
    _check_heads(config)
    positions = config.max_position_embeddings
    return {
        **llama.to_hf(config),
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "sliding_window": windows.width_of(config),
        "partial_rotary_factor": config.rotary_percent,
        "original_max_position_embeddings": (config.rope_scaling or {}).get(_ORIGINAL, positions),
    }


PHI3 = Family(
    "phi3",
    {"Phi3ForCausalLM": "phi3"},
    ROWS,
    from_hf,
    to_hf,
    READS,
    models="Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
    refuses=(
        "`rope_scaling` other than `longrope`: transformers' Phi-3 has no other",
        "with `longrope` a hidden size and heads that do not go with the head dim, as transformers",
        "with `longrope` texts that grow beyond `original_max_position_embeddings` while they are "
        "written: all earlier tokens would be rotated anew",
    ),
)
