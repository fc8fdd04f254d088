"""Whether a plan is one of a model. Imports no torch.

A plan that was read from a file, or made for another model, is refused by name before a weight is
touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from nemo_minitron.config.axes import AXES, Axis, Scope, axis_size
from nemo_minitron.pruning.plan import Plan, full_plan
from nemo_minitron.pruning.scores import model_meta

if TYPE_CHECKING:
    from nemo_minitron.config.model import ModelConfig


def check_plan(config: ModelConfig, plan: Plan) -> None:
    """Refuse a plan of another model.

    Raises:
        ValueError: names the size that differs, or the axis whose indices this model does not have.
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
    for name, everything in whole.items():
        axis = AXES[name]
        if axis.scope is Scope.MODEL:
            _check_indices(name, plan[name], len(everything))
        else:
            _check_layers(config, plan, axis, everything)


def _check_layers(config: ModelConfig, plan: Plan, axis: Axis, everything: list[Any]) -> None:
    """One list of an axis for each kept layer, all equally long."""
    lists = plan[axis.name]
    if len(lists) != len(plan.layers):
        raise ValueError(
            f"the plan keeps {len(plan.layers)} layers, but has '{axis.name}' of {len(lists)}"
        )
    sizes = set()
    for position, layer in enumerate(plan.layers):
        where = f"{axis.name} of layer {layer + 1}"
        each = [lists[position]]
        if axis.scope is Scope.EXPERT:
            each = lists[position]
            if len(each) != len(plan["expert"][position]):
                raise ValueError(f"the plan has '{where}' of {len(each)} experts, not of all kept")
        elif not everything[layer]:
            if lists[position]:
                raise ValueError(f"the plan holds '{where}', which the model does not have")
            continue
        for kept in each:
            _check_indices(where, kept, axis_size(config, axis.name))
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
    """Every kept parent keeps the same number of its own, and no other keeps any."""
    assert axis.nested_in is not None
    each = axis_size(config, axis.name) // axis_size(config, axis.nested_in)
    counts = {parent: sum(index // each == parent for index in kept) for parent in parents}
    if len(set(counts.values())) > 1 or sum(counts.values()) != len(kept):
        raise ValueError(
            f"the plan's '{where}' does not fit its '{axis.nested_in}' {list(parents)}: each kept "
            f"{axis.nested_in} must keep the same number of its own {each}"
        )


def _check_indices(where: str, kept: Sequence[int], size: int) -> None:
    """Some of the indices of an axis, ascending."""
    known = all(type(index) is int and 0 <= index < size for index in kept)
    if not kept or not known or any(b <= a for a, b in pairwise(kept)):
        raise ValueError(
            f"the plan's '{where}' must be some of the model's indices 0 to {size - 1}, ascending; "
            f"it has {len(kept)} from {min(kept, default=None)} to {max(kept, default=None)}"
        )
