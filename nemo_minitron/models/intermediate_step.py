"""Intermediate losses over training steps: their weight, their numbers, their checkpoint."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_minitron.models.build import HiddenGPTModel
from nemo_minitron.models.intermediate import IntermediateLosses, loss_name
from nemo_minitron.models.projection import PROJECTION, sum_gradients
from nemo_minitron.models.schedule import Batch

_START_AGAIN = "set overwrite=true to start again, or distillation.intermediate.losses=[]"


class IntermediateStep:
    """Alpha and what becomes of it.

    ``dynamic`` makes alpha L_logits / L_is (2407.14679, section 3). A stage in front of the last
    needs it before the loss on the logits of its own batch exists, so it is the ratio of the sums
    over the global batch before; the first batch is measured by a forward-only pass. All ranks
    divide the same reduced sums, so alpha is the same everywhere. It stays on the device: the host
    does not wait for it, but to log or save it.

    Attributes:
        losses: the losses.
        alpha: weight of the next step, fp64 scalar; None until a batch with both losses above 0
            was seen.
    """

    def __init__(self, losses: IntermediateLosses, kd_weight: float) -> None:
        self.losses = losses
        self.kd_weight = kd_weight
        self._zero = torch.zeros((), dtype=torch.float64, device=losses.sums.device)
        dynamic = losses.config.dynamic
        self.alpha: Tensor | None = None if dynamic else self._zero + float(losses.config.alpha)
        self._used = self._zero
        self._scale: Callable[[Tensor], Any] | None = None

    # ---- one global batch

    @contextmanager
    def captured(self, micro_batches: Sequence[Batch]) -> Iterator[None]:
        """Around the teacher's pass: its mapped states reach the stages that need them."""
        with self.losses.capture():
            yield
        self.losses.deliver(micro_batches)

    @property
    def measures_first(self) -> bool:
        """Whether alpha has to be measured before this step."""
        return self.alpha is None

    def measured(
        self, chunks: Sequence[HiddenGPTModel], micro_batches: Sequence[Batch]
    ) -> AbstractContextManager[None]:
        """Around a forward-only pass of the student: counts the losses."""
        return self.losses.attached(chunks, micro_batches, None)

    def trained(
        self, chunks: Sequence[HiddenGPTModel], micro_batches: Sequence[Batch]
    ) -> AbstractContextManager[None]:
        """Around the student's schedule: the losses join the backward, weighted by alpha."""
        self._used = weight = self._zero if self.alpha is None else self.alpha
        if self._scale is not None:
            weight = self._scale(weight).reshape(())
        return self.losses.attached(chunks, micro_batches, weight)

    def follow(self, sums: Tensor) -> None:
        """Take the sums of a pass: ``[KD, CE, tokens]`` over the global batch (collective)."""
        total = self.losses.reduced().double().sum()
        if not self.losses.config.dynamic:
            return
        logits = self.kd_weight * sums[0].double()
        # Nothing to compare in a batch without target tokens: the ratio before stays.
        valid = (logits > 0) & (total > 0)
        if self.alpha is not None:
            self.alpha = torch.where(valid, logits / total, self.alpha)
        elif valid.item():  # the host waits here before the first step alone
            self.alpha = logits / total

    def add_to(self, losses: dict[str, float], kd: float, tokens: float) -> dict[str, float]:
        """Per-token losses of the step, in the order in which they are logged."""
        tokens = max(tokens, 1.0)
        parts = {
            f"intermediate/{loss_name(pair)}": value / tokens
            for pair, value in zip(self.losses.pairs, self.losses.sums.tolist(), strict=True)
        }
        alpha = self._used.item()
        loss = losses["loss"] + alpha * sum(parts.values())
        return {**losses, "loss": loss, "kd_loss": kd / tokens, "alpha": alpha, **parts}

    # ---- training

    def finalize_with(self, config: TransformerConfig) -> None:
        """Extend what Megatron does when all gradients of a batch are there.

        Args:
            config: the one config that all student chunks share.
        """
        self._scale = config.grad_scale_func
        if self.losses.projected:
            before = config.finalize_model_grads_func
            config.finalize_model_grads_func = partial(self._finalize, before)

    def _finalize(self, before: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        before(*args, **kwargs)
        shape = (self.losses.teacher.hidden_size, self.losses.student.hidden_size)
        losses = self.losses
        sum_gradients(losses.projections, shape, losses.groups.pp, losses.sums.device)

    # ---- checkpoint

    def state_dict(self) -> dict[str, float | None]:
        """What the next step needs."""
        return {"alpha": None if self.alpha is None else self.alpha.item()}

    def load_state_dict(self, state: dict[str, float | None] | None) -> None:
        """From the checkpoint.

        Raises:
            ValueError: it was written without intermediate losses.
        """
        if state is None:
            raise ValueError(
                f"the training checkpoint was written without {self._losses}; {_START_AGAIN}"
            )
        alpha = state["alpha"]
        self.alpha = None if alpha is None else self._zero + alpha

    @property
    def _losses(self) -> str:
        return f"distillation.intermediate.losses=[{','.join(self.losses.config.losses)}]"

    def check_checkpoint(self, folder: Path) -> None:
        """Refuse a training checkpoint without the projection.

        Raises:
            ValueError: it was written by a run that had none.
        """
        key = f"{PROJECTION}.weight"
        if self.losses.projected and key not in dist_checkpointing.load_tensors_metadata(
            str(folder)
        ):
            raise ValueError(
                f"{folder} has no {key}, which {self._losses} trains because student and teacher "
                f"differ in hidden_size; {_START_AGAIN}"
            )
