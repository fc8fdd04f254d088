"""Relations between the sizes of a model, each checked for one kind of layer."""

import math
from collections.abc import Iterator
from dataclasses import fields
from numbers import Integral, Real
from types import UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

from nemo_minitron.config.layers import EXPERTS, MAMBA, kinds_of

if TYPE_CHECKING:
    from nemo_minitron.config.model import ModelConfig

LINEAR_VARIANT = "gated_delta_net"
"""What Megatron-Core calls them (``experimental_attention_variant``)."""
LINEAR_SIZES = (
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
)
"""Sizes of every gated delta net, as Megatron-Core and Hugging Face call them; never pruned."""


_ABOVE_0 = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "max_position_embeddings",
    "q_lora_rank",
    "rotary_base",
    "rotary_base_local",
    "rotary_percent",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "activation_func_clamp_value",
    "moe_router_topk_scaling_factor",
)


def check_numbers(config: "ModelConfig") -> None:
    """Check that sizes are whole numbers, and that all numbers are finite and in their range.

    A config.json may hold NaN, and one that was made from YAML the text ``"1e-5"``.

    Raises:
        ValueError: names the field and its value.
    """
    for key in fields(config):
        value, kind = getattr(config, key.name), key.type
        kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        must = None
        if int in kinds and (isinstance(value, bool) or not isinstance(value, Integral)):
            must = "a whole number"
        if float in kinds and not _finite(value):
            must = "a finite number"
        if bool in kinds and isinstance(value, str):
            must = "true or false"
        if must and value is not None:
            raise ValueError(f"{key.name}={value!r} of the model must be {must}")
    for name in ("multipliers", "rope_scaling"):
        if not all(map(_finite, _numbers_in(getattr(config, name)))):
            raise ValueError(f"{name}={getattr(config, name)} of the model must be finite numbers")
    if config.layernorm_epsilon < 0:
        raise ValueError(f"layernorm_epsilon={config.layernorm_epsilon} must not be negative")
    for name in _ABOVE_0:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name}={value} of the model must be above 0")


def _finite(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def _numbers_in(values: Any) -> Iterator[object]:
    """Yield the numbers of a value and of what it holds."""
    if isinstance(values, dict | list):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _numbers_in(value)
    elif not isinstance(values, bool) and isinstance(values, Real):
        yield values


def check_mamba(config: "ModelConfig") -> None:
    """Check the sizes of a hybrid model.

    Raises:
        ValueError: a size is missing, or the groups do not divide the heads.
    """
    names = ("mamba_num_heads", "mamba_head_dim", "mamba_num_groups", "mamba_state_dim")
    sizes = {name: getattr(config, name) for name in names}
    if MAMBA in kinds_of(config) and min(size or 0 for size in sizes.values()) < 1:
        raise ValueError(f"a model with Mamba layers needs sizes above 0, not {sizes}")
    heads, groups = config.mamba_num_heads, config.mamba_num_groups
    if MAMBA in kinds_of(config) and heads and groups and heads % groups:
        raise ValueError(f"mamba_num_heads={heads} must be a multiple of mamba_num_groups={groups}")
    if EXPERTS in kinds_of(config) and config.num_moe_experts is None:
        raise ValueError(
            f"hybrid_layer_pattern={config.hybrid_layer_pattern} has layers of experts (E), but "
            "num_moe_experts is not set"
        )


def check_linear(config: "ModelConfig") -> None:
    """Check the sizes of gated delta nets.

    Raises:
        ValueError: a size is missing, key heads do not divide value heads, or the model is one
            whose layers cannot be gated delta nets.
    """
    if config.linear_attention_freq is None:
        return
    sizes = {name: getattr(config, name) for name in LINEAR_SIZES}
    if min(size or 0 for size in sizes.values()) < 1:
        raise ValueError(f"a model with gated delta nets needs sizes above 0, not {sizes}")
    keys, values = config.linear_num_key_heads or 1, config.linear_num_value_heads or 1
    if values % keys:
        raise ValueError(
            f"linear_num_value_heads={values} must be a multiple of linear_num_key_heads={keys}"
        )
    if config.hybrid_layer_pattern is not None or config.multi_latent:
        raise ValueError(
            f"linear_attention_freq={config.linear_attention_freq} is for GPT models without "
            "multi-latent attention; leave it out"
        )


def check_latent(config: "ModelConfig") -> None:
    """Check the sizes of multi-latent attention.

    Raises:
        ValueError: a size is missing, or heads share keys.
    """
    names = ("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim")
    sizes = {name: getattr(config, name) for name in names}
    if any(sizes.values()) and min(size or 0 for size in sizes.values()) < 1:
        raise ValueError(f"multi-latent attention needs sizes above 0, not {sizes}")
    if config.multi_latent and config.num_query_groups != config.num_attention_heads:
        raise ValueError(
            f"num_query_groups={config.num_query_groups} must equal num_attention_heads="
            f"{config.num_attention_heads} in multi-latent attention, where every head has a key "
            "of its own; set both to the same number"
        )


def check_prediction(config: "ModelConfig") -> None:
    """Check the number of layers for multi-token prediction.

    Raises:
        ValueError: it is below 1, or the model cannot have such layers.
    """
    hybrid = config.hybrid_layer_pattern is not None
    tied = config.share_embeddings_and_output_weights
    if config.mtp_num_layers is not None and (config.mtp_num_layers < 1 or hybrid or tied):
        raise ValueError(
            f"mtp_num_layers={config.mtp_num_layers} must be at least 1, in a GPT model whose "
            "embeddings are not tied to the output layer; leave it out for a model without"
        )


def check_experts(config: "ModelConfig") -> None:
    """Check the sizes of experts and of their router.

    Raises:
        ValueError: a size is missing, out of range or does not go with another one, or sizes of
            experts are given where there are none.
    """
    experts = config.num_moe_experts
    if experts is None:
        for name in ("moe_shared_expert_intermediate_size", "moe_layer_freq"):
            if getattr(config, name) is not None:
                raise ValueError(
                    f"{name}={getattr(config, name)} needs experts that are not shared; set "
                    "num_moe_experts"
                )
        return
    topk = config.moe_router_topk
    if not 1 <= topk <= experts:
        raise ValueError(f"moe_router_topk={topk} must be between 1 and num_moe_experts={experts}")
    if config.moe_ffn_hidden_size is None or config.moe_ffn_hidden_size < 1:
        raise ValueError(
            f"moe_ffn_hidden_size={config.moe_ffn_hidden_size} must be at least 1 where there "
            "are experts"
        )
    shared = config.moe_shared_expert_intermediate_size
    if shared is not None and shared < 1:
        raise ValueError(f"moe_shared_expert_intermediate_size={shared} must be at least 1")
    groups, picked = config.moe_router_num_groups or 1, config.moe_router_group_topk or 1
    if experts % groups or (groups > 1 and experts // groups * picked < topk):
        raise ValueError(
            f"num_moe_experts={experts} must be a multiple of moe_router_num_groups={groups}, "
            f"and moe_router_group_topk={picked} groups must hold moe_router_topk={topk} experts"
        )
