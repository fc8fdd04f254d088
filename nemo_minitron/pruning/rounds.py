"""Rounds of pruning on the way to a target, and several plans as one (docs/design/iterative.md).

2407.14679, section 2.2: for T rounds and a size that goes from d_s to d_t, round i scores the model
of size d_s - i (d_s - d_t) / T and prunes it to d_s - (i + 1) (d_s - d_t) / T.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import Any, TypeVar

from nemo_minitron.config.axes import AXES, SETTINGS, Axis, Scope, axis_size, groups_in, targets
from nemo_minitron.config.layout import check_pipeline
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import PruningConfig, TargetConfig
from nemo_minitron.pruning.head_targets import merged_heads
from nemo_minitron.pruning.merge import compose_terms
from nemo_minitron.pruning.plan import Plan
from nemo_minitron.pruning.targets import check_pruning, check_result, target_sizes

ROUNDS = "rounds"
"""Sub-folder of a result that keeps scores and plan of every round."""
_T = TypeVar("_T")
_HEADS = "heads_per_group"


def pruning_rounds(
    config: ModelConfig, pruning: PruningConfig, parallel: ParallelConfig
) -> list[PruningConfig]:
    """Return the targets of every round, relative to the model that the round before it left.

    Sizes in between are the nearest ones that ``parallel`` can split; rounds that would change
    nothing are left out. Layers that ``drop_layers`` names go in the last round.

    Args:
        config: the model before pruning.
        pruning: the target and the number of rounds.
        parallel: layout of the calibration.

    Raises:
        ValueError: see ``targets.check_result``, of the whole and of every round.
    """
    check_result(config, pruning)
    if pruning.iterations == 1:
        return [pruning]
    grouped = config.heads_per_group > 1
    final = target_sizes(config, pruning)
    rounds, current = [], config
    for number in range(1, pruning.iterations + 1):
        last = number == pruning.iterations
        share = Fraction(number, pruning.iterations)
        sizes = final if last else _sizes_between(config, current, final, share, parallel)
        drop = pruning.drop_layers if last else None
        changed = any(size != getattr(current, name) for name, size in sizes.items())
        if not changed and drop is None:
            continue
        one = _one_round(current, pruning, sizes, drop, grouped)
        check_pruning(current, one)
        rounds.append(one)
        current = current.resized(sizes)
    # Nothing is cut where the target is what the model has: the one round says so.
    return rounds or [pruning]


def _one_round(
    config: ModelConfig,
    pruning: PruningConfig,
    sizes: dict[str, int],
    drop_layers: list[int] | None,
    grouped: bool,
) -> PruningConfig:
    """Return one round of ``pruning``: from ``config`` to ``sizes``."""
    before, after = merged_heads(config, sizes)
    # Groups of one head that were larger once still have no keys of their own to merge.
    merges = before > after and (config.heads_per_group > 1 or not grouped)
    layers = sizes["num_layers"] if sizes["num_layers"] < config.num_layers else None
    return PruningConfig(
        target=TargetConfig({n: sizes[n] for n in targets() if n in sizes}, num_layers=layers),
        drop_layers=drop_layers,
        layer_criterion=pruning.layer_criterion if layers else "block_influence",
        merge_heads=pruning.merge_heads and merges,
    )


def _sizes_between(
    start: ModelConfig,
    current: ModelConfig,
    final: dict[str, int],
    share: Fraction,
    parallel: ParallelConfig,
) -> dict[str, int]:
    """Return sizes after ``share`` of the way, each between the current one and the target.

    What has no scores is at its target from the first round on, as it asks nothing of the others.
    """
    axes = {axis.size: axis for axis in AXES.values()}

    def fits(name: str, size: int) -> bool:
        if name == _HEADS:
            return True
        axis = axes[name]
        degree = getattr(parallel, axis.split_by) if axis.split_by else 1
        owners = 1 if axis.nested_in is None else axis_size(start, axis.nested_in)
        even = axis.grain * groups_in(start, axis)
        splits = size % degree == 0 and size % even == 0 and size % owners == 0
        return splits and (name != "num_layers" or _pipeline_fits(current, size, parallel))

    goal = dict(final)
    if "num_attention_heads" in final:
        goal[_HEADS] = final["num_attention_heads"] // final["num_query_groups"]
    sizes = {name: final[name] for name in SETTINGS if name in final}
    for name in (n for n in goal if n not in ("num_attention_heads", *SETTINGS)):
        begin, now, end = getattr(start, name), getattr(current, name), goal[name]
        wanted = begin - share * (begin - end)
        options = [size for size in range(end, now) if fits(name, size)]
        # Of two that are equally near the larger one: later rounds can still cut.
        sizes[name] = min([now, *reversed(options)], key=lambda size: abs(size - wanted))
    if _HEADS in sizes:
        sizes["num_attention_heads"] = sizes["num_query_groups"] * sizes.pop(_HEADS)
    return sizes


def _pipeline_fits(config: ModelConfig, num_layers: int, parallel: ParallelConfig) -> bool:
    """Whether the pipeline can hold some of the model's layers."""
    try:
        check_pipeline(config.resized({"num_layers": num_layers}), parallel)
    except ValueError:
        return False
    return True


def compose(first: Plan, second: Plan) -> Plan:
    """Return the plan that does at once what two plans do one after the other.

    Args:
        first: of the original model.
        second: of the model that ``first`` gives.
    """
    merge = []
    for position, layer in enumerate(second.layers if "head" in second else ()):
        before = first.merge[layer] if first.merge else []
        after = second.merge[position] if second.merge else []
        heads = first["head"][layer], second["head"][position]
        merge.append(compose_terms(before, heads[0], after, heads[1]))
    kept = {axis: _composed(AXES[axis], first, second) for axis in second}
    settings = {**first.settings, **second.settings}
    return Plan(kept, merge if any(merge) else [], settings=settings)


def _composed(axis: Axis, first: Plan, second: Plan) -> list[Any]:
    """Return the indices of the original model that two plans together keep of one axis."""
    if axis.scope is Scope.MODEL:
        return _pick(first[axis.name], second[axis.name])
    rows = _pick(first[axis.name], second.layers)
    if axis.scope is Scope.EXPERT:
        experts = zip(rows, second["expert"], strict=True)
        rows = [_pick(layer, kept) for layer, kept in experts]
        pairs = zip(rows, second[axis.name], strict=True)
        return [[_pick(r, k) for r, k in zip(*layer, strict=True)] for layer in pairs]
    return [_pick(row, kept) for row, kept in zip(rows, second[axis.name], strict=True)]


def _pick(values: list[_T], indices: Iterable[int]) -> list[_T]:
    return [values[index] for index in indices]
