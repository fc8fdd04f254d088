"""Losses between inner states of teacher and student: section ``distillation.intermediate``."""

import math
from dataclasses import dataclass, field

from nemo_minitron.config.base import check_words, one_of

BOUNDARY_LOSSES = ("embedding", "block_output")
STATE_LOSSES = (*BOUNDARY_LOSSES, "mlp_input")
"""Those that compare hidden states, position by position, in the teacher's width."""
LAYER_LOSSES = ("attention_relation", "mlp_input", "block_output")
"""Those that compare mapped layers."""
INTERMEDIATE_LOSSES = ("embedding", *LAYER_LOSSES)


@dataclass(kw_only=True)
class IntermediateConfig:
    """Losses between inner states, added to the loss on the logits (2407.14679, section 3)."""

    losses: list[str] = field(default_factory=list)
    """Any of ``embedding`` (embedding output), ``attention_relation`` (relations of queries, keys
    and values, 2012.15828), ``mlp_input`` and ``block_output``; ``[]``: the logits alone."""
    layer_map: list[list[int]] | None = None
    """Pairs [teacher layer, student layer], counted from 0 as in 2407.14679, table 17:
    ``[[29,13],[31,15]]``. null: the last layer but two of both models."""
    metric: str = field(default="cosine", metadata=one_of("cosine", "mse"))
    """For all but ``attention_relation``: ``cosine`` (1 - cosine) or ``mse`` (mean over
    channels)."""
    num_relation_heads: int | None = None
    """Heads that ``attention_relation`` splits queries, keys and values into. null: the greatest
    common divisor of the query groups of both models."""
    alpha: str = "dynamic"
    """Weight of the sum of these losses: a number, or ``dynamic``: their sum weighs as much as the
    loss on the logits, measured on the batch before."""

    def __post_init__(self) -> None:
        """Check names, ranges and what belongs together."""
        unknown = [name for name in self.losses if name not in INTERMEDIATE_LOSSES]
        if unknown or len(set(self.losses)) != len(self.losses):
            raise ValueError(
                f"distillation.intermediate.losses={list(self.losses)} must be different ones of "
                f"{', '.join(INTERMEDIATE_LOSSES)}"
            )
        check_words(self, "distillation.intermediate.")
        if not self.dynamic:
            self._check_alpha()
        self._check_unused()

    def _check_alpha(self) -> None:
        try:
            value = float(self.alpha)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise ValueError(
                f"distillation.intermediate.alpha={self.alpha} must be dynamic or a number above "
                "0; for no intermediate losses set distillation.intermediate.losses=[]"
            )

    def _check_unused(self) -> None:
        """A key that nothing would read is a mistake."""
        if self.layer_map is not None and not self.uses(LAYER_LOSSES):
            raise ValueError(
                f"distillation.intermediate.layer_map={self.layer_map} is for "
                f"{', '.join(LAYER_LOSSES)}, but distillation.intermediate.losses="
                f"{list(self.losses)} has none of them; add one or leave layer_map out"
            )
        if self.num_relation_heads is not None and "attention_relation" not in self.losses:
            raise ValueError(
                f"distillation.intermediate.num_relation_heads={self.num_relation_heads} is for "
                "attention_relation, which is not in distillation.intermediate.losses="
                f"{list(self.losses)}; add it or leave num_relation_heads out"
            )

    def uses(self, kinds: tuple[str, ...]) -> bool:
        """Whether any of ``kinds`` is chosen."""
        return any(kind in self.losses for kind in kinds)

    @property
    def dynamic(self) -> bool:
        """Whether alpha follows the losses."""
        return self.alpha == "dynamic"
