"""Check targets against routers and layers for multi-token prediction. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_minitron.config.model import ModelConfig

_WITH_PREDICTION = ("num_layers", "hidden_size", "moe_router_topk")


def check_experts(config: ModelConfig, sizes: dict[str, int]) -> None:
    """Refuse numbers of experts, and of experts of a token, that the router cannot work with.

    Args:
        config: sizes of the model.
        sizes: what they become, by name.

    Raises:
        ValueError: names the size, the relation and the key to set.
    """
    experts, topk = sizes.get("num_moe_experts"), sizes.get("moe_router_topk")
    if experts is None or topk is None:
        return
    if topk != config.moe_router_topk and not 1 <= topk <= experts:
        raise ValueError(
            f"pruning.target.moe_router_topk={topk} must be between 1 and {experts}, the experts "
            "that are left (pruning.target.num_moe_experts)"
        )
    if experts < topk:
        raise ValueError(
            f"pruning.target.num_moe_experts={experts} is fewer than moe_router_topk={topk}, the "
            f"experts that each token is routed to; keep at least {topk}, or lower "
            "pruning.target.moe_router_topk"
        )
    groups, picked = config.moe_router_num_groups or 1, config.moe_router_group_topk or 1
    if experts % groups:
        below, above = experts // groups * groups, -(-experts // groups) * groups
        raise ValueError(
            f"pruning.target.num_moe_experts={experts} must be a multiple of moe_router_num_groups="
            f"{groups}, as every group of experts keeps as many; set it to "
            f"{f'{below} or ' if below else ''}{above}"
        )
    if groups > 1 and experts // groups * picked < topk:
        least = -(-topk // picked) * groups
        raise ValueError(
            f"pruning.target.num_moe_experts={experts} leaves {experts // groups} experts in each "
            f"of moe_router_num_groups={groups}, but each token is routed to moe_router_topk={topk}"
            f" of moe_router_group_topk={picked} groups; keep at least {least}, or lower "
            "pruning.target.moe_router_topk"
        )


def check_prediction(config: ModelConfig, sizes: dict[str, int]) -> None:
    """Refuse sizes that layers for multi-token prediction could not follow.

    Args:
        config: the model to prune.
        sizes: sizes after pruning.

    Raises:
        ValueError: names the target and the ways out.
    """
    if config.mtp_num_layers is None:
        return
    for name, size in sizes.items():
        if name not in _WITH_PREDICTION and size != getattr(config, name):
            raise ValueError(
                f"pruning.target.{name}={size} is not supported for a model with mtp_num_layers="
                f"{config.mtp_num_layers}: nothing scores what is inside its layers for "
                f"multi-token prediction; set only {', '.join(_WITH_PREDICTION)}, or import it "
                "without them: source_ignore=[num_nextn_predict_layers]"
            )
