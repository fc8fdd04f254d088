"""The axes: every size of a model that can be pruned (docs/design/axes.md)."""

from dataclasses import fields, replace

from nemo_minitron.config.axis import Axis, Scope
from nemo_minitron.config.layers import ATTENTION, EXPERTS, MAMBA, MLP, kinds_of
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.model_checks import LINEAR_SIZES
from nemo_minitron.runtime.plugins import with_added

_TP, _EP = "tensor_model_parallel_size", "expert_model_parallel_size"
_TABLE = (
    Axis("layer", "num_layers", Scope.MODEL),
    Axis("hidden", "hidden_size", Scope.MODEL),
    Axis(
        "ffn",
        "ffn_hidden_size",
        Scope.LAYER,
        MLP,
        seen_at="mlp.linear_fc2",
        split_by=_TP,
        label="FFN neurons",
    ),
    Axis(
        "query_group",
        "num_query_groups",
        Scope.LAYER,
        ATTENTION,
        scores="head",
        split_by=_TP,
        label="query groups",
    ),
    Axis(
        "head",
        "num_attention_heads",
        Scope.LAYER,
        ATTENTION,
        nested_in="query_group",
        seen_at="self_attention.linear_proj",
        split_by=_TP,
        label="query heads",
    ),
    Axis(
        "mamba_group",
        "mamba_num_groups",
        Scope.LAYER,
        MAMBA,
        split_by=_TP,
        fixed=True,  # each has an input and an output matrix of its own for the state
    ),
    Axis(
        "mamba_head_dim",
        "mamba_head_dim",
        Scope.LAYER,
        MAMBA,
        scores="mamba_head",
        later=True,
        label="Mamba head channels",
        doc="Channels of every Mamba head.",
    ),
    Axis(
        "mamba_head",
        "mamba_num_heads",
        Scope.LAYER,
        MAMBA,
        nested_in="mamba_group",
        seen_at="mixer.in_proj",
        seen_dim="mamba_in",
        seen_part=1,
        within="mamba_head_dim",
        split_by=_TP,
        later=True,
        label="Mamba heads",
        doc="Heads of every Mamba layer, as many from each group.",
    ),
    Axis(
        "expert",
        "num_moe_experts",
        Scope.LAYER,
        EXPERTS,
        grouped_by="moe_router_num_groups",
        split_by=_EP,
        label="experts",
        doc="Experts of every layer with experts, at least moe_router_topk; as many per group.",
    ),
    Axis(
        "expert_ffn",
        "moe_ffn_hidden_size",
        Scope.EXPERT,
        EXPERTS,
        split_by=_TP,
        doc="FFN width of each expert.",
    ),
    Axis(
        "shared_expert_ffn",
        "moe_shared_expert_intermediate_size",
        Scope.LAYER,
        EXPERTS,
        seen_at="mlp.shared_experts.linear_fc2",
        split_by=_TP,
        label="shared expert neurons",
        doc="FFN width of the shared expert.",
    ),
)


def _added(name: str, axis: Axis) -> Axis:
    """Return an axis of another package; ``later``, since stored results did not have it.

    Raises:
        ValueError: its size is not a field of a model, or another axis has it.
    """
    if axis.size not in {field.name for field in fields(ModelConfig)}:
        raise ValueError(f"size={axis.size} is not a field of ModelConfig")
    if axis.size in {known.size for known in _TABLE}:
        raise ValueError(f"size={axis.size} has an axis already")
    return replace(axis, name=name, later=True)


AXES: dict[str, Axis] = with_added("axes", {axis.name: axis for axis in _TABLE}, _added)
"""Every axis by its name, an axis that others are nested in before them."""
SETTINGS = {
    "moe_router_topk": "Experts that each token is routed to; needs no scores, and may grow too."
}
"""Fields of ``ModelConfig`` that are set as sizes are, but have no indices that could be kept, and
what they are. Only models with experts have any."""


NEVER_PRUNED = dict.fromkeys(
    LINEAR_SIZES[:4],
    "heads of a gated delta net share a convolution and keep states, and nothing here ranks them "
    "or their channels",
)
"""Sizes that a user may look for among the targets, and why they are none."""


def axis_size(config: ModelConfig, name: str) -> int:
    """Return the size of an axis in a model before pruning; 0 where the model does not have it."""
    return getattr(config, AXES[name].size) or 0


def targets() -> dict[str, str]:
    """Every size that ``pruning.target`` sets, and what it is where its name does not say it."""
    return {axis.size: axis.doc for axis in AXES.values() if not axis.fixed} | SETTINGS


def groups_in(config: ModelConfig, axis: Axis) -> int:
    """Return the number of groups of an axis that must keep equally many of each; else 1."""
    return (getattr(config, axis.grouped_by) or 1) if axis.grouped_by else 1


def axes_of(config: ModelConfig) -> list[Axis]:
    """Return the axes that a model has, in the order of the table."""
    return [axis for axis in AXES.values() if has_axis(config, axis)]


def layers_with(config: ModelConfig, axis: Axis) -> list[int]:
    """Return layers (0-based) that have an axis; all of them for an axis of the model."""
    return [layer for layer, kinds in enumerate(kinds_of(config)) if axis.kind in kinds]


def split_sizes(config: ModelConfig) -> dict[str, str]:
    """Return the size that a model has -> the parallel degree that has to divide it."""
    return {axis.size: axis.split_by for axis in axes_of(config) if axis.split_by}


def score_axes(*, earlier: bool = False) -> list[str]:
    """Names of the axes that have scores of their own; ``earlier`` leaves out those of ``later``.

    The default of ``scores.axes``, which is stored beside every result and so keeps its order:
    layers come after what is inside every layer, and experts last.
    """
    own = [axis for axis in AXES.values() if not axis.scores and not axis.fixed]
    own = [axis for axis in own if not (earlier and axis.later)]
    own.sort(key=lambda axis: (axis.kind == EXPERTS, axis.name == "layer"))
    return [axis.name for axis in own]


def has_axis(config: ModelConfig, axis: Axis) -> bool:
    """Whether a model has an axis: the size, and a layer of the kind that it belongs to."""
    found = not axis.kind or any(axis.kind in kinds for kinds in kinds_of(config))
    return found and axis_size(config, axis.name) > 0
