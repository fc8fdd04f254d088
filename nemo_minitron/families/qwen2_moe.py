"""Qwen2-MoE (Qwen1.5-MoE, Qwen2-57B-A14B): Mixtral's experts beside a shared one.

Beside the routed experts every token goes through the shared one, whose output is multiplied by
the sigmoid of a learned gate. The router takes a softmax over all experts and keeps the weights of
those it picked as they are (``norm_topk_prob=false``), or makes them sum to 1, which is Mixtral's
softmax over the scores of the picked ones. Query, key and value have biases. Some layers may have
an MLP in place of the experts.
"""

from dataclasses import replace
from typing import Any

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families import llama, qwen, windows
from nemo_minitron.families.config_json import check_keys, words
from nemo_minitron.families.experts import beside_dense, dense_layers
from nemo_minitron.families.rope import REFUSED_SCALINGS
from nemo_minitron.families.table import Family, Row

_MLP = "decoder.layers.{layer}.mlp."
_HF_MLP = "model.layers.{layer}.mlp."
_EXPERT = _MLP + "experts.local_experts.{expert}."
_HF_EXPERT = _HF_MLP + "experts.{expert}."
_SHARED = _MLP + "shared_experts."
_HF_SHARED = _HF_MLP + "shared_expert."


ROUTED = (
    Row(_MLP + "router.weight", ("expert", "hidden"), None, (_HF_MLP + "gate.weight",)),
    Row(
        _EXPERT + "linear_fc1.weight",
        ("expert_gate_up", "hidden"),
        0,
        (_HF_EXPERT + "gate_proj.weight", _HF_EXPERT + "up_proj.weight"),
    ),
    Row(
        _EXPERT + "linear_fc2.weight",
        ("hidden", "expert_ffn"),
        1,
        (_HF_EXPERT + "down_proj.weight",),
    ),
    Row(
        _SHARED + "linear_fc1.weight",
        ("shared_expert_gate_up", "hidden"),
        0,
        (_HF_SHARED + "gate_proj.weight", _HF_SHARED + "up_proj.weight"),
    ),
    Row(
        _SHARED + "linear_fc2.weight",
        ("hidden", "shared_expert_ffn"),
        1,
        (_HF_SHARED + "down_proj.weight",),
    ),
    Row(_SHARED + "gate_weight", ("one", "hidden"), None, (_HF_MLP + "shared_expert_gate.weight",)),
)
ROWS = beside_dense((*llama.ROWS, qwen.QKV_BIAS), ROUTED)

# What transformers' Qwen2MoeConfig takes where config.json says nothing.
_DEFAULTS = {
    "num_key_value_heads": 16,
    "max_position_embeddings": 32768,
    "intermediate_size": 5632,
}
ROUTED_READS = qwen.READS | words(
    "num_experts num_local_experts num_experts_per_tok moe_intermediate_size norm_topk_prob "
    "decoder_sparse_step mlp_only_layers"
)
"""Keys that every Qwen with routed experts reads."""
READS = ROUTED_READS | {"shared_expert_intermediate_size", "qkv_bias"}
REFUSES = (
    *REFUSED_SCALINGS,
    "`norm_topk_prob=true` with one expert per token: Megatron-Core's router needs two",
)


def routed_layers(hf: dict[str, Any]) -> list[int]:
    """For each layer 1 if it has experts, else 0, as transformers reads it.

    Raises:
        ValueError: no layer has experts.
    """
    layers, step = hf["num_hidden_layers"], hf.get("decoder_sparse_step", 1)
    dense = hf.get("mlp_only_layers") or []
    found = [int(n not in dense and step > 0 and (n + 1) % step == 0) for n in range(layers)]
    if not any(found):
        raise ValueError(
            f"config.json mlp_only_layers={dense} and decoder_sparse_step={step} leave no layer "
            f"with experts among num_hidden_layers={layers}, which is not supported; at least one"
        )
    return found


def refuse(hf: dict[str, Any]) -> None:
    """Refuse a router that Megatron-Core does not have.

    Raises:
        ValueError: names the field of config.json.
    """
    if hf.get("norm_topk_prob") and hf["num_experts_per_tok"] < 2:
        raise ValueError(
            f"config.json num_experts_per_tok={hf['num_experts_per_tok']} with norm_topk_prob=true "
            "is not supported: Megatron-Core's router needs at least 2, or norm_topk_prob=false"
        )


def _windows(hf: dict[str, Any]) -> list[int]:
    """Return windows of every second of the first ``max_window_layers``, or of ``layer_types``."""
    before = hf.get("max_window_layers", 28)
    known = {"sliding_window": 4096, **hf}
    return windows.by_layer(known, lambda layer: layer % 2 == 0 and layer < before)


def router(hf: dict[str, Any]) -> dict[str, Any]:
    """Return fields of ModelConfig that describe experts; transformers 5 may rename the first."""
    renamed, experts = hf.get("num_local_experts"), hf.get("num_experts")
    if None not in (renamed, experts) and renamed != experts:
        raise ValueError(
            f"config.json num_experts={experts} and num_local_experts={renamed} disagree; leave "
            "one out in a copy of config.json"
        )
    return {
        "num_moe_experts": hf["num_experts"] if renamed is None else renamed,
        "moe_router_topk": hf["num_experts_per_tok"],
        "moe_router_pre_softmax": not hf.get("norm_topk_prob", False),
        **dense_layers(routed_layers(hf), hf["moe_intermediate_size"], hf["intermediate_size"]),
    }


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the Megatron sizes of a Hugging Face Qwen2-MoE config.

    Raises:
        ValueError: the config asks for something this table does not hold.
    """
    check_keys("qwen2_moe", hf, READS)
    refuse(hf)
    known = {**_DEFAULTS, **hf}
    dense = llama.dense(known)
    return replace(
        dense,
        family="qwen2_moe",
        window_size=_windows(known),
        add_qkv_bias=hf.get("qkv_bias", True),
        moe_shared_expert_intermediate_size=hf["shared_expert_intermediate_size"],
        moe_shared_expert_gate=True,
        hf=dict(hf),
        **router(known),
    )


def to_hf_routed(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of config.json that every Qwen with routed experts has."""
    carried = {key: value for key, value in config.hf.items() if key not in READS}
    mixed, routed = config.moe_layer_freq is not None, config.moe_layer_freq or []
    unused = config.hf.get("intermediate_size", config.ffn_hidden_size)
    return {
        **llama.to_hf(replace(config, hf=carried)),
        **windows.written(config),
        "mlp_only_layers": [layer for layer, has in enumerate(routed) if not has],
        "decoder_sparse_step": 1,
        "intermediate_size": config.ffn_hidden_size if mixed else unused,
        "num_experts": config.num_moe_experts,
        "num_experts_per_tok": config.moe_router_topk,
        "norm_topk_prob": not config.moe_router_pre_softmax,
        "moe_intermediate_size": config.moe_ffn_hidden_size,
    }


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a (pruned) model."""
    return {
        **to_hf_routed(config),
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "qkv_bias": config.add_qkv_bias,
        "shared_expert_intermediate_size": config.moe_shared_expert_intermediate_size,
    }


QWEN2_MOE = Family(
    "qwen2_moe",
    {"Qwen2MoeForCausalLM": "qwen2_moe"},
    ROWS,
    from_hf,
    to_hf,
    READS,
    models="Qwen1.5-MoE, Qwen2-57B-A14B",
    refuses=REFUSES,
)
