"""GLM-4.5, GLM-4.5-Air, GLM-4.6: a router of sigmoids, a shared expert, the first layers dense.

Experts are picked by sigmoids and a bias that is not part of their weights, which are made to sum
to ``routed_scaling_factor``. Half of every head is rotated; query, key and value may have biases,
and query and key heads a norm before the rotation.
"""

from dataclasses import replace
from typing import Any

from nemo_minitron.config.layers import EXPERTS
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families import llama, qwen, qwen2_moe
from nemo_minitron.families.config_json import check_keys, words
from nemo_minitron.families.experts import (
    ROUTER_KEYS,
    beside_dense,
    dense_layers,
    shared_experts,
    sigmoid_router,
    written_router,
)
from nemo_minitron.families.prediction import (
    MTP_LAYERS,
    REFUSED_LAYERS,
    prediction_rows,
    read_layers,
)
from nemo_minitron.families.rope import REFUSED_SCALINGS, read_rope
from nemo_minitron.families.table import Family, Row


def _has_qk_norms(config: ModelConfig) -> bool:
    return config.qk_layernorm


def _renamed(row: Row) -> Row:
    hf = tuple(name.replace("shared_expert.", "shared_experts.") for name in row.hf)
    return replace(row, hf=hf)


ROUTED = (
    Row(
        "decoder.layers.{layer}.mlp.router.expert_bias",
        ("expert",),
        None,
        ("model.layers.{layer}.mlp.gate.e_score_correction_bias",),
        kind=EXPERTS,
    ),
    *(_renamed(row) for row in qwen2_moe.ROUTED if "gate_weight" not in row.name),
)
"""The router and the experts, also of other families."""
_LAYERS = (
    *beside_dense((*llama.ROWS, qwen.QKV_BIAS), ROUTED),
    *(replace(row, when=_has_qk_norms) for row in qwen.QK_NORMS),
)
ROWS = (*_LAYERS, *prediction_rows(_LAYERS))

_REFUSED = {"sliding_window", "mlp_bias"}  # keys of Llama's that this network does not have
READS = (
    (llama.READS - _REFUSED)
    | ROUTER_KEYS
    | words("use_qk_norm moe_intermediate_size n_shared_experts first_k_dense_replace")
    | {MTP_LAYERS}
)
# What transformers' Glm4MoeConfig takes where config.json says nothing.
_DEFAULTS = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 128,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_ROTATED = 0.5


def experts_after_dense(hf: dict[str, Any]) -> dict[str, Any]:
    """Return fields of ModelConfig about experts, the shared one and the dense layers first.

    Raises:
        ValueError: no layer has experts, or none of them is shared.
    """
    layers, dense = hf["num_hidden_layers"], hf["first_k_dense_replace"]
    if dense >= layers:
        raise ValueError(
            f"config.json first_k_dense_replace={dense} leaves no layer with experts among "
            f"num_hidden_layers={layers}, which is not supported; at least one"
        )
    if hf["n_shared_experts"] < 1:
        raise ValueError(
            f"config.json n_shared_experts={hf['n_shared_experts']} is not supported; at least 1"
        )
    width, routed = hf["moe_intermediate_size"], [int(n >= dense) for n in range(layers)]
    return {
        **dense_layers(routed, width, hf["intermediate_size"]),
        "moe_shared_expert_intermediate_size": hf["n_shared_experts"] * width,
    }


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the Megatron sizes of a Hugging Face Glm4Moe config.

    Raises:
        ValueError: the config asks for something this table does not hold.
    """
    check_keys("glm4_moe", hf, READS)
    known = {**_DEFAULTS, **hf}
    sizes = llama.dense({**known, "attention_bias": False}, read_rope(known, share=_ROTATED))
    return replace(
        sizes,
        family="glm4_moe",
        add_qkv_bias=bool(hf.get("attention_bias", False)),
        qk_layernorm=bool(hf.get("use_qk_norm", False)),
        mtp_num_layers=read_layers(hf),
        hf=dict(hf),
        **sigmoid_router(known),
        **experts_after_dense(known),
    )


def written_experts(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of config.json about routed and shared experts and the first dense layers.

    Raises:
        ValueError: see ``shared_experts``.
    """
    mixed, unused = config.moe_layer_freq, config.hf.get("intermediate_size")
    return {
        "intermediate_size": config.ffn_hidden_size if mixed else unused or config.ffn_hidden_size,
        "moe_intermediate_size": config.moe_ffn_hidden_size,
        "n_shared_experts": shared_experts(config),
        "first_k_dense_replace": (mixed or []).count(0),
    }


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a (pruned) model.

    Raises:
        ValueError: see ``shared_experts``.
    """
    carried = {key: value for key, value in config.hf.items() if key not in READS}
    written = {
        **llama.to_hf(replace(config, hf=carried)),
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "partial_rotary_factor": config.rotary_percent,
        "attention_bias": config.add_qkv_bias,
        "use_qk_norm": config.qk_layernorm,
        MTP_LAYERS: config.mtp_num_layers or 0,
        **written_router(config),
        **written_experts(config),
    }
    return {key: value for key, value in written.items() if key not in _REFUSED}


GLM4_MOE = Family(
    "glm4_moe",
    {"Glm4MoeForCausalLM": "glm4_moe"},
    ROWS,
    from_hf,
    to_hf,
    READS,
    models="GLM-4.5, GLM-4.5-Air, GLM-4.6",
    refuses=(
        *REFUSED_SCALINGS,
        REFUSED_LAYERS,
        "one expert per token, `norm_topk_prob=false`, or groups of experts that Megatron-Core "
        "ranks otherwise",
        "a shared expert that was pruned to a width that is no multiple of the others'",
    ),
    megatron={"moe_router_dtype": "fp32"},
)
