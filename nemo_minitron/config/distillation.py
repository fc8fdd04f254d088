"""The losses between teacher and student: section ``distillation`` of ``minitron distill``."""

import math
from dataclasses import dataclass, field

from nemo_minitron.config.base import ADDED, NEUTRAL, check_values, one_of
from nemo_minitron.runtime.plugins import added

DENSE_LOSSES = ("forward_kl", "reverse_kl", "js", "mse", "cosine")
# Those that read only the teacher's k largest logits of each token.
TOP_K_LOSSES = ("top_k", "top_k_tail")
_OWN_LOSSES = (*DENSE_LOSSES, *TOP_K_LOSSES)
LOSS_KINDS = (*_OWN_LOSSES, *added("losses", _OWN_LOSSES))
# Those that compare logits, not distributions: a temperature has no place in them.
RAW_LOSSES = ("mse", "cosine")
_JS_BETA = 0.5
BOUNDARY_LOSSES = ("embedding", "block_output")
STATE_LOSSES = (*BOUNDARY_LOSSES, "mlp_input")
"""Losses that compare hidden states, position by position, in the teacher's width."""
LAYER_LOSSES = ("attention_relation", "mlp_input", "block_output")
"""Losses that compare mapped layers."""
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
        check_values(self, "distillation.intermediate.")
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
        """Refuse a key that none of the chosen losses would read."""
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
        """Whether alpha is computed from the losses of the batch before."""
        return self.alpha == "dynamic"


@dataclass(kw_only=True)
class DistillationConfig:
    """The losses between teacher and student."""

    loss: str = field(default="forward_kl", metadata=one_of(*LOSS_KINDS))
    """``forward_kl``: KL(teacher || student) (2407.14679, section 3); ``reverse_kl``:
    KL(student || teacher); ``js``: Jensen-Shannon; ``mse``: squared difference of the logits, mean
    over the vocabulary; ``cosine``: 1 - cosine of the logits; ``top_k``: forward KL over the
    teacher's ``top_k`` largest logits, renormalised; ``top_k_tail``: the same with one entry more
    for the rest of both distributions."""
    temperature: float = 1.0
    """Number that both models' logits are divided by; ``mse`` and ``cosine`` take 1 only."""
    temperature_scaling: str = field(default="none", metadata=one_of("none", "square"))
    """``none``, as in the papers: the loss stays as it is, and its gradient shrinks with
    1 / temperature^2; ``square``: the distillation loss is multiplied by temperature^2."""
    js_beta: float = _JS_BETA
    """Weight of the teacher in the mixture m of ``js``: b KL(t || m) + (1 - b) KL(s || m) with
    m = b t + (1 - b) s (2306.13649, eq. 1)."""
    top_k: int | None = None
    """Logits of each token, the teacher's largest ones, that ``top_k`` and ``top_k_tail`` read."""
    chunk_size: int = 256
    """Tokens whose logits are in memory at one time."""
    kd_weight: float = 1.0
    """Weight of the distillation loss on the logits."""
    ce_weight: float = 0.0
    """Weight of the language-model loss added to the distillation loss."""
    mtp_weight: float = field(default=0.1, metadata=ADDED)
    """Weight of the same losses on what the student's layer for multi-token prediction says, if it
    has one, against the teacher's; against the labels alone where the teacher has none."""
    offload_teacher: bool = field(default=False, metadata=NEUTRAL)
    """Keep the teacher's weights, all but its output layer, in host memory between its passes."""
    intermediate: IntermediateConfig = field(default_factory=IntermediateConfig)

    def __post_init__(self) -> None:
        """Check names, ranges and what belongs together."""
        check_values(self, "distillation.")
        self._check_temperature()
        self._check_kind_keys()
        if self.chunk_size < 1:
            raise ValueError(f"distillation.chunk_size={self.chunk_size} must be at least 1")
        for name in ("kd_weight", "ce_weight", "mtp_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"distillation.{name}={getattr(self, name)} must not be negative")
        if self.kd_weight == self.ce_weight == 0:
            raise ValueError(
                "distillation.kd_weight=0 and distillation.ce_weight=0 leave no loss; set one of "
                "them above 0"
            )
        if self.kd_weight == 0 and self.intermediate.losses and self.intermediate.dynamic:
            raise ValueError(
                "distillation.intermediate.alpha=dynamic follows the loss on the logits, which "
                "distillation.kd_weight=0 switches off; set distillation.intermediate.alpha to a "
                "number or distillation.kd_weight above 0"
            )

    def _check_temperature(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"distillation.temperature={self.temperature} must be above 0")
        if self.loss in RAW_LOSSES and self.temperature != 1.0:
            raise ValueError(
                f"distillation.temperature={self.temperature} has no meaning for "
                f"distillation.loss={self.loss}, which compares logits; leave it at 1, or choose "
                "forward_kl, reverse_kl, js, top_k or top_k_tail"
            )

    def _check_kind_keys(self) -> None:
        if not 0 < self.js_beta < 1:
            raise ValueError(f"distillation.js_beta={self.js_beta} must be between 0 and 1")
        if self.js_beta != _JS_BETA and self.loss != "js":
            raise ValueError(
                f"distillation.js_beta={self.js_beta} is for distillation.loss=js, not "
                f"{self.loss}; leave it out or set distillation.loss=js"
            )
        if self.loss in TOP_K_LOSSES and self.top_k is None:
            raise ValueError(f"distillation.loss={self.loss} needs distillation.top_k=<number>")
        if self.top_k is None:
            return
        if self.loss not in TOP_K_LOSSES:
            raise ValueError(
                f"distillation.top_k={self.top_k} is for distillation.loss=top_k or top_k_tail, "
                f"not {self.loss}; leave it out or change distillation.loss"
            )
        if self.top_k < 1:
            raise ValueError(f"distillation.top_k={self.top_k} must be at least 1")

    @property
    def kd_scale(self) -> float:
        """Factor of the distillation loss itself: temperature^2 where that was asked for."""
        return self.temperature**2 if self.temperature_scaling == "square" else 1.0

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse a ``top_k`` above the vocabulary.

        Args:
            vocab_size: true (unpadded) vocabulary of both models.
        """
        if self.top_k is not None and self.top_k > vocab_size:
            raise ValueError(
                f"distillation.top_k={self.top_k} is larger than the vocabulary of {vocab_size}; "
                f"set distillation.top_k to {vocab_size} or less"
            )
