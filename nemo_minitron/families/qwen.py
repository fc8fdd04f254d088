"""Qwen2, Qwen2.5 and Qwen3: Llama's network with biases or norms inside the attention.

Qwen2 adds biases to query, key and value; Qwen3 has none, and normalises every query and key head
(over the head dim, one weight for all heads) before the rotation.
"""

from dataclasses import replace
from typing import Any

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families import llama, windows
from nemo_minitron.families.config_json import check_keys
from nemo_minitron.families.rope import REFUSED_SCALINGS
from nemo_minitron.families.table import Family, Row

_ATTENTION = "decoder.layers.{layer}.self_attention."
_HF_ATTENTION = "model.layers.{layer}.self_attn."


def _has_qkv_bias(config: ModelConfig) -> bool:
    return config.add_qkv_bias


QKV_BIAS = Row(
    _ATTENTION + "linear_qkv.bias",
    ("qkv",),
    0,
    tuple(_HF_ATTENTION + f"{x}_proj.bias" for x in "qkv"),
    when=_has_qkv_bias,
)
QK_NORMS = tuple(
    Row(
        _ATTENTION + f"{x}_layernorm.weight",
        ("head_dim",),
        None,
        (_HF_ATTENTION + f"{x}_norm.weight",),
    )
    for x in "qk"
)

READS = llama.READS | windows.WINDOW_KEYS
# What transformers' Qwen2Config and Qwen3Config take where config.json says nothing.
_DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32768}


def read_windows(hf: dict[str, Any]) -> list[int]:
    """Return the windows of layers from ``max_window_layers`` on, or as ``layer_types`` says."""
    known = {"sliding_window": 4096, **hf}
    return windows.by_layer(known, lambda layer: layer >= hf.get("max_window_layers", 28))


def from_hf_qwen2(hf: dict[str, Any]) -> ModelConfig:
    """Return the Megatron sizes of a Hugging Face Qwen2 config.

    Raises:
        ValueError: the config asks for something this table does not hold.
    """
    check_keys("qwen2", hf, READS)
    known = {**_DEFAULTS, **hf}
    seen, sizes = read_windows(known), llama.dense(known)
    return replace(sizes, family="qwen2", add_qkv_bias=True, window_size=seen, hf=dict(hf))


def from_hf_qwen3(hf: dict[str, Any]) -> ModelConfig:
    """Return the Megatron sizes of a Hugging Face Qwen3 config; the default head dim is 128.

    Raises:
        ValueError: the config asks for something this table does not hold.
    """
    check_keys("qwen3", hf, READS)
    known = {**_DEFAULTS, "head_dim": 128, **hf}
    seen, sizes = read_windows(known), llama.dense(known)
    return replace(sizes, family="qwen3", qk_layernorm=True, window_size=seen, hf=dict(hf))


def _to_hf(config: ModelConfig, architecture: str, model_type: str) -> dict[str, Any]:
    carried = {key: value for key, value in config.hf.items() if key not in READS}
    return {
        **llama.to_hf(replace(config, hf=carried)),
        "architectures": [architecture],
        "model_type": model_type,
        **windows.written(config),
    }


def to_hf_qwen2(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a (pruned) model."""
    return _to_hf(config, "Qwen2ForCausalLM", "qwen2")


def to_hf_qwen3(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a (pruned) model."""
    return {**_to_hf(config, "Qwen3ForCausalLM", "qwen3"), "attention_bias": False}


QWEN2 = Family(
    "qwen2",
    {"Qwen2ForCausalLM": "qwen2"},
    (*llama.ROWS, QKV_BIAS),
    from_hf_qwen2,
    to_hf_qwen2,
    READS,
    models="Qwen2, Qwen2.5",
    refuses=REFUSED_SCALINGS,
)
QWEN3 = Family(
    "qwen3",
    {"Qwen3ForCausalLM": "qwen3"},
    (*llama.ROWS, *QK_NORMS),
    from_hf_qwen3,
    to_hf_qwen3,
    READS,
    models="Qwen3",
    refuses=(*REFUSED_SCALINGS, "`attention_bias=true`: the table has no biases"),
)
