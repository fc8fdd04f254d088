"""Llama 2 and 3.x: RMSNorm, rotary positions, gated SiLU MLP, grouped-query attention.

Mistral is the same network under another name, with sliding windows where it has them.
"""

from dataclasses import replace
from typing import Any

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families import windows
from nemo_minitron.families.config_json import check_keys, words
from nemo_minitron.families.rope import REFUSED_SCALINGS, ROPE_KEYS, Rope, read_rope
from nemo_minitron.families.table import Family, Row

_LAYER = "decoder.layers.{layer}."
_HF_LAYER = "model.layers.{layer}."


def untied(config: ModelConfig) -> bool:
    """Whether the output layer has a weight of its own."""
    return not config.share_embeddings_and_output_weights


ROWS = (
    Row(
        "embedding.word_embeddings.weight",
        ("vocab", "hidden"),
        0,
        ("model.embed_tokens.weight",),
    ),
    Row("decoder.final_layernorm.weight", ("hidden",), None, ("model.norm.weight",)),
    Row("output_layer.weight", ("vocab", "hidden"), 0, ("lm_head.weight",), when=untied),
    Row(
        _LAYER + "input_layernorm.weight",
        ("hidden",),
        None,
        (_HF_LAYER + "input_layernorm.weight",),
        te_name=_LAYER + "self_attention.linear_qkv.layer_norm_weight",
    ),
    Row(
        _LAYER + "self_attention.linear_qkv.weight",
        ("qkv", "hidden"),
        0,
        tuple(_HF_LAYER + f"self_attn.{x}_proj.weight" for x in "qkv"),
    ),
    Row(
        _LAYER + "self_attention.linear_proj.weight",
        ("hidden", "head"),
        1,
        (_HF_LAYER + "self_attn.o_proj.weight",),
    ),
    Row(
        _LAYER + "pre_mlp_layernorm.weight",
        ("hidden",),
        None,
        (_HF_LAYER + "post_attention_layernorm.weight",),
        te_name=_LAYER + "mlp.linear_fc1.layer_norm_weight",
    ),
    Row(
        _LAYER + "mlp.linear_fc1.weight",
        ("gate_up", "hidden"),
        0,
        (_HF_LAYER + "mlp.gate_proj.weight", _HF_LAYER + "mlp.up_proj.weight"),
    ),
    Row(
        _LAYER + "mlp.linear_fc2.weight",
        ("hidden", "ffn"),
        1,
        (_HF_LAYER + "mlp.down_proj.weight",),
    ),
)

SINKS = Row(
    _LAYER + "self_attention.core_attention.softmax_offset",
    ("one_per_head",),
    0,
    (_HF_LAYER + "self_attn.sinks",),
)
"""Tensors of families whose ``Family.megatron`` says ``softmax_type: learnable``."""

HF_ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"}
READS = ROPE_KEYS | words(
    "num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads "
    "head_dim vocab_size max_position_embeddings rms_norm_eps hidden_act tie_word_embeddings "
    "sliding_window attention_bias mlp_bias"
)
# What transformers' MistralConfig takes where config.json says nothing.
_MISTRAL_DEFAULTS = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}


def refuse_window(hf: dict[str, Any]) -> None:
    """Refuse a window that some position leaves: transformers' Llama has none."""
    window, positions = hf.get("sliding_window"), hf.get("max_position_embeddings", 2048)
    if window is not None and window < positions:
        raise ValueError(
            f"config.json sliding_window={window} of a Llama is not supported; only null, or at "
            f"least max_position_embeddings={positions}"
        )


def whole(rope: Rope) -> Rope:
    """Refuse heads that are rotated in part, which transformers does not do for this family."""
    if rope.share != 1.0:
        raise ValueError(f"config.json partial_rotary_factor={rope.share} is not supported; only 1")
    return rope


def dense(hf: dict[str, Any], rope: Rope | None = None) -> ModelConfig:
    """Return sizes of a network like Llama's, of whichever family; other keys are not looked at.

    Args:
        hf: config.json.
        rope: rotary positions of a family that reads them with defaults of its own.

    Raises:
        ValueError: the config asks for something this table does not hold.
    """
    for key in ("attention_bias", "mlp_bias"):
        if hf.get(key):
            raise ValueError(f"config.json {key}=true is not supported")
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config.json hidden_act={hf['hidden_act']} is not supported; only silu")
    heads = hf["num_attention_heads"]
    rope = rope or whole(read_rope(hf))
    return ModelConfig(
        family="llama",
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        ffn_hidden_size=hf["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=hf.get("num_key_value_heads") or heads,
        kv_channels=hf.get("head_dim") or hf["hidden_size"] // heads,
        vocab_size=hf["vocab_size"],
        max_position_embeddings=hf.get("max_position_embeddings", 2048),
        layernorm_epsilon=hf.get("rms_norm_eps", 1e-6),
        rotary_base=rope.base,
        rotary_percent=rope.share,
        rope_scaling=rope.scaling,
        share_embeddings_and_output_weights=hf.get("tie_word_embeddings", False),
        dtype=hf.get("dtype") or hf.get("torch_dtype") or "float32",
        hf=dict(hf),
    )


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the Megatron sizes of a Hugging Face Llama or Mistral config.

    Raises:
        ValueError: the config asks for something this table does not hold.
    """
    check_keys("llama", hf, READS)
    if not _is_mistral(hf):
        refuse_window(hf)
        return replace(dense(hf), hf=dict(hf))
    known = {**_MISTRAL_DEFAULTS, **hf}
    return replace(dense(known), window_size=windows.everywhere(known), hf=dict(hf))


def _is_mistral(hf: dict[str, Any]) -> bool:
    named = hf.get("architectures") or [""]
    return bool(hf.get("model_type", HF_ARCHITECTURES.get(named[0])) == "mistral")


def _architecture(config: ModelConfig) -> dict[str, Any]:
    """Return the class that ``transformers`` opens the model with: the source's, where it can.

    Its LlamaConfig insists on ``hidden_size % num_attention_heads == 0`` although ``head_dim`` is
    given. Mistral without a sliding window is the same network and has no such rule.
    """
    even = config.hidden_size % config.num_attention_heads == 0 and config.window_size is None
    if even and not _is_mistral(config.hf):
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": windows.width_of(config),
    }


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a (pruned) model; ``head_dim`` is always written."""
    return {
        **{key: value for key, value in config.hf.items() if key not in READS},
        **_architecture(config),
        "hidden_act": "silu",
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.kv_channels,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.layernorm_epsilon,
        # transformers 5 writes rope_parameters but reads these two as well; 4.x reads only these.
        "rope_theta": config.rotary_base,
        "rope_scaling": config.rope_scaling,
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
        "torch_dtype": config.dtype,
    }


LLAMA = Family(
    "llama",
    HF_ARCHITECTURES,
    ROWS,
    from_hf,
    to_hf,
    READS,
    models="Llama 2 and 3.x, Mistral, Mistral-NeMo, SmolLM2",
    refuses=(
        *REFUSED_SCALINGS,
        "`attention_bias=true` or `mlp_bias=true`: the table has no biases",
    ),
)
