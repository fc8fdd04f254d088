"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B): Qwen2-MoE without the shared expert, Qwen3's norms.

Routers are those of Qwen2-MoE (``norm_topk_prob`` says which).
"""

from dataclasses import replace
from typing import Any

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families import llama, qwen, qwen2_moe
from nemo_minitron.families.config_json import check_keys
from nemo_minitron.families.table import Family

ROWS = (
    *(
        row
        for row in qwen2_moe.ROWS
        if "shared_expert" not in row.name and row.name != qwen.QKV_BIAS.name
    ),
    *qwen.QK_NORMS,
)

# What transformers' Qwen3MoeConfig takes where config.json says nothing.
_DEFAULTS = {"num_key_value_heads": 4, "max_position_embeddings": 32768}


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Megatron sizes of a Hugging Face Qwen3-MoE config.

    ``ffn_hidden_size``, the width of dense layers, is that of the experts: there is no dense layer.

    Raises:
        ValueError: the config asks for something this table does not hold.
    """
    check_keys("qwen3_moe", hf, qwen2_moe.ROUTED_READS)
    qwen2_moe.refuse(hf)
    width = hf["moe_intermediate_size"]
    dense = llama.dense({**_DEFAULTS, **hf, "intermediate_size": width})
    return replace(
        dense,
        family="qwen3_moe",
        qk_layernorm=True,
        moe_ffn_hidden_size=width,
        hf=dict(hf),
        **qwen2_moe.router(hf),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json of a (pruned) model."""
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
        *qwen.REFUSES,
        *qwen2_moe.REFUSES,
        "`attention_bias=true`: the table has no biases",
    ),
)
