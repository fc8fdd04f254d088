"""Weight of the intermediate losses: a fixed number, or the ratio of the losses (dynamic)."""

import torch
from torch import Tensor

from nemo_minitron.config.intermediate import IntermediateConfig
from nemo_minitron.models.objective import StepSums


class AlphaSchedule:
    """Gives alpha for each training step.

    ``dynamic`` makes alpha L_logits / L_is (2407.14679, section 3). A stage in front of the last
    needs it before the loss on the logits of its own batch exists, so it is the ratio of the sums
    over the global batch before; the first batch is measured by a forward-only pass. All ranks
    divide the same reduced sums, so alpha is the same everywhere. It stays on the device: the host
    waits for it only when it is logged or saved.

    Attributes:
        value: weight of the next step, fp64 scalar; None until a batch with both losses above 0
            was seen.
        used: weight of the step that ran last.
    """

    def __init__(self, config: IntermediateConfig, kd_weight: float, device: torch.device) -> None:
        """Start with the fixed number, or with no value yet.

        Args:
            config: gives the fixed number, or says that alpha is dynamic.
            kd_weight: weight of the distillation loss on the logits.
            device: of this rank.
        """
        self.dynamic, self.kd_weight = config.dynamic, kd_weight
        self._zero = torch.zeros((), dtype=torch.float64, device=device)
        self.value: Tensor | None = None if self.dynamic else self._zero + float(config.alpha)
        self.used = self._zero

    def begin_step(self) -> Tensor:
        """Weight of the training step that begins; 0 while there is no value."""
        self.used = self._zero if self.value is None else self.value
        return self.used

    def update_alpha(self, sums: StepSums[Tensor], inner: Tensor) -> None:
        """Take the sums of a pass over a global batch.

        Args:
            sums: those of the loss on the logits.
            inner: sum of each intermediate loss, the same on every rank.
        """
        if not self.dynamic:
            return
        logits, total = self.kd_weight * sums.kd.double(), inner.double().sum()
        # Nothing to compare in a batch without target tokens: the ratio before stays.
        valid = (logits > 0) & (total > 0)
        if self.value is not None:
            self.value = torch.where(valid, logits / total, self.value)
        elif valid.item():  # the host waits here before the first step alone
            self.value = logits / total

    def state_dict(self) -> dict[str, float | None]:
        """State for the training checkpoint."""
        return {"alpha": None if self.value is None else self.value.item()}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Restore what ``state_dict`` returned."""
        alpha = state["alpha"]
        self.value = None if alpha is None else self._zero + alpha
