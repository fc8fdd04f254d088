"""Fields of Megatron's ``TransformerConfig`` that differ between models: gates, routers, mixers."""

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from megatron.core.activations import quick_gelu, squared_relu
from torch import Tensor

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.model_checks import LINEAR_SIZES, LINEAR_VARIANT
from nemo_minitron.families.rope import latent_fields as rope_fields

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "squared_relu": squared_relu,
}


def activation_fields(config: ModelConfig) -> dict[str, Any]:
    """Return fields of ``TransformerConfig``: the function, and what is done around a gate."""
    return {
        "gated_linear_unit": config.gated_linear_unit,
        "activation_func": _ACTIVATIONS[config.activation],
        "activation_func_clamp_value": config.activation_func_clamp_value,
        "glu_linear_offset": config.glu_linear_offset,
    }


def router_fields(config: ModelConfig) -> dict[str, Any]:
    """Return fields of a router that picks experts by more than a softmax."""
    found = {
        "moe_router_topk_scaling_factor": config.moe_router_topk_scaling_factor,
        "moe_router_num_groups": config.moe_router_num_groups,
        "moe_router_group_topk": config.moe_router_group_topk,
    }
    if config.moe_router_score_function == "softmax":
        return {} if config.moe_router_topk_scaling_factor is None else found
    return {
        **found,
        "moe_router_score_function": config.moe_router_score_function,
        "moe_router_enable_expert_bias": config.moe_router_enable_expert_bias,
        # As there is no balancing loss: what the router picks is learnt from the teacher.
        "moe_router_bias_update_rate": 0.0,
    }


def mamba_fields(config: ModelConfig) -> dict[str, Any]:
    """Return sizes of Mamba layers, if there are any."""
    names = ("mamba_num_heads", "mamba_head_dim", "mamba_num_groups", "mamba_state_dim")
    return {name: getattr(config, name) for name in names if getattr(config, name) is not None}


def linear_fields(config: ModelConfig) -> dict[str, Any]:
    """Return fields of gated delta nets and gated attention, if there are any."""
    found: dict[str, Any] = {}
    if config.attention_output_gate:
        found["attention_output_gate"] = True
    if config.linear_attention_freq is None:
        return found
    names = ("linear_attention_freq", *LINEAR_SIZES)
    sizes = {name: getattr(config, name) for name in names}
    return {**found, **sizes, "experimental_attention_variant": LINEAR_VARIANT}


def latent_fields(config: ModelConfig) -> dict[str, Any]:
    """Sizes and rotary positions of multi-latent attention, if that is what the model has."""
    if not config.multi_latent:
        return {}
    names = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim")
    return {
        **{name: getattr(config, name) for name in names},
        "v_head_dim": config.kv_channels,
        "rotary_base": config.rotary_base,
        **rope_fields(config.rope_scaling),
    }
