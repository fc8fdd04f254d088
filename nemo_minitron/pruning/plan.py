"""The plan: for every axis the global indices kept. Pure; the only input of both executors.

Winners are the top scores, ties go to the lower index, and indices are stored ascending, so the
same scores always give the same plan and a plan is canonical.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.config.stages import BLOCK_CRITERIA, PruningConfig
from nemo_minitron.documents import read_json_object
from nemo_minitron.importance.scores import layer_scores
from nemo_minitron.pruning.merge import Terms, merge_terms
from nemo_minitron.pruning.targets import (
    check_importance,
    check_pruning,
    needed_scores,
    target_sizes,
)

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_minitron.config.model import ModelConfig
    from nemo_minitron.importance.scores import Scores

PLAN_FILE = "plan.json"
_FORMAT = 1
_OPTIONAL = {"merge", "expert", "expert_ffn", "shared_expert_ffn"}


@dataclass(frozen=True)
class Plan:
    """Kept indices: global, 0-based, ascending. Lists of lists: one per *kept* layer, in order."""

    layers: list[int]
    hidden: list[int]
    ffn: list[list[int]]
    head: list[list[int]]
    query_group: list[list[int]]
    expert: list[list[int]] = field(default_factory=list)
    """Empty (and absent from the file) in a model without experts, as ``expert_ffn``; in one with
    experts the lists of ``ffn`` are empty."""
    expert_ffn: list[list[list[int]]] = field(default_factory=list)
    """One list per kept layer and kept expert."""
    shared_expert_ffn: list[list[int]] = field(default_factory=list)
    """Empty (and absent from the file) in a model without a shared expert."""
    merge: list[Terms] = field(default_factory=list)
    """What kept query heads take over from others (``pruning/merge.py``), before anything is cut;
    empty (and absent from the file) when heads stay what they are."""

    def save(self, folder: Path) -> None:
        """Write ``plan.json`` into ``folder``."""
        values = asdict(self)
        for name in _OPTIONAL:
            if not values[name]:
                del values[name]
        text = json.dumps({"format": _FORMAT, **values}, separators=(",", ":"))
        (folder / PLAN_FILE).write_text(text + "\n")

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """Read ``plan.json`` from ``folder``.

        Raises:
            ValueError: the file is missing, damaged or of another version.
        """
        path = folder / PLAN_FILE
        values = read_json_object(path)
        names = {f.name for f in fields(cls)} - _OPTIONAL
        if values.pop("format", None) != _FORMAT:
            raise ValueError(f"{path} is not a format-{_FORMAT} plan; run minitron prune again")
        if set(values) - _OPTIONAL != names:
            raise ValueError(f"{path} must hold {sorted(names)}, not {sorted(values)}")
        return cls(**values)


def full_plan(config: ModelConfig) -> Plan:
    """The plan that keeps everything."""

    def everything(size: int) -> list[list[int]]:
        return [list(range(size)) for _ in range(config.num_layers)]

    experts, width = config.num_moe_experts or 0, config.moe_ffn_hidden_size or 0
    shared = config.moe_shared_expert_intermediate_size
    return Plan(
        layers=list(range(config.num_layers)),
        hidden=list(range(config.hidden_size)),
        ffn=everything(0 if experts else config.ffn_hidden_size),
        head=everything(config.num_attention_heads),
        query_group=everything(config.num_query_groups),
        expert=everything(experts) if experts else [],
        expert_ffn=[_all_channels(experts, width)] * config.num_layers if experts else [],
        shared_expert_ffn=everything(shared) if shared else [],
    )


def _all_channels(experts: int, width: int) -> list[list[int]]:
    return [list(range(width)) for _ in range(experts)]


# ---------------------------------------------------------------- scores -> plan


def _top(scores: Tensor, count: int) -> Tensor:
    """Ascending indices of the ``count`` highest scores along the last dim; ties: lower index."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[..., :count].sort(dim=-1).values


