"""The definition of an axis. A package that adds an axis imports only this file."""

from dataclasses import dataclass
from enum import Enum


class Scope(Enum):
    """For what an axis has a list of kept indices of its own."""

    MODEL = "model"
    """One list for the whole model."""
    LAYER = "layer"
    """One list per kept layer."""
    EXPERT = "expert"
    """One list per kept layer and kept expert."""


@dataclass(frozen=True)
class Axis:
    """One prunable size.

    Attributes:
        name: what scores, plans and messages call it.
        size: field of ``ModelConfig`` that holds its size.
        scope: how many lists of kept indices it has.
        kind: what a layer has to be made of to have it (``config.layers``); empty for the axes of
            the model.
        nested_in: the axis whose indices each own an equal, contiguous run of this one's indices.
            Every kept index of that axis keeps the same number of its own.
        grouped_by: field of ``ModelConfig`` that says in how many equal, contiguous groups the
            indices lie, where it says so; every group keeps the same number of them.
        scores: name of the scores that rank it, where they are not its own: a query group is
            ranked by the sum of the scores of its heads.
        seen_at: path, inside a transformer layer, of the module whose input is scored; empty for an
            axis that is scored in its own way. Tensor parallelism splits the last dim of that
            input.
        seen_dim: what that last dim holds (``families.dims``), where it is not the dim of the same
            name.
        seen_part: where the module's output is scored in place of its input: which part of the dim
            ``seen_dim`` of the output is.
        within: the axis whose indices every index of this one has (each Mamba head has all head
            channels). Its scores are kept for each of them, and combined by the L2 norm over those
            that stay (2504.11409, section 3.1).
        split_by: the parallel degree that has to divide the size; empty where nothing splits it.
        grain: how many neighbouring indices are ranked, kept and dropped together.
        fixed: whether it cannot be pruned; others may be nested in it.
        later: whether versions that stored results did not have it yet; no result changes its
            identity by it.
        label: what reports call its indices, where they show what each layer keeps.
        doc: what the size is, where its name does not say it.
    """

    name: str
    size: str
    scope: Scope
    kind: str = ""
    nested_in: str | None = None
    grouped_by: str = ""
    scores: str = ""
    seen_at: str = ""
    seen_dim: str = ""
    seen_part: int | None = None
    within: str = ""
    split_by: str = ""
    grain: int = 1
    fixed: bool = False
    later: bool = False
    label: str = ""
    doc: str = ""

    @property
    def scored_dim(self) -> str:
        """Name of the dim that is scored at ``seen_at``."""
        return self.seen_dim or self.name

    @property
    def scored_as(self) -> str:
        """Name of the scores that rank the axis."""
        return self.scores or self.name
