"""The plan: for every axis the global indices kept. Pure; the only input of both executors.

Winners are the top scores, ties go to the lower index, and indices are stored ascending, so the
same scores always give the same plan and a plan is canonical.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.config.stages import PruningConfig

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_minitron.config.model import ModelConfig
    from nemo_minitron.importance.scores import Scores

PLAN_FILE = "plan.json"
_FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """Kept indices: global, 0-based, ascending. Lists of lists: one per *kept* layer, in order."""

    layers: list[int]
    hidden: list[int]
    ffn: list[list[int]]
    head: list[list[int]]
    query_group: list[list[int]]

    def save(self, folder: Path) -> None:
        """Write ``plan.json`` into ``folder``."""
        text = json.dumps({"format": _FORMAT, **asdict(self)}, separators=(",", ":"))
        (folder / PLAN_FILE).write_text(text + "\n")

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """Read ``plan.json`` from ``folder``.

        Raises:
            ValueError: the file is missing, damaged or of another version.
        """
        path = folder / PLAN_FILE
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        names = {f.name for f in fields(cls)}
        if not isinstance(values, dict) or values.pop("format", None) != _FORMAT:
            raise ValueError(f"{path} is not a format-{_FORMAT} plan; run minitron prune again")
        if set(values) != names:
            raise ValueError(f"{path} must hold {sorted(names)}, not {sorted(values)}")
        return cls(**values)


def full_plan(config: ModelConfig) -> Plan:
    """The plan that keeps everything."""

    def everything(size: int) -> list[list[int]]:
        return [list(range(size)) for _ in range(config.num_layers)]

    return Plan(
        layers=list(range(config.num_layers)),
        hidden=list(range(config.hidden_size)),
        ffn=everything(config.ffn_hidden_size),
        head=everything(config.num_attention_heads),
        query_group=everything(config.num_query_groups),
    )


# ---------------------------------------------------------------- checks of what the user asked for


def target_sizes(config: ModelConfig, pruning: PruningConfig) -> dict[str, int]:
    """Sizes after pruning by their Megatron name, with null targets filled in.

    Raises:
        ValueError: a target is larger than the current size, or below 1.
    """
    sizes = {}
    for name, target in asdict(pruning.target).items():
        current = getattr(config, name)
        if target is not None and not 1 <= target <= current:
            raise ValueError(
                f"pruning.target.{name}={target} must be between 1 and {current}, the model's "
                f"{name}; lower it, or leave it out to keep {current}"
            )
        sizes[name] = current if target is None else target
    return sizes


def _nearest(value: int, valid: list[int]) -> str:
    below = [v for v in valid if v <= value][-1:]
    above = [v for v in valid if v > value][:1]
    return " or ".join(str(v) for v in below + above)


def _check_heads(config: ModelConfig, sizes: dict[str, int]) -> None:
    """Every kept query group keeps the same number of its own query heads."""
    heads, groups = sizes["num_attention_heads"], sizes["num_query_groups"]
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


def _check_drop_layers(config: ModelConfig, pruning: PruningConfig) -> None:
    drop = pruning.drop_layers
    if drop is None:
        return
    if pruning.target.num_layers is not None:
        raise ValueError(
            f"pruning.drop_layers={drop} and pruning.target.num_layers="
            f"{pruning.target.num_layers} both choose layers; set only one of them"
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


def check_pruning(config: ModelConfig, pruning: PruningConfig) -> None:
    """Everything about the targets that can be wrong, whatever the scores.

    Raises:
        ValueError: see ``target_sizes``; heads that do not fit the query groups; drop_layers out of
            range, repeated, all layers, or together with target.num_layers; nothing to prune.
    """
    targets = asdict(pruning.target).values()
    if pruning.drop_layers is None and all(target is None for target in targets):
        names = ", ".join(f.name for f in fields(pruning.target))
        raise ValueError(
            f"nothing to prune: set pruning.target.<size> (one of {names}) or pruning.drop_layers"
        )
    _check_heads(config, target_sizes(config, pruning))
    _check_drop_layers(config, pruning)


def needed_axes(config: ModelConfig, pruning: PruningConfig) -> dict[str, str]:
    """Axis that must have been scored -> the key that asks for it."""
    axis_of = {
        "num_layers": "layer",
        "hidden_size": "hidden",
        "ffn_hidden_size": "ffn",
        "num_attention_heads": "head",
        "num_query_groups": "head",
    }
    sizes = target_sizes(config, pruning)
    return {
        axis: f"pruning.target.{name}={sizes[name]}"
        for name, axis in axis_of.items()
        if sizes[name] < getattr(config, name)
    }


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
    from nemo_minitron.importance.scores import check_model

    needed = needed_axes(config, pruning)
    if meta is None:
        if needed:
            raise ValueError(
                f"{', '.join(needed.values())} needs importance scores and importance is not set; "
                "set importance to the output_dir of minitron importance"
            )
        return
    check_model(config, meta)
    for axis, key in needed.items():
        if axis not in meta["axes"]:
            raise ValueError(
                f"{key} needs '{axis}' scores, but importance holds only {meta['axes']}; run "
                f"minitron importance with scores.axes including {axis}, or leave the target out"
            )


# ---------------------------------------------------------------- scores -> plan


def _top(scores: Tensor, count: int) -> Tensor:
    """Ascending indices of the ``count`` highest scores along the last dim; ties: lower index."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[..., :count].sort(dim=-1).values


