"""The plan: for every axis the global indices kept. Pure; the only input of both executors.

Winners are the top scores, ties go to the lower index, and indices are stored ascending, so the
same scores always give the same plan and a plan is canonical.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.config.axes import (
    AXES,
    SETTINGS,
    Axis,
    Scope,
    axes_of,
    axis_size,
    groups_in,
    layers_with,
)
from nemo_minitron.config.layers import kinds_of
from nemo_minitron.config.stages import BLOCK_CRITERIA, PruningConfig
from nemo_minitron.documents import check_kinds, read_json_object
from nemo_minitron.pruning.merge import Terms, merge_terms
from nemo_minitron.pruning.scores import layer_scores, model_meta
from nemo_minitron.pruning.targets import (
    check_importance,
    check_kinds_left,
    check_pruning,
    needed_scores,
    target_sizes,
)

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_minitron.config.model import ModelConfig
    from nemo_minitron.pruning.scores import Scores

PLAN_FILE = "plan.json"
LARGEST_PLAN = 1 << 30
"""Bytes; a plan of 100 layers with 128 experts of 1,536 channels each takes a tenth."""
_FORMAT = 1
# plan.json has always held these, also where a model lacks the axis: then a list for each layer
# that is empty.
_ALWAYS_STORED = ("hidden", "ffn", "head", "query_group")


@dataclass(frozen=True)
class Plan(Mapping[str, Any]):
    """Kept indices by axis: global, 0-based, ascending.

    An axis of scope ``MODEL`` has one list, an axis of scope ``LAYER`` one list per *kept* layer,
    an axis of scope ``EXPERT`` one list per kept layer and kept expert (``config.axes``). The list
    of a layer that does not have the axis (an MLP has no heads) is empty. Axes that the model does
    not have are not in the mapping.

    Attributes:
        kept: axis -> its indices.
        merge: what kept query heads take over from others (``pruning/merge.py``) before anything is
            cut, one entry per kept layer; empty when heads stay what they are.
        model: sizes of the model that it is of (``scores.model_meta``); None of a plan from a file.
        settings: new values of ``config.axes.SETTINGS``, where they change.
    """

    kept: dict[str, Any]
    merge: list[Terms] = field(default_factory=list)
    model: dict[str, Any] | None = field(default=None, compare=False)
    settings: dict[str, int] = field(default_factory=dict)

    def __getitem__(self, axis: str) -> Any:
        """Return kept indices of an axis."""
        return self.kept[axis]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the axes."""
        return iter(self.kept)

    def __len__(self) -> int:
        """Count the axes."""
        return len(self.kept)

    @property
    def layers(self) -> list[int]:
        """Layers that stay, as numbers of the model before pruning."""
        layers: list[int] = self.kept["layer"]
        return layers

    def replaced(self, **kept: object) -> Plan:
        """Return the plan with other indices for some axes."""
        return Plan({**self.kept, **kept}, self.merge, self.model, self.settings)

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``plan.json``."""
        lacking: dict[str, Any] = {
            axis: [[]] * len(self.layers) for axis in _ALWAYS_STORED if axis not in self
        }
        kept = {axis: lists for axis, lists in self.kept.items() if axis != "layer"}
        merge = {"merge": self.merge} if self.merge else {}
        first = {"format": _FORMAT, "layers": self.layers}
        return {**first, **self.settings, **lacking, **kept, **merge}

    def save(self, folder: Path) -> None:
        """Write ``plan.json`` into ``folder``."""
        text = json.dumps(self.to_json(), separators=(",", ":"))
        (folder / PLAN_FILE).write_text(text + "\n")

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """Read ``plan.json`` from ``folder``.

        Raises:
            ValueError: the file is missing, damaged or of another version.
        """
        path = folder / PLAN_FILE
        values = read_json_object(path, LARGEST_PLAN)
        if values.pop("format", None) != _FORMAT:
            raise ValueError(f"{path} is not a format-{_FORMAT} plan; run minitron prune again")
        settings = {name: values.pop(name) for name in SETTINGS if name in values}
        check_kinds(path, settings, dict.fromkeys(settings, int))
        needed, known = {"layers", *_ALWAYS_STORED}, {"layers", "merge", *AXES} - {"layer"}
        if not needed <= values.keys() <= known:
            raise ValueError(f"{path} must hold {sorted(needed)}, not {sorted(values)}")
        check_kinds(path, values, dict.fromkeys(values, list))
        merge = values.pop("merge", [])
        layers = values.pop("layers")
        # A list for each layer, all of them empty: an axis that the model lacks.
        kept = {axis: lists for axis, lists in values.items() if any(x != [] for x in lists)}
        return cls({"layer": layers, **kept}, merge, settings=settings)


def full_plan(config: ModelConfig) -> Plan:
    """Return the plan that keeps everything."""
    kept: dict[str, Any] = {"layer": list(range(config.num_layers))}
    for axis in _inner_axes(config):
        kept[axis.name] = _everything(axis, config, kept)
    return Plan(kept)


def _inner_axes(config: ModelConfig) -> list[Axis]:
    """The axes inside the layers and across them, an axis that others depend on before them."""
    return [axis for axis in axes_of(config) if axis.name != "layer"]


def _everything(axis: Axis, config: ModelConfig, kept: dict[str, Any]) -> list[Any]:
    """Return all indices of an axis, for the layers and experts that are kept."""
    size = axis_size(config, axis.name)
    if axis.scope is Scope.MODEL:
        return list(range(size))
    if axis.scope is Scope.EXPERT:
        return [[list(range(size)) for _ in experts] for experts in kept["expert"]]
    having = set(layers_with(config, axis))
    return [list(range(size)) if layer in having else [] for layer in kept["layer"]]


# ---------------------------------------------------------------- scores -> plan


def _top(scores: Tensor, count: int, grain: int = 1) -> Tensor:
    """Ascending indices of the ``count`` highest scores along the last dim; ties: lower index.

    Args:
        scores: ``[..., n]``.
        count: how many to keep, a multiple of ``grain``.
        grain: neighbours that are ranked by the sum of their scores and stay or go together.
    """
    import torch

    if grain > 1:
        groups = _top(scores.unflatten(-1, (-1, grain)).sum(dim=-1), count // grain)
        return (groups.unsqueeze(-1) * grain + torch.arange(grain)).flatten(-2)
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
    values = scores[layer_scores(pruning.layer_criterion, count)]
    kinds = kinds_of(config)
    if pruning.layer_criterion in BLOCK_CRITERIA:
        # Of equal blocks the last one goes, as of equal layers.
        order = values.flip(0).argsort(stable=True)
        firsts = [len(values) - 1 - int(place) for place in order]
        cuts = [[*range(first), *range(first + count, config.num_layers)] for first in firsts]
        return next((cut for cut in cuts if {kinds[at] for at in cut} == {*kinds}), cuts[0])
    # The best layer of every kind stays, also where all others are worth more.
    ranked = values.argsort(descending=True, stable=True).tolist()
    best = {kinds[layer]: layer for layer in reversed(ranked)}.values()
    others = [layer for layer in ranked if layer not in best]
    return sorted([*best, *others[: kept - len(best)]])


def _ranked(
    axis: Axis, config: ModelConfig, sizes: dict[str, int], kept: dict[str, Any], scores: Tensor
) -> list[Any]:
    """Return the best indices of an axis with scope ``LAYER`` in every kept layer that has it.

    An axis that others are nested in is ranked by the sum of their scores. The indices of a nested
    axis are ranked inside each parent that stays, those of a grouped axis inside each group, and
    every parent or group keeps the same number of them.

    Args:
        axis: what to rank.
        config: the model to prune.
        sizes: sizes after pruning.
        kept: what stays, in these layers, of the axes before this one in the table.
        scores: ``[layers, n]`` of these layers, or ``[layers, n, m]`` where each of n indices of
            an axis has all m of another.
    """
    import torch

    size, count = axis_size(config, axis.name), sizes[axis.size]
    if scores.dim() == 3:
        scores = _combined(axis, scores, kept)
    if axis.nested_in is None:
        if scores.size(1) != size:
            scores = scores.double().unflatten(1, (size, -1)).sum(dim=-1)
        groups = groups_in(config, axis)
        best = _top(scores.unflatten(1, (groups, -1)), count // groups, axis.grain)
        first = torch.arange(groups).unsqueeze(-1) * (size // groups)
        return (best + first).flatten(1).tolist()
    each = size // axis_size(config, axis.nested_in)
    parents = torch.tensor(kept[axis.nested_in])  # [layers, parents that stay]
    grouped = scores.unflatten(1, (-1, each))
    members = grouped.gather(1, parents.unsqueeze(-1).expand(-1, -1, each))
    best = parents.unsqueeze(-1) * each + _top(members, count // parents.size(1), axis.grain)
    return best.flatten(1).tolist()


def _combined(axis: Axis, scores: Tensor, kept: dict[str, Any]) -> Tensor:
    """``[layers, n, m]`` -> ``[layers, n]`` or ``[layers, m]``: the L2 norm over the other axis.

    An index is judged by those of the other axis that stay, where they were chosen before it
    (2504.11409, section 3.1: first the channels of all heads, then heads by these channels).
    """
    import torch

    if not axis.within:
        return torch.linalg.vector_norm(scores.double(), dim=1)
    channels = torch.tensor(kept[axis.within])  # [layers, channels that stay]
    index = channels.unsqueeze(1).expand(-1, scores.size(1), -1)
    return torch.linalg.vector_norm(scores.double().gather(2, index), dim=2)


def _keep(
    axis: Axis, config: ModelConfig, sizes: dict[str, int], kept: dict[str, Any], scores: Scores
) -> list[Any]:
    """Return the indices of one axis that stay; see ``_ranked``."""
    values = scores[axis.scored_as]
    if axis.scope is Scope.MODEL:
        return _top(values, sizes[axis.size], axis.grain).tolist()
    if axis.scope is Scope.EXPERT:
        pairs = zip(values[kept["layer"]], kept["expert"], strict=True)
        count, grain = sizes[axis.size], axis.grain
        return [_top(layer[experts], count, grain).tolist() for layer, experts in pairs]
    having = set(layers_with(config, axis))
    positions = [place for place, layer in enumerate(kept["layer"]) if layer in having]
    layers = [kept["layer"][place] for place in positions]
    inside = {
        name: [lists[place] for place in positions]
        for name, lists in kept.items()
        if AXES[name].scope is Scope.LAYER
    }
    best = dict(zip(positions, _ranked(axis, config, sizes, inside, values[layers]), strict=True))
    return [best.get(place, []) for place in range(len(kept["layer"]))]


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
    meta = None if scores is None else {"axes": list(scores), **scores.meta}
    check_importance(config, pruning, meta)
    layers = _keep_layers(config, pruning, scores)
    check_kinds_left(config, layers)
    sizes, needed = target_sizes(config, pruning), needed_scores(config, pruning)
    kept: dict[str, Any] = {"layer": layers}
    for axis in _inner_axes(config):
        if scores is not None and axis.scored_as in needed:
            kept[axis.name] = _keep(axis, config, sizes, kept, scores)
        else:
            kept[axis.name] = _everything(axis, config, kept)
    merge: list[Terms] = []
    if scores is not None and pruning.merge_heads and "head" in needed:
        rows = scores["head"][layers].tolist()
        terms = zip(rows, kept["query_group"], kept["head"], strict=True)
        merge = [merge_terms(config, *layer) for layer in terms]
    known = {name: getattr(config, name) for name in SETTINGS if name in sizes}
    settings = {name: sizes[name] for name, value in known.items() if sizes[name] != value}
    return Plan(kept, merge, model_meta(config), settings)


def pruned_config(config: ModelConfig, plan: Plan) -> ModelConfig:
    """Return config of the pruned model; ``kept_layers`` stays in terms of the original model."""
    sizes = {AXES[axis].size: _kept_size(AXES[axis], lists) for axis, lists in plan.items()}
    return config.resized(sizes | plan.settings, plan.layers)


def _kept_size(axis: Axis, kept: list[Any]) -> int:
    """Return the size of an axis after pruning; all layers and experts keep equally many."""
    if axis.scope is not Scope.MODEL:
        kept = next(filter(None, kept))  # of a layer that has the axis
    return len(kept[0] if axis.scope is Scope.EXPERT else kept)
