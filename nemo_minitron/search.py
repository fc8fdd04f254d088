"""Shapes of a search space that keep the rules and the budget."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from nemo_minitron.config.axes import split_sizes
from nemo_minitron.config.layers import ATTENTION, LINEAR, MAMBA, kinds_of
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.search import SEARCHED, SEARCHED_LATER, SearchSpaceConfig
from nemo_minitron.config.stages import PruningConfig, SearchConfig, TargetConfig
from nemo_minitron.families.dims import DIMS
from nemo_minitron.families.registry import family_of
from nemo_minitron.families.table import active_parameters, parameter_count
from nemo_minitron.pruning.plan import make_plan
from nemo_minitron.pruning.scores import Scores

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_GIB = float(1 << 30)
_EP = "expert_model_parallel_size"
_LIMITS = {"parameters": "max_params", "active": "max_active_params", "memory_gib": "max_memory_gb"}
_LETTERS = dict(zip(SEARCHED, ("l", "h", "f", "n", "g", "e", "x", "s", "m", "p"), strict=True))
Sizes = dict[str, int]


@dataclass(frozen=True)
class Candidate:
    """One shape.

    Attributes:
        sizes: of ``SEARCHED``; those of ``SEARCHED_LATER`` where they are searched.
        parameters: in all.
        active: that a token meets.
        memory_gib: at inference, as ``search.max_memory_gb`` counts.
    """

    sizes: Sizes
    parameters: int
    active: int
    memory_gib: float

    @property
    def name(self) -> str:
        """Folder name: ``l30_h576_f1024_n9_g3``, then sizes of experts and Mamba layers."""
        return "_".join(f"{_LETTERS[name]}{size}" for name, size in self.sizes.items())


@dataclass(frozen=True)
class _Rule:
    """A constraint: what it asks for, and the keys that could be changed."""

    words: str
    keeps: Callable[[Sizes], bool]


def kept_layers(
    config: ModelConfig, search: SearchConfig, scores: Scores | None
) -> dict[int, list[int]]:
    """Return which layers stay for each number of them; empty if all layers are alike.

    Args:
        config: the model to prune.
        search: the keys.
        scores: of this model.
    """
    if scores is None or len({*kinds_of(config)}) == 1:
        return {}
    found = {}
    for count in (count for count in search.search.num_layers if count < config.num_layers):
        target = TargetConfig(num_layers=count)
        pruning = PruningConfig(target=target, layer_criterion=search.layer_criterion)
        with suppress(ValueError):  # a candidate of this number, if there is one, is refused later
            found[count] = make_plan(config, pruning, scores).layers
    return found


def candidates(
    config: ModelConfig,
    space: SearchSpaceConfig,
    layers: Mapping[int, list[int]] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Candidate]:
    """Return shapes within the rules and the budget that can be exported, smallest first.

    Args:
        config: the model to prune.
        space: sizes and budget.
        layers: as ``kept_layers`` gives them; the first layers stand for those that it has not.
        say: told how many shapes are left out as they cannot be exported, and why.

    Raises:
        ValueError: a size the model cannot be pruned to; no shape keeps the rules (names the one
            that ends it); none meets the budget (names the nearest); none can be exported; more
            than ``search.max_candidates`` are left.
    """
    shapes = _rule_abiding(config, space, list(_product(config, space)))
    kept = [(layers or {}).get(sizes["num_layers"]) for sizes in shapes]
    smaller = list(map(config.resized, shapes, kept))
    known = [_measured(*one, space) for one in zip(smaller, shapes, strict=True)]
    inside = [pair for pair in zip(known, smaller, strict=True) if _within(pair[0], space)]
    if not inside:
        raise ValueError(_nearest(known, space))
    found = _exportable(inside, say)
    if len(found) > space.max_candidates:
        raise ValueError(
            f"{len(found)} shapes are within the budget, more than search.max_candidates="
            f"{space.max_candidates}, and each is pruned and evaluated; shorten the lists of "
            "search.<size>, raise search.divisor, or raise search.max_candidates"
        )
    return sorted(found, key=lambda one: (one.parameters, one.name))


def _product(config: ModelConfig, space: SearchSpaceConfig) -> Iterable[Sizes]:
    """Yield every combination of sizes, the model itself left out."""
    names = [n for n in SEARCHED if n not in SEARCHED_LATER or getattr(space, n)]
    own = {name: getattr(config, name) for name in names}
    for name in (name for name, size in own.items() if size is None):
        raise ValueError(
            f"search.{name}={getattr(space, name)} is a size that this model does not have; leave "
            "it out"
        )
    lists = {name: getattr(space, name) or [own[name]] for name in own}
    for name, values in lists.items():
        if max(values) > own[name]:
            raise ValueError(
                f"search.{name} holds {max(values)}, more than {own[name]} of the model; sizes can "
                "only shrink: remove it"
            )
    if all(values == [own[name]] for name, values in lists.items()):
        keys = ", ".join(f"search.{name}" for name in SEARCHED if getattr(config, name))
        raise ValueError(f"the search space holds nothing but the model itself; set one of {keys}")
    for values in itertools.product(*lists.values()):
        sizes = dict(zip(own, values, strict=True))
        if sizes != own:
            yield sizes


def _rules(config: ModelConfig, space: SearchSpaceConfig) -> list[_Rule]:
    """Return the rules in the order in which they are applied."""
    own, tp = config.heads_per_group, space.tensor_model_parallel_size
    cut = ("hidden_size", "ffn_hidden_size")
    split = ["num_query_groups", "num_attention_heads", "ffn_hidden_size"]
    split += [name for name in SEARCHED if name in split_sizes(config) and name not in split]
    split = [name for name in split if split_sizes(config).get(name) != _EP]
    groups, topk = config.mamba_num_groups or 1, config.moe_router_topk
    expert_groups, experts = config.moe_router_num_groups or 1, config.num_moe_experts or topk
    room, picked = f"num_moe_experts must be at least moe_router_topk={topk}", 1
    if expert_groups > 1:
        picked = config.moe_router_group_topk or 1
        room = (
            f"moe_router_group_topk={picked} of moe_router_num_groups={expert_groups} must hold "
            f"moe_router_topk={topk} experts"
        )
    return [
        _Rule(
            "num_attention_heads must be a multiple of num_query_groups (search."
            "num_attention_heads, search.num_query_groups)",
            lambda s: s["num_attention_heads"] % s["num_query_groups"] == 0,
        ),
        _Rule(
            f"a query group holds at most {own} heads (search.num_attention_heads, "
            "search.num_query_groups)",
            lambda s: s["num_attention_heads"] <= own * s["num_query_groups"],
        ),
        _Rule(
            f"search.divisor={space.divisor} must divide hidden_size and ffn_hidden_size where "
            "they are pruned",
            lambda s: all(s[n] % space.divisor == 0 or s[n] == getattr(config, n) for n in cut),
        ),
        _Rule(
            f"search.tensor_model_parallel_size={tp} must divide {', '.join(split)}",
            lambda s: all(s.get(name, getattr(config, name)) % tp == 0 for name in split),
        ),
        _Rule(
            f"mamba_num_heads must be a multiple of mamba_num_groups={groups} "
            "(search.mamba_num_heads)",
            lambda s: s.get("mamba_num_heads", groups) % groups == 0,
        ),
        _Rule(
            f"num_moe_experts must be a multiple of moe_router_num_groups={expert_groups} (search."
            "num_moe_experts)",
            lambda s: s.get("num_moe_experts", expert_groups) % expert_groups == 0,
        ),
        _Rule(
            f"{room} (search.num_moe_experts)",
            lambda s: s.get("num_moe_experts", experts) // expert_groups * picked >= topk,
        ),
    ]


def _rule_abiding(
    config: ModelConfig, space: SearchSpaceConfig, shapes: list[Sizes]
) -> list[Sizes]:
    count = len(shapes)
    for rule in _rules(config, space):
        left = [sizes for sizes in shapes if rule.keeps(sizes)]
        if not left:
            raise ValueError(
                f"the search space is empty: no shape keeps this: {rule.words} (of {count} shapes "
                f"{len(shapes)} kept the rules before it)"
            )
        shapes = left
    return shapes


def _measured(small: ModelConfig, sizes: Sizes, space: SearchSpaceConfig) -> Candidate:
    count = parameter_count(family_of(small), small)["total"]
    active = active_parameters(family_of(small), small)
    letters = "".join(kinds_of(small))
    kept = letters.count(ATTENTION) * small.cached_channels * space.seq_length
    lasting = ("mamba", MAMBA, small.mamba_state_dim), ("linear", LINEAR, small.linear_key_head_dim)
    for name, kind, state in lasting:
        parts = (DIMS[f"{name}_{part}"].size(small) for part in ("inner", "conv", "conv_width"))
        inner, conv, width = parts
        # A state for each channel of each head, and what the convolution looks back at.
        kept += letters.count(kind) * (inner * (state or 0) + conv * width)
    memory = _BYTES[small.dtype] * (count + kept * space.batch_size)
    return Candidate(sizes, count, active, memory / _GIB)


def _bounds(space: SearchSpaceConfig) -> list[tuple[str, str, float, float]]:
    """(attribute, key with value, lowest, highest) of every budget that is set."""
    found = []
    if space.target_params is not None:
        slack = space.tolerance * space.target_params
        words = f"search.target_params={space.target_params:g} within {space.tolerance:g}"
        limits = (space.target_params - slack, space.target_params + slack)
        found.append(("parameters", words, *limits))
    for name, key in _LIMITS.items():
        limit = getattr(space, key)
        if limit is not None:
            found.append((name, f"search.{key}={limit:g}", 0, limit))
    return found


def _within(one: Candidate, space: SearchSpaceConfig) -> bool:
    return all(low <= getattr(one, name) <= high for name, _, low, high in _bounds(space))


def _exportable(
    inside: list[tuple[Candidate, ModelConfig]], say: Callable[[str], None]
) -> list[Candidate]:
    """Leave out what the config.json of the family cannot say."""
    found, reasons = [], []
    for one, small in inside:
        try:
            family_of(small).to_hf(small)
            found.append(one)
        except ValueError as error:
            reasons.append(str(error))
    if not found:
        raise ValueError(f"none of the {len(reasons)} shapes can be exported: {reasons[0]}")
    if reasons:
        say(f"{len(reasons)} of {len(inside)} shapes are left out: {reasons[0]}")
    return found


def _nearest(known: list[Candidate], space: SearchSpaceConfig) -> str:
    """Return the message for a budget that no shape meets."""
    bounds = _bounds(space)

    def distance(one: Candidate) -> float:
        return max(
            max(low - getattr(one, name), getattr(one, name) - high, 0) / high
            for name, _, low, high in bounds
        )

    near = min(known, key=distance)
    sizes = " ".join(f"{name}={size}" for name, size in near.sizes.items())
    return (
        f"no shape of {len(known)} meets {' and '.join(words for _, words, _, _ in bounds)}; the "
        f"nearest is {sizes} with {near.parameters:,} parameters and {near.memory_gib:.3g} GiB; "
        "change the budget, or add sizes to search.<size>"
    )


def objective(record: Mapping[str, Any]) -> float:
    """Return the figure by which candidates are compared; lower is better.

    Args:
        record: of ``candidates.json``.

    Returns:
        Minus the score of its tasks, or its loss if no tasks were asked; after the short
        distillation where it had one.
    """
    for when in ("distilled_", ""):
        score, loss = record.get(f"{when}score"), record.get(f"{when}loss")
        if score is not None:
            return -float(score)
        if loss is not None:
            return float(loss)
    raise KeyError("loss")


def within_latency(records: list[dict[str, Any]], limit: float | None) -> list[dict[str, Any]]:
    """Return the candidates that are fast enough.

    Raises:
        ValueError: every candidate takes longer than ``search.max_latency_ms``.
    """
    inside = [r for r in records if limit is None or r["latency_ms"] <= limit]
    if not inside:
        fastest = min(records, key=lambda record: record["latency_ms"])
        raise ValueError(
            f"no candidate runs within search.max_latency_ms={limit:g}; the fastest, "
            f"{fastest['name']}, takes {fastest['latency_ms']:.4g} ms a sample; raise it, or add "
            "smaller sizes to search.<size>"
        )
    return inside


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return indices of the points that no other point beats, both figures being better when lower.

    A point is beaten by one that is as low in both and lower in one. Of equal points all stay.

    Returns:
        In the order of the first figure.
    """
    order = sorted(range(len(points)), key=lambda index: points[index])
    front: list[int] = []
    for index in order:
        last = points[front[-1]] if front else None
        if last is None or points[index] == last or points[index][1] < last[1]:
            front.append(index)
    return front