def _keep_layers(config: ModelConfig, pruning: PruningConfig, scores: Scores | None) -> list[int]:
    if pruning.drop_layers is not None:
        dropped = {layer - 1 for layer in pruning.drop_layers}
        return [layer for layer in range(config.num_layers) if layer not in dropped]
    kept = target_sizes(config, pruning)["num_layers"]
    if scores is None or kept == config.num_layers:
        return list(range(config.num_layers))
    count = config.num_layers - kept
    values = scores.axes()[layer_scores(pruning.layer_criterion, count)]
    if pruning.layer_criterion not in BLOCK_CRITERIA:
        return _top(values, kept).tolist()
    # Of equal blocks the last one goes, as of equal layers.
    first = len(values) - 1 - int(values.flip(0).argmin())
    return [layer for layer in range(config.num_layers) if not first <= layer < first + count]


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


def _keep_experts(
    plan: Plan, scores: Scores, sizes: dict[str, int], needed: dict[str, str]
) -> Plan:
    """Experts of every kept layer, channels inside each of them and inside the shared one."""
    if "expert" in needed and scores.expert is not None:
        kept = _top(scores.expert[plan.layers], sizes["num_moe_experts"]).tolist()
        channels = [layer[: len(kept[0])] for layer in plan.expert_ffn]
        plan = replace(plan, expert=kept, expert_ffn=channels)
    if "expert_ffn" in needed and scores.expert_ffn is not None:
        rows = zip(scores.expert_ffn[plan.layers], plan.expert, strict=True)
        width = sizes["moe_ffn_hidden_size"]
        channels = [_top(layer[kept], width).tolist() for layer, kept in rows]
        plan = replace(plan, expert_ffn=channels)
    if "shared_expert_ffn" in needed and scores.shared_expert_ffn is not None:
        width = sizes["moe_shared_expert_intermediate_size"]
        shared = _top(scores.shared_expert_ffn[plan.layers], width).tolist()
        plan = replace(plan, shared_expert_ffn=shared)
    return plan


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
    layers = _keep_layers(config, pruning, scores)
    count = len(layers)
    plan = replace(
        plan,
        layers=layers,
        ffn=plan.ffn[:count],
        head=plan.head[:count],
        query_group=plan.query_group[:count],
        expert=plan.expert[:count],
        expert_ffn=plan.expert_ffn[:count],
        shared_expert_ffn=plan.shared_expert_ffn[:count],
    )
    if scores is None:
        return plan
    needed = needed_scores(config, pruning)
    if "hidden" in needed and scores.hidden is not None:
        plan = replace(plan, hidden=_top(scores.hidden, sizes["hidden_size"]).tolist())
    if "ffn" in needed and scores.ffn is not None:
        ffn = _top(scores.ffn[plan.layers], sizes["ffn_hidden_size"]).tolist()
        plan = replace(plan, ffn=ffn)
    plan = _keep_experts(plan, scores, sizes, needed)
    if "head" in needed and scores.head is not None:
        rows = scores.head[plan.layers]
        plan = replace(plan, **_keep_heads(rows, config, sizes))
        if pruning.merge_heads:
            terms = zip(rows.tolist(), plan.query_group, plan.head, strict=True)
            plan = replace(plan, merge=[merge_terms(config, *layer) for layer in terms])
    return plan


def pruned_config(config: ModelConfig, plan: Plan) -> ModelConfig:
    """Config of the pruned model; ``kept_layers`` stays in terms of the original model."""
    original = config.kept_layers or list(range(config.num_layers))
    dropped = len(plan.layers) < config.num_layers
    # Where every layer has experts, the width of dense layers is that of the experts.
    ffn = len(plan.expert_ffn[0][0]) if plan.expert_ffn else len(plan.ffn[0])
    shared = len(plan.shared_expert_ffn[0]) if plan.shared_expert_ffn else None
    return replace(
        config,
        num_layers=len(plan.layers),
        hidden_size=len(plan.hidden),
        ffn_hidden_size=ffn,
        num_moe_experts=len(plan.expert[0]) if plan.expert else None,
        moe_ffn_hidden_size=ffn if plan.expert_ffn else None,
        moe_shared_expert_intermediate_size=shared,
        num_attention_heads=len(plan.head[0]),
        num_query_groups=len(plan.query_group[0]),
        kept_layers=[original[i] for i in plan.layers] if dropped else list(config.kept_layers),
    )
