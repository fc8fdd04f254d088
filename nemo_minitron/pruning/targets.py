"""Check the user's pruning targets against the model and the scores. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemo_minitron.config.axes import AXES, SETTINGS, axes_of, axis_size, has_axis
from nemo_minitron.config.layers import kinds_of
from nemo_minitron.config.stages import BLOCK_CRITERIA, PruningConfig
from nemo_minitron.families.registry import FAMILIES
from nemo_minitron.pruning.expert_targets import check_experts, check_prediction
from nemo_minitron.pruning.head_targets import check_heads, check_merge, check_nested
from nemo_minitron.pruning.scores import check_model, how_to_score, layer_scores

if TYPE_CHECKING:
    from nemo_minitron.config.model import ModelConfig


def target_sizes(config: ModelConfig, pruning: PruningConfig) -> dict[str, int]:
    """Return sizes after pruning by their Megatron name, with null targets filled in.

    Sizes that the model does not have are left out: those of experts in a dense model, that of the
    dense MLP where every layer has experts, that of a shared expert where there is none.

    Raises:
        ValueError: a target is larger than the current size, below 1, or of a size that the model
            does not have.
    """
    sizes = {}
    for axis in AXES.values():
        name, target = axis.size, pruning.target.get(axis.size)
        current = getattr(config, name)
        if not has_axis(config, axis):
            _refuse_missing(config, name, target)
            continue
        if target is not None and not 1 <= target <= current:
            raise ValueError(
                f"pruning.target.{name}={target} must be between 1 and {current}, the model's "
                f"{name}; lower it, or leave it out to keep {current}"
            )
        if target is not None and target % axis.grain:
            raise ValueError(
                f"pruning.target.{name}={target} must be a multiple of {axis.grain}, as many "
                f"indices of axis '{axis.name}' are kept or dropped together"
            )
        sizes[name] = current if target is None else target
    for name in SETTINGS:
        target = pruning.target.get(name)
        if "num_moe_experts" not in sizes:
            _refuse_missing(config, name, target)
            continue
        sizes[name] = getattr(config, name) if target is None else target
    return sizes


def _refuse_missing(config: ModelConfig, name: str, target: int | None) -> None:
    if target is not None:
        raise ValueError(
            f"pruning.target.{name}={target} is a size that this model does not have: "
            f"{_missing(config, name)}; leave it out"
        )


def _missing(config: ModelConfig, name: str) -> str:
    if name in ("num_attention_heads", "num_query_groups"):
        return "it has no attention"
    if config.num_moe_experts is None:
        return "it has no experts"
    if name == "moe_shared_expert_intermediate_size":
        return "it has no shared expert (pruning.target.moe_ffn_hidden_size is the others' width)"
    return "its layers have experts (pruning.target.moe_ffn_hidden_size is their width)"


def check_prunable(config: ModelConfig, sizes: dict[str, int]) -> None:
    """Refuse sizes that what the family is exported to cannot express.

    Raises:
        ValueError: names the size and those that can be pruned.
    """
    family = FAMILIES.get(config.family)
    if family is None:  # a table of somebody's own, given to the functions
        return
    for name, size in sizes.items():
        free = family.prunable is None or name in family.prunable
        if not free and size != getattr(config, name):
            raise ValueError(
                f"pruning.target.{name}={size} is not supported for family '{family.name}': "
                f"{family.why_not_prunable}; set only {_keys(family.prunable or ())}"
            )


def _keys(names: tuple[str, ...]) -> str:
    return " and ".join(f"pruning.target.{name}" for name in names)


def _check_drop_layers(config: ModelConfig, pruning: PruningConfig) -> None:
    drop = pruning.drop_layers
    if drop is None:
        _check_depth(config, pruning)
        return
    layers = pruning.target["num_layers"]
    if layers is not None:
        raise ValueError(
            f"pruning.drop_layers={drop} and pruning.target.num_layers={layers} both choose "
            "layers; set only one of them"
        )
    outside = [layer for layer in drop if not 1 <= layer <= config.num_layers]
    if outside:
        raise ValueError(
            f"pruning.drop_layers holds {outside}, out of range: layers are counted from 1 to "
            f"num_layers={config.num_layers}; remove them"
        )
    repeated = sorted({layer for layer in drop if drop.count(layer) > 1})
    if repeated:
        raise ValueError(
            f"pruning.drop_layers holds {repeated} more than once; list each layer once"
        )
    if len(drop) == config.num_layers:
        raise ValueError(
            f"pruning.drop_layers drops all {config.num_layers} layers; leave at least one out of "
            "the list"
        )
    check_kinds_left(config, [at for at in range(config.num_layers) if at + 1 not in drop])


def _check_depth(config: ModelConfig, pruning: PruningConfig) -> None:
    layers, kinds = pruning.target["num_layers"], dict.fromkeys(kinds_of(config))
    if layers is not None and 1 <= layers < len(kinds):
        raise ValueError(
            f"pruning.target.num_layers={layers} is too few: the layers are of {len(kinds)} kinds "
            f"({' '.join(kinds)}), and the best of each stays; keep at least {len(kinds)} layers"
        )


def check_kinds_left(config: ModelConfig, layers: list[int]) -> None:
    """Whether a layer of every kind is left: nothing could be said of the sizes of a kind without.

    Args:
        config: the model to prune.
        layers: 0-based layers that stay.

    Raises:
        ValueError: names the kind and its layers.
    """
    kinds = kinds_of(config)
    fields = ("hybrid_layer_pattern", "linear_attention_freq", "moe_layer_freq")
    said = [f"{name}={getattr(config, name)}" for name in fields if getattr(config, name)]
    for kind in sorted({*kinds} - {kinds[layer] for layer in layers}):
        gone = [number for number, other in enumerate(kinds, start=1) if other == kind]
        raise ValueError(
            f"pruning would drop all layers of kind '{kind}' of {' and '.join(said)}, which are "
            f"{gone} (counted from 1); keep one of them: "
            "leave it out of pruning.drop_layers, or take a larger pruning.target.num_layers or a "
            "pruning.layer_criterion that ranks layers one by one"
        )


def _check_criterion(config: ModelConfig, pruning: PruningConfig, sizes: dict[str, int]) -> None:
    criterion = pruning.layer_criterion
    if criterion != "block_influence" and sizes["num_layers"] == config.num_layers:
        raise ValueError(
            f"pruning.layer_criterion={criterion} chooses layers, but no layer is to be chosen; "
            "set pruning.target.num_layers, or leave pruning.layer_criterion out"
        )


def check_pruning(config: ModelConfig, pruning: PruningConfig) -> None:
    """Check everything about the targets that does not depend on scores.

    Raises:
        ValueError: see ``target_sizes``; heads that do not fit the query groups; drop_layers out of
            range, repeated, all layers, or together with target.num_layers; no layer of a kind
            left; nothing to prune; heads to merge, or layers to choose, where there are none.
    """
    if pruning.drop_layers is None and set(pruning.target.values()) == {None}:
        raise ValueError(
            f"nothing to prune: set pruning.target.<size> (one of {', '.join(pruning.target)}) or "
            "pruning.drop_layers"
        )
    sizes = target_sizes(config, pruning)
    check_prunable(config, sizes)
    check_heads(config, sizes)
    check_nested(config, sizes)
    check_experts(config, sizes)
    check_prediction(config, sizes)
    _check_drop_layers(config, pruning)
    check_merge(config, pruning, sizes)
    _check_criterion(config, pruning, sizes)


def check_result(config: ModelConfig, pruning: PruningConfig) -> None:
    """Check everything about the targets, and whether config.json can say the sizes.

    Sizes between two rounds of pruning need not be such, so that ``check_pruning`` does not ask.

    Raises:
        ValueError: see ``check_pruning``, and ``to_hf`` of the family; a router that the family
            would not open again.
    """
    check_pruning(config, pruning)
    family = FAMILIES.get(config.family)
    if family is None:
        return
    small = config.resized(target_sizes(config, pruning))
    written, topk = family.to_hf(small), small.moe_router_topk
    if topk != config.moe_router_topk:
        try:
            family.from_hf(written)
        except ValueError as error:
            raise ValueError(f"pruning.target.moe_router_topk={topk}: {error}") from error


def needed_scores(config: ModelConfig, pruning: PruningConfig) -> dict[str, str]:
    """Name of the scores that are needed -> the key that asks for them."""
    sizes = target_sizes(config, pruning)
    needed: dict[str, str] = {}
    for axis in axes_of(config):
        name, size = axis.scored_as, sizes[axis.size]
        if axis.name == "layer":
            name = layer_scores(pruning.layer_criterion, config.num_layers - size)
        if size < axis_size(config, axis.name):
            needed.setdefault(name, f"pruning.target.{axis.size}={size}")
    return needed


def check_importance(
    config: ModelConfig, pruning: PruningConfig, meta: dict[str, Any] | None
) -> None:
    """Whether the scores can serve the targets.

    Args:
        config: the model to prune.
        pruning: the targets.
        meta: ``scores.json``, or None when ``importance`` is not set.

    Raises:
        ValueError: a target has no scores, or they are of a different model.
    """
    needed = needed_scores(config, pruning)
    if meta is None:
        if needed:
            raise ValueError(
                f"{', '.join(needed.values())} needs importance scores and importance is not set; "
                "set importance to the output_dir of minitron importance"
            )
        return
    check_model(config, meta)
    for name, key in needed.items():
        if name not in meta["axes"]:
            if name.startswith(BLOCK_CRITERIA):
                key += f" with pruning.layer_criterion={pruning.layer_criterion}"
            raise ValueError(
                f"{key} needs '{name}' scores, but importance holds only {meta['axes']}; run "
                f"minitron importance with {how_to_score(name)}, or leave the target out"
            )


def check_compensation(
    config: ModelConfig, pruning: PruningConfig, meta: dict[str, Any] | None
) -> None:
    """Whether there are moments for what is to be compensated.

    Args:
        config: the model to prune.
        pruning: the targets.
        meta: ``scores.json``, or None when ``importance`` is not set.

    Raises:
        ValueError: an axis is not cut, or has no moments.
    """
    cut = needed_scores(config, pruning)
    for axis in pruning.compensate:
        if axis not in cut:
            raise ValueError(
                f"pruning.compensate={pruning.compensate} holds {axis}, of which nothing is cut; "
                "leave it out, or set its pruning.target"
            )
        if axis not in (meta or {}).get("moments", []):
            raise ValueError(
                f"pruning.compensate={pruning.compensate} needs second moments of {axis}; set "
                "importance to the output_dir of minitron importance with "
                f"scores.moments={pruning.compensate}"
            )
