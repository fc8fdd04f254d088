"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B): Qwen2-MoE without the shared expert, Qwen3's norms.

Routers are those of Qwen2-MoE (``norm_topk_prob`` says which).
"""

from dataclasses import replace
from typing import Any

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families import llama, qwen, qwen2_moe, windows
from nemo_minitron.families.config_json import check_keys
from nemo_minitron.families.experts import beside_dense
from nemo_minitron.families.table import Family

_ROUTED = (row for row in qwen2_moe.ROUTED if "shared_expert" not in row.name)
ROWS = (*beside_dense(llama.ROWS, _ROUTED), *qwen.QK_NORMS)

# What transformers' Qwen3MoeConfig takes where config.json says nothing.
_DEFAULTS = {"num_key_value_heads": 4, "max_position_embeddings": 32768, "intermediate_size": 6144}
# In published files, read by nobody: what all networks of this kind are.
_NEUTRAL = {"use_qk_norm": (False, True), "shared_expert_intermediate_size": (0,)}


def _windows(hf: dict[str, Any]) -> list[int]:
    """Return windows of all layers: transformers has no ``layer_types`` for this model."""
    if hf.get("use_sliding_window") and "full_attention" in (hf.get("layer_types") or []):
        raise ValueError(
            f"config.json layer_types={hf['layer_types']} with use_sliding_window=true is not "
            "supported: all layers of a Qwen3-MoE have the window"
        )
    return windows.by_layer({"sliding_window": 4096, **hf}, lambda _: True)


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the Megatron sizes of a Hugging Face Qwen3-MoE config.

    Raises:
        ValueError: the config asks for something this table does not hold.
    """
    check_keys("qwen3_moe", hf, qwen2_moe.ROUTED_READS, _NEUTRAL)
    qwen2_moe.refuse(hf)
    known = {**_DEFAULTS, **hf}
    dense = llama.dense(known)
    return replace(
        dense,
        family="qwen3_moe",
        window_size=_windows(known),
        qk_layernorm=True,
        hf=dict(hf),
        **qwen2_moe.router(known),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a (pruned) model."""
    return {
        **qwen2_moe.to_hf_routed(config),
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
    }


QWEN3_MOE = Family(
    "qwen3_moe",
    {"Qwen3MoeForCausalLM": "qwen3_moe"},
    ROWS,
    from_hf,
    to_hf,
    qwen2_moe.ROUTED_READS,
    models="Qwen3-MoE",
    refuses=(
        *qwen2_moe.REFUSES,
        "`attention_bias=true`: the table has no biases",
    ),
)