def _keep_layers(config: ModelConfig, pruning: PruningConfig, scores: Scores) -> list[int]:
    if pruning.drop_layers is not None:
        dropped = {layer - 1 for layer in pruning.drop_layers}
        return [layer for layer in range(config.num_layers) if layer not in dropped]
    assert scores.layer is not None
    return _top(scores.layer, target_sizes(config, pruning)["num_layers"]).tolist()


def _keep_heads(scores: Tensor, config: ModelConfig, sizes: dict[str, int]) -> dict[str, Any]:
    """Query groups by the sum of their heads' scores, then query heads inside each kept group.

    Args:
        scores: ``[layers, n]`` of the kept layers.
        config: the model to prune.
        sizes: sizes after pruning.
    """
    groups, per_group = sizes["num_query_groups"], config.heads_per_group
    kept_per_group = sizes["num_attention_heads"] // groups
    grouped = scores.unflatten(1, (config.num_query_groups, per_group))
    kept_groups = _top(grouped.double().sum(dim=-1), groups)  # [layers, groups]
    members = grouped.gather(1, kept_groups.unsqueeze(-1).expand(-1, -1, per_group))
    heads = kept_groups.unsqueeze(-1) * per_group + _top(members, kept_per_group)
    return {"query_group": kept_groups.tolist(), "head": heads.flatten(1).tolist()}


def make_plan(config: ModelConfig, pruning: PruningConfig, scores: Scores | None) -> Plan:
    """Choose what to keep.

    Scores are those of the whole model also when layers are dropped by the same plan.

    Args:
        config: the model to prune.
        pruning: targets, or layers to drop.
        scores: of this model; None when only ``drop_layers`` is set.

    Raises:
        ValueError: see ``check_pruning`` and ``check_importance``.
    """
    check_pruning(config, pruning)
    meta = None if scores is None else {"axes": list(scores.axes()), **scores.meta}
    check_importance(config, pruning, meta)
    plan, sizes = full_plan(config), target_sizes(config, pruning)
    needed = needed_axes(config, pruning)
    if pruning.drop_layers is not None or "layer" in needed:
        layers = _keep_layers(config, pruning, scores)  # type: ignore[arg-type]
        count = len(layers)
        plan = replace(
            plan,
            layers=layers,
            ffn=plan.ffn[:count],
            head=plan.head[:count],
            query_group=plan.query_group[:count],
        )
    if scores is None:
        return plan
    if "hidden" in needed and scores.hidden is not None:
        plan = replace(plan, hidden=_top(scores.hidden, sizes["hidden_size"]).tolist())
    if "ffn" in needed and scores.ffn is not None:
        ffn = _top(scores.ffn[plan.layers], sizes["ffn_hidden_size"]).tolist()
        plan = replace(plan, ffn=ffn)
    if "head" in needed and scores.head is not None:
        plan = replace(plan, **_keep_heads(scores.head[plan.layers], config, sizes))
    return plan


def pruned_config(config: ModelConfig, plan: Plan) -> ModelConfig:
    """Config of the pruned model; ``kept_layers`` stays in terms of the original model."""
    original = config.kept_layers or list(range(config.num_layers))
    dropped = len(plan.layers) < config.num_layers
    return replace(
        config,
        num_layers=len(plan.layers),
        hidden_size=len(plan.hidden),
        ffn_hidden_size=len(plan.ffn[0]),
        num_attention_heads=len(plan.head[0]),
        num_query_groups=len(plan.query_group[0]),
        kept_layers=[original[i] for i in plan.layers] if dropped else list(config.kept_layers),
    )
