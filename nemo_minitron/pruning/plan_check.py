"""Whether a plan is one of a model. Imports no torch.

A plan that was read from a file, or made for another model, is refused by name before a weight is
touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from nemo_minitron.config.axes import AXES, Axis, Scope, axis_size, groups_in
from nemo_minitron.pruning.expert_targets import check_prediction
from nemo_minitron.pruning.plan import Plan, full_plan, pruned_config
from nemo_minitron.pruning.scores import model_meta
from nemo_minitron.pruning.targets import check_kinds_left, check_prunable

if TYPE_CHECKING:
    from nemo_minitron.config.model import ModelConfig


def check_plan(config: ModelConfig, plan: Plan) -> None:
    """Refuse a plan of another model, or one that no executor could carry out to the end.

    Raises:
        ValueError: names the size that differs, or the axis whose indices this model does not have
            or cannot keep alone.
    """
    if plan.model is not None:
        different = [
            f"{key}={plan.model.get(key)} (model: {value})"
            for key, value in model_meta(config).items()
            if plan.model.get(key) != value
        ]
        if different:
            raise ValueError(f"the plan belongs to a different model: {', '.join(different)}")
    whole = full_plan(config)
    if set(plan) != set(whole):
        raise ValueError(
            f"the plan belongs to a different model: it has the axes {sorted(plan)}, the model "
            f"{sorted(whole)}"
        )
    if plan.settings and "expert" not in whole:
        raise ValueError(f"the plan sets {plan.settings}, but the model has no experts")
    _check_indices("layer", plan.layers, config.num_layers)
    check_kinds_left(config, plan.layers)
    for name, everything in whole.items():
        axis = AXES[name]
        if axis.scope is Scope.MODEL:
            _check_indices(name, plan[name], len(everything))
        else:
            _check_layers(config, plan, axis, everything)
    _check_merge(config, plan)
    small = pruned_config(config, plan)
    sizes = {AXES[name].size: getattr(small, AXES[name].size) for name in whole}
    check_prunable(config, sizes)
    check_prediction(config, sizes)


def _check_layers(config: ModelConfig, plan: Plan, axis: Axis, everything: list[Any]) -> None:
    """Check that an axis has one list for each kept layer, all equally long."""
    lists = _listed(axis.name, plan[axis.name])
    if len(lists) != len(plan.layers):
        raise ValueError(
            f"the plan keeps {len(plan.layers)} layers, but has '{axis.name}' of {len(lists)}"
        )
    sizes = set()
    for position, layer in enumerate(plan.layers):
        where = f"{axis.name} of layer {layer + 1}"
        each: Sequence[Any] = [lists[position]]
        if axis.scope is Scope.EXPERT:
            each = _listed(where, lists[position])
            if len(each) != len(plan["expert"][position]):
                raise ValueError(f"the plan has '{where}' of {len(each)} experts, not of all kept")
        elif not everything[layer]:
            if lists[position]:
                raise ValueError(f"the plan holds '{where}', which the model does not have")
            continue
        for kept in each:
            _check_indices(where, kept, axis_size(config, axis.name))
            _check_together(where, axis, config, kept)
            sizes.add(len(kept))
        if axis.nested_in is not None:
            _check_nested(where, axis, config, lists[position], plan[axis.nested_in][position])
    if len(sizes) > 1:
        raise ValueError(
            f"the plan keeps different numbers of '{axis.name}' in different layers: "
            f"{sorted(sizes)}; a model has one size for all of them"
        )


def _check_nested(
    where: str, axis: Axis, config: ModelConfig, kept: Sequence[int], parents: Sequence[int]
) -> None:
    """Check that each kept parent keeps the same number of its own, and that no other has any."""
    assert axis.nested_in is not None
    each = axis_size(config, axis.name) // axis_size(config, axis.nested_in)
    counts = {parent: sum(index // each == parent for index in kept) for parent in parents}
    if len(set(counts.values())) > 1 or sum(counts.values()) != len(kept):
        raise ValueError(
            f"the plan's '{where}' does not fit its '{axis.nested_in}' {list(parents)}: each kept "
            f"{axis.nested_in} must keep the same number of its own {each}"
        )


def _check_together(where: str, axis: Axis, config: ModelConfig, kept: Sequence[int]) -> None:
    """Check that all groups keep equally many, and that neighbours stay together."""
    groups, size = groups_in(config, axis), axis_size(config, axis.name)
    each = size // groups
    if axis.fixed and len(kept) != size:
        raise ValueError(
            f"the plan's '{where}' must hold all of the model's indices 0 to {size - 1}, as "
            f"{axis.size} cannot be pruned; it has {list(kept)}"
        )
    if groups > 1 and len({sum(i // each == group for i in kept) for group in range(groups)}) > 1:
        raise ValueError(
            f"the plan's '{where}' must keep as many of each of {axis.grouped_by}={groups} groups "
            f"of {each}; it has {list(kept)}"
        )
    if axis.grain > 1 and len({i // axis.grain for i in kept}) * axis.grain != len(kept):
        raise ValueError(
            f"the plan's '{where}' must keep or drop {axis.grain} neighbours together; it has "
            f"{len(kept)} from {kept[0]} to {kept[-1]}"
        )


def _check_merge(config: ModelConfig, plan: Plan) -> None:
    """Check that query heads that stay become sums of heads of their own query group.

    Heads with a key of their own may be summed with any of the layer.
    """
    if not plan.merge:
        return
    if "head" not in plan or config.multi_latent or config.attention_output_gate:
        raise ValueError("the plan merges query heads, which this model has none of to merge")
    if len(_listed("merge", plan.merge)) != len(plan.layers):
        raise ValueError(
            f"the plan keeps {len(plan.layers)} layers, but has 'merge' of {len(plan.merge)}"
        )
    heads, each = config.num_attention_heads, config.heads_per_group
    for layer, kept, terms in zip(plan.layers, plan["head"], plan.merge, strict=True):
        where = f"merge of layer {layer + 1}"
        for term in _listed(where, terms) if kept else ():
            three = isinstance(term, Sequence) and [type(x) is int for x in term] == [True] * 3
            if not three or term[0] not in kept or not 0 <= term[1] < heads:
                raise ValueError(
                    f"the plan's '{where}' must hold [head that stays, head 0 to {heads - 1}, "
                    f"factor]; it has {term}"
                )
            if each > 1 and term[0] // each != term[1] // each:
                raise ValueError(
                    f"the plan's '{where}' has {list(term)}, heads of two query groups; only heads "
                    f"of the same {each} can be merged"
                )


def _listed(where: str, values: Any) -> Sequence[Any]:
    if not isinstance(values, Sequence):
        raise ValueError(f"the plan's '{where}' must be a list, not {values}")
    return values


def _check_indices(where: str, kept: Any, size: int) -> None:
    """Check that a list has some of the indices of an axis, in ascending order."""
    numbers = [index for index in _listed(where, kept) if type(index) is int]
    known = len(numbers) == len(kept) and all(0 <= index < size for index in numbers)
    if not kept or not known or any(b <= a for a, b in pairwise(numbers)):
        raise ValueError(
            f"the plan's '{where}' must be some of the model's indices 0 to {size - 1}, ascending; "
            f"it has {len(kept)} from {min(numbers, default=None)} to "
            f"{max(numbers, default=None)}"
        )
