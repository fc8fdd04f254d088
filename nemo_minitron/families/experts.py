"""Rows of families with experts, and sizes of experts that not every program can multiply."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from nemo_minitron.config.layers import EXPERTS, MLP
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.config_json import words
from nemo_minitron.families.table import Row

log = logging.getLogger(__name__)

# torch's grouped matrix product, with which transformers runs all experts at once, wants the rows
# of both matrices of an expert to be whole multiples of this.
_ROW_BYTES = 16
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# The shared expert is multiplied on its own, at any width.
_SIZES = ("hidden_size", "moe_ffn_hidden_size")


def before_experts(rows: Iterable[Row]) -> Iterator[Row]:
    """Rows of a dense family; the norm before experts is not fused under Transformer Engine either.

    Megatron-LM with ``--transformer-impl local`` stores it as if it were.
    """
    for row in rows:
        norm = "pre_mlp_layernorm" in row.name
        yield replace(row, te_name=None, stored_as=row.te_name) if norm else row


def beside_dense(dense: Iterable[Row], routed: Iterable[Row]) -> tuple[Row, ...]:
    """Return rows of a family in which a layer has either an MLP or experts (``moe_layer_freq``).

    Args:
        dense: rows of a family whose layers all have an MLP.
        routed: rows of the router and the experts.
    """
    found: list[Row] = []
    for row in dense:
        norm = "pre_mlp_layernorm" in row.name
        found.append(replace(row, kind=MLP) if norm or ".mlp." in row.name else row)
        if norm:
            found += [replace(other, kind=EXPERTS) for other in before_experts([row])]
    return (*found, *(replace(row, kind=EXPERTS) for row in routed))


def dense_layers(routed: list[int] | None, width: int, dense_width: int) -> dict[str, Any]:
    """Return fields of ModelConfig that say which layers are dense, and how wide.

    ``ffn_hidden_size``, the width of dense layers, is that of the experts where there are none.

    Args:
        routed: for each layer 1 if it has experts, else 0.
        width: of an expert.
        dense_width: of a dense layer.
    """
    every = routed is None or all(routed)
    return {
        "moe_layer_freq": None if every else routed,
        "moe_ffn_hidden_size": width,
        "ffn_hidden_size": width if every else dense_width,
    }


ROUTER_KEYS = words(
    "n_routed_experts num_experts_per_tok routed_scaling_factor n_group topk_group norm_topk_prob"
)
"""Keys of config.json that ``sigmoid_router`` reads or that its caller has checked."""


def sigmoid_router(hf: dict[str, Any]) -> dict[str, Any]:
    """Return fields of ModelConfig that describe a router of sigmoids with a bias for each expert.

    Args:
        hf: config.json with the family's defaults of ``ROUTER_KEYS``.

    Raises:
        ValueError: Megatron-Core would pick other experts than transformers, or weight them
            otherwise.
    """
    topk, groups, picked = (hf[key] for key in ("num_experts_per_tok", "n_group", "topk_group"))
    if topk < 2:
        raise ValueError(
            f"config.json num_experts_per_tok={topk} is not supported: Megatron-Core does not "
            "scale the weight of a single expert to 1; at least 2"
        )
    if not hf.get("norm_topk_prob", True):
        raise ValueError(
            "config.json norm_topk_prob=false is not supported: Megatron-Core makes the weights of "
            "the picked experts sum to 1; only true"
        )
    if groups > 1 and topk != 2 * picked:
        raise ValueError(
            f"config.json n_group={groups} with num_experts_per_tok={topk} is not supported: "
            "Megatron-Core ranks groups by as many experts as each gives, transformers by two; "
            f"topk_group={picked} must be half of num_experts_per_tok"
        )
    return {
        "num_moe_experts": hf["n_routed_experts"],
        "moe_router_topk": topk,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": float(hf["routed_scaling_factor"]),
        "moe_router_num_groups": groups if groups > 1 else None,
        "moe_router_group_topk": picked if groups > 1 else None,
    }


def written_router(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of config.json about such a router."""
    return {
        "n_routed_experts": config.num_moe_experts,
        "num_experts_per_tok": config.moe_router_topk,
        "routed_scaling_factor": config.moe_router_topk_scaling_factor,
        "n_group": config.moe_router_num_groups or 1,
        "topk_group": config.moe_router_group_topk or 1,
        "norm_topk_prob": True,
    }


def shared_experts(config: ModelConfig) -> int:
    """Return how many experts the shared one is as wide as, where config.json says it so.

    Raises:
        ValueError: it is as wide as no number of them.
    """
    width, shared = config.moe_ffn_hidden_size or 1, config.moe_shared_expert_intermediate_size or 0
    if shared % width:
        raise ValueError(
            f"moe_shared_expert_intermediate_size={shared} must be a multiple of "
            f"moe_ffn_hidden_size={width}: config.json of family '{config.family}' says how many "
            "experts the shared one is as wide as (n_shared_experts); change pruning.target."
            "moe_shared_expert_intermediate_size or pruning.target.moe_ffn_hidden_size"
        )
    return shared // width


def warn_of_expert_sizes(config: ModelConfig) -> list[str]:
    """Say which sizes keep transformers from running the experts of a model as it does by default.

    Args:
        config: the model, as it will be exported.

    Returns:
        What was said, a sentence a size; nothing where all is well or there are no experts.
    """
    if not config.num_moe_experts:
        return []
    step = _ROW_BYTES // _BYTES.get(config.dtype, 4)
    found = [
        f"{name}={getattr(config, name)} is no multiple of {step} ({_ROW_BYTES} bytes of "
        f"{config.dtype}): transformers runs the exported experts only with "
        'experts_implementation="eager", slower; take the nearest multiple'
        for name in _SIZES
        if getattr(config, name) % step
    ]
    for line in found:
        log.warning(line)
    return found
