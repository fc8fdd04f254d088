"""gpt-oss: windows and sinks by turns, biases everywhere, experts with a clipped gate.

Every other layer has a window; every head has a sink, one more score that no value belongs to.
Experts clip the gate and what it multiplies, to which they add 1. Hugging Face stores their
tensors for all experts together, transposed, gate and up by turns, and published weights in MXFP4
(``checkpoint/mxfp4.py``). The softmax of the router is over the picked experts.
"""

from dataclasses import replace
from typing import Any

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families import llama, qwen, windows
from nemo_minitron.families.config_json import check_keys, words
from nemo_minitron.families.experts import before_experts
from nemo_minitron.families.rope import REFUSED_SCALINGS, read_rope
from nemo_minitron.families.table import Family, Row

_LAYER, _HF_LAYER = "decoder.layers.{layer}.", "model.layers.{layer}."
_MLP, _HF_MLP = _LAYER + "mlp.", _HF_LAYER + "mlp."
_EXPERT = _MLP + "experts.local_experts.{expert}."
_GATE_UP, _DOWN = (_HF_MLP + f"experts.{name}_proj" for name in ("gate_up", "down"))
_OF_EXPERT, _OF_EXPERT_BIAS = "[{expert}]", "_bias[{expert}]"

ROWS = (
    *before_experts(row for row in llama.ROWS if ".mlp." not in row.name),
    qwen.QKV_BIAS,
    Row(
        _LAYER + "self_attention.linear_proj.bias",
        ("hidden",),
        None,
        (_HF_LAYER + "self_attn.o_proj.bias",),
    ),
    llama.SINKS,
    Row(_MLP + "router.weight", ("expert", "hidden"), None, (_HF_MLP + "router.weight",)),
    Row(_MLP + "router.bias", ("expert",), None, (_HF_MLP + "router.bias",)),
    Row(
        _EXPERT + "linear_fc1.weight",
        ("expert_gate_up", "hidden"),
        0,
        (_GATE_UP + _OF_EXPERT,),
        hf_form="gate_up_by_turns_transposed",
    ),
    Row(
        _EXPERT + "linear_fc1.bias",
        ("expert_gate_up",),
        0,
        (_GATE_UP + _OF_EXPERT_BIAS,),
        hf_form="gate_up_by_turns",
    ),
    Row(
        _EXPERT + "linear_fc2.weight",
        ("hidden", "expert_ffn"),
        1,
        (_DOWN + _OF_EXPERT,),
        hf_form="transposed",
    ),
    Row(_EXPERT + "linear_fc2.bias", ("hidden",), None, (_DOWN + _OF_EXPERT_BIAS,)),
)

READS = (llama.READS - {"mlp_bias"}) | words(
    "layer_types num_local_experts num_experts_per_tok swiglu_alpha swiglu_limit "
    "experts_per_token initial_context_length"
)
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
# What transformers' GptOssConfig takes where config.json says nothing.
_DEFAULTS = {
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "sliding_window": 128,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "swiglu_limit": 7.0,
}
_ROPE_BASE, _ALPHA = 150000.0, 1.702  # the latter is Megatron-Core's quick_gelu


def _refuse(hf: dict[str, Any]) -> None:
    """Refuse values at which the network would be another one.

    Raises:
        ValueError: names the key of config.json, its value and what is supported.
    """
    topk = hf["num_experts_per_tok"]
    scaling = hf.get("rope_scaling") or hf.get("rope_parameters") or _YARN
    only = {
        "attention_bias": True,
        "swiglu_alpha": _ALPHA,
        # transformers reads neither; they say two other keys once more
        "experts_per_token": topk,
        "initial_context_length": scaling.get("original_max_position_embeddings"),
    }
    for key, value in only.items():
        if hf.get(key, value) != value:
            raise ValueError(f"config.json {key}={hf[key]} is not supported; only {value}")
    if topk < 2:
        raise ValueError(
            f"config.json num_experts_per_tok={topk} is not supported: Megatron-Core's router "
            "needs at least 2"
        )


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the Megatron sizes of a Hugging Face GptOss config.

    Raises:
        ValueError: the config asks for something this table does not hold.
    """
    check_keys("gpt_oss", hf, READS)
    known = {**_DEFAULTS, **hf}
    _refuse(known)
    if not (known.get("rope_scaling") or known.get("rope_parameters")):
        known["rope_scaling"] = _YARN
    dense = llama.dense(
        {**known, "attention_bias": False}, llama.whole(read_rope(known, base=_ROPE_BASE))
    )
    return replace(
        dense,
        family="gpt_oss",
        activation="quick_gelu",
        activation_func_clamp_value=float(known["swiglu_limit"]),
        glu_linear_offset=1.0,
        add_bias_linear=True,
        add_qkv_bias=True,
        window_size=windows.by_pattern(known, lambda n: n % 2 == 0),
        num_moe_experts=known["num_local_experts"],
        moe_router_topk=known["num_experts_per_tok"],
        moe_ffn_hidden_size=known["intermediate_size"],
        hf=dict(hf),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a (pruned) model."""
    carried = {key: value for key, value in config.hf.items() if key not in READS}
    return {
        **llama.to_hf(replace(config, hf=carried)),
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        # Where it says nothing of positions, transformers takes YaRN.
        "rope_scaling": config.rope_scaling or {"rope_type": "default"},
        "sliding_window": windows.stated_width(config),
        "layer_types": windows.layer_types(config),
        "intermediate_size": config.moe_ffn_hidden_size,
        "num_local_experts": config.num_moe_experts,
        "num_experts_per_tok": config.moe_router_topk,
        "swiglu_limit": config.activation_func_clamp_value,
        "swiglu_alpha": _ALPHA,
        **{key: config.moe_router_topk for key in ("experts_per_token",) if key in config.hf},
    }


GPT_OSS = Family(
    "gpt_oss",
    {"GptOssForCausalLM": "gpt_oss"},
    ROWS,
    from_hf,
    to_hf,
    READS,
    models="gpt-oss-20b, gpt-oss-120b",
    refuses=(
        *REFUSED_SCALINGS,
        "`attention_bias=false`, and `swiglu_alpha` other than 1.702, Megatron-Core's",
        "one expert per token (`num_experts_per_tok=1`): Megatron-Core's router needs two",
    ),
    layer_spec="nemo_minitron.models.gpt_oss_spec:block_spec",
    # Local experts are modules of their own (models/gpt_oss_spec.py).
    megatron={"softmax_type": "learnable", "moe_grouped_gemm": False},
)
