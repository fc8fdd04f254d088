"""Check targets for heads against query groups and Mamba groups. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_minitron.config.axes import AXES, axes_of, axis_size
from nemo_minitron.config.stages import PruningConfig

if TYPE_CHECKING:
    from nemo_minitron.config.model import ModelConfig

_HEADS = "num_attention_heads"


def check_heads(config: ModelConfig, sizes: dict[str, int]) -> None:
    """Every kept query group keeps the same number of its own query heads.

    Raises:
        ValueError: names a number of heads that fits.
    """
    if _HEADS not in sizes:  # a hybrid without attention
        return
    heads, groups = sizes[_HEADS], sizes["num_query_groups"]
    most = groups * config.heads_per_group
    valid = [groups * k for k in range(1, config.heads_per_group + 1)]
    if heads % groups:
        raise ValueError(
            f"num_attention_heads={heads} after pruning must be a multiple of num_query_groups="
            f"{groups}; set pruning.target.num_attention_heads={_nearest(heads, valid)}"
        )
    if heads > most:
        raise ValueError(
            f"{groups} query groups hold only {most} query heads ({config.heads_per_group} each), "
            f"fewer than num_attention_heads={heads}; set pruning.target.num_attention_heads="
            f"{_nearest(most, valid)}, or keep more groups with pruning.target.num_query_groups"
        )


def check_nested(config: ModelConfig, sizes: dict[str, int]) -> None:
    """Refuse a number of Mamba heads that does not split evenly over the Mamba groups.

    Raises:
        ValueError: names a number of heads that fits.
    """
    for axis in axes_of(config):
        if axis.nested_in is None or not AXES[axis.nested_in].fixed:
            continue
        owner, size = AXES[axis.nested_in], sizes[axis.size]
        owners, most = axis_size(config, owner.name), axis_size(config, axis.name)
        if size % owners:
            valid = list(range(owners, most + 1, owners))
            raise ValueError(
                f"pruning.target.{axis.size}={size} must be a multiple of {owner.size}={owners}; "
                f"use {_nearest(size, valid)}"
            )


def merged_heads(config: ModelConfig, sizes: dict[str, int]) -> tuple[int, int]:
    """Query heads that merging pairs up with one another, and how many of them stay.

    Those of one query group; where every head has a key and value of its own, those of one layer.

    Args:
        config: the model to prune.
        sizes: sizes after pruning.
    """
    if _HEADS not in sizes:
        return 1, 1
    heads, groups = sizes[_HEADS], sizes["num_query_groups"]
    if config.heads_per_group == 1:
        return config.num_attention_heads, heads
    return config.heads_per_group, heads // groups


def check_merge(config: ModelConfig, pruning: PruningConfig, sizes: dict[str, int]) -> None:
    """Refuse heads to merge where there are none, or where they cannot be.

    Raises:
        ValueError: see above.
    """
    if not pruning.merge_heads:
        return
    if config.multi_latent:
        raise ValueError(
            "pruning.merge_heads=true is not supported with multi-latent attention, whose heads "
            "share a latent; set pruning.merge_heads=false"
        )
    if config.attention_output_gate:
        raise ValueError(
            "pruning.merge_heads=true is not supported with attention_output_gate: a sum of heads "
            "has no one gate; set pruning.merge_heads=false"
        )
    before, after = merged_heads(config, sizes)
    where = "layer" if config.heads_per_group == 1 else "query group"
    if before == after:
        raise ValueError(
            f"pruning.merge_heads=true has nothing to merge: every {where} keeps its {before} "
            "query heads; lower pruning.target.num_attention_heads, or set "
            "pruning.merge_heads=false"
        )
    # Every pruned head is paired with a kept one. Rounds are checked one by one.
    if before > 2 * after and pruning.iterations == 1:
        raise ValueError(
            f"pruning.merge_heads=true needs at least half of the {before} query heads of every "
            f"{where} kept, not {after}: raise pruning.target.num_attention_heads, or get there in "
            "several rounds (pruning.iterations=2)"
        )


def _nearest(value: int, valid: list[int]) -> str:
    below = [v for v in valid if v <= value][-1:]
    above = [v for v in valid if v > value][:1]
    return " or ".join(str(v) for v in below + above)
