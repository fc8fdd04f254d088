"""Mixtral: Llama's attention and norms, and in every layer a router over gated SiLU experts.

The router takes a softmax over the scores of the experts it picked. Hugging Face normalises the
full softmax over the same experts, which is the same number.
"""

from dataclasses import replace
from typing import Any

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families import llama, windows
from nemo_minitron.families.config_json import check_keys
from nemo_minitron.families.experts import before_experts
from nemo_minitron.families.rope import read_rope
from nemo_minitron.families.table import Family, Row

_MLP = "decoder.layers.{layer}.mlp."
_HF_MLP = "model.layers.{layer}.block_sparse_moe."
_EXPERT = _MLP + "experts.local_experts.{expert}."
_HF_EXPERT = _HF_MLP + "experts.{expert}."


ROWS = (
    *before_experts(row for row in llama.ROWS if ".mlp." not in row.name),
    Row(_MLP + "router.weight", ("expert", "hidden"), None, (_HF_MLP + "gate.weight",)),
    Row(
        _EXPERT + "linear_fc1.weight",
        ("expert_gate_up", "hidden"),
        0,
        (_HF_EXPERT + "w1.weight", _HF_EXPERT + "w3.weight"),
    ),
    Row(
        _EXPERT + "linear_fc2.weight",
        ("hidden", "expert_ffn"),
        1,
        (_HF_EXPERT + "w2.weight",),
    ),
)

# What transformers' MixtralConfig takes where config.json says nothing.
_DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
_DEFAULT_ROPE_BASE = 1e6
READS = llama.READS | {"num_local_experts", "num_experts_per_tok"}


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the Megatron sizes of a Hugging Face Mixtral config.

    ``ffn_hidden_size``, the width of dense layers, is that of the experts: there is no dense layer.

    Raises:
        ValueError: the config asks for something this table does not hold.
    """
    check_keys("mixtral", hf, READS)
    if hf["num_experts_per_tok"] < 2:
        raise ValueError(
            f"config.json num_experts_per_tok={hf['num_experts_per_tok']} is not supported: "
            "Megatron-Core's router needs at least 2"
        )
    known = {**_DEFAULTS, **hf}
    dense = llama.dense(known, llama.whole(read_rope(known, base=_DEFAULT_ROPE_BASE)))
    return replace(
        dense,
        family="mixtral",
        window_size=windows.everywhere(known),
        num_moe_experts=hf["num_local_experts"],
        moe_router_topk=hf["num_experts_per_tok"],
        moe_ffn_hidden_size=hf["intermediate_size"],
        hf=dict(hf),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a (pruned) model."""
    carried = {key: value for key, value in config.hf.items() if key not in READS}
    return {
        **llama.to_hf(replace(config, hf=carried)),
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "sliding_window": windows.width_of(config),
        "intermediate_size": config.moe_ffn_hidden_size,
        "num_local_experts": config.num_moe_experts,
        "num_experts_per_tok": config.moe_router_topk,
    }


MIXTRAL = Family(
    "mixtral",
    {"MixtralForCausalLM": "mixtral"},
    ROWS,
    from_hf,
    to_hf,
    READS,
    models="Mixtral",
    refuses=("one expert per token (`num_experts_per_tok=1`): Megatron-Core's router needs two",),
)
