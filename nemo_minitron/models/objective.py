"""Training objectives: labels, a resident teacher or stored outputs; sums and weights."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import NamedTuple  # that of Python 3.10 cannot be generic

from nemo_minitron.config.distillation import DistillationConfig, IntermediateConfig
from nemo_minitron.distillation.logit_loss import TeacherStates, logit_loss
from nemo_minitron.distillation.logit_shards import stored_targets
from nemo_minitron.distillation.top_k import TopKTargets
from nemo_minitron.distillation.vocab import VocabShard
from nemo_minitron.models.build import unwrap
from nemo_minitron.models.hidden import logit_cap, output_weight
from nemo_minitron.models.intermediate import IntermediateLosses
from nemo_minitron.models.overlap import await_weight
from nemo_minitron.models.prediction import final_states, shifted
from nemo_minitron.models.schedule import Batch, gathered_hidden, tokens_first
from nemo_minitron.models.teacher import Teacher
from nemo_minitron.runtime.groups import ParallelGroups
from nemo_minitron.runtime.launch import device

Number = TypeVar("Number")


class StepSums(NamedTuple, Generic[Number]):
    """Sums over target tokens: tensors on the device, or numbers on the host.

    Attributes:
        kd: the distillation loss on the logits.
        ce: the cross entropy.
        tokens: the number of target tokens.
        mtp: the loss of the layer for multi-token prediction, 0 without one.
    """

    kd: Number
    ce: Number
    tokens: Number
    mtp: Number


def micro_batch_loss(
    model: nn.Module,
    batch: Batch,
    hidden: Tensor,
    teacher: TeacherStates | TopKTargets | None,
    settings: DistillationConfig,
    shard: VocabShard,
) -> tuple[Tensor, StepSums[Tensor]]:
    """Return the summed loss of a micro-batch, and its parts (last stage).

    Args:
        model: the chunk with the output layer, wrapped for training or not.
        batch: the micro-batch.
        hidden: its final hidden state.
        teacher: what the logits are compared with.
        settings: the losses and their weights.
        shard: rows of the vocabulary on this rank.
    """
    chunk = unwrap(model)
    own, *further = final_states(chunk, hidden)
    await_weight(model, output_weight(chunk))
    total, (kd, ce) = _loss_on(chunk, batch, own, teacher, settings, shard)
    mtp = torch.zeros_like(kd)
    if further:
        predicted, mtp = _prediction_loss(chunk, batch, further[0], teacher, settings, shard)
        total = total + settings.mtp_weight * predicted
    return total, StepSums(kd, ce, batch["loss_mask"].sum().to(kd), mtp)


def _loss_on(
    chunk: Any,
    batch: Batch,
    hidden: Tensor,
    teacher: TeacherStates | TopKTargets | None,
    settings: DistillationConfig,
    shard: VocabShard,
) -> tuple[Tensor, Tensor]:
    """``logit_loss`` of the states of one kind; see ``micro_batch_loss``."""
    labels, mask = tokens_first(batch)
    return logit_loss(
        gathered_hidden(hidden, chunk),
        output_weight(chunk),
        labels,
        mask.to(torch.float32),
        settings,
        shard,
        teacher,
        reduce_grad=not chunk.config.sequence_parallel,
        cap=logit_cap(chunk),
    )


def _prediction_loss(
    chunk: Any,
    batch: Batch,
    hidden: Tensor,
    teacher: TeacherStates | TopKTargets | None,
    settings: DistillationConfig,
    shard: VocabShard,
) -> tuple[Tensor, Tensor]:
    """Return the loss of the layer for multi-token prediction, to be trained on and as a number.

    It is that of the logits against the teacher's of the same kind, and the cross entropy where
    the teacher has none (docs/design/mtp.md).
    """
    group = chunk.pg_collection.cp
    later = {name: shifted(batch[name], group) for name in ("labels", "loss_mask")}
    if isinstance(teacher, TeacherStates) and teacher.predicting is not None:
        teacher = replace(teacher, hidden=teacher.predicting)
    else:
        teacher, settings = None, replace(settings, kd_weight=0.0, ce_weight=1.0)
    loss, (kd, ce) = _loss_on(chunk, later, hidden, teacher, settings, shard)
    return loss, settings.kd_weight * kd + settings.ce_weight * ce


def on_host(sums: StepSums[Tensor]) -> StepSums[float]:
    """Copy the sums to the host, which waits for the device once."""
    return StepSums(*torch.stack(sums).tolist())


def add_up(parts: Sequence[StepSums[Tensor]]) -> StepSums[Tensor]:
    """Add up the sums of several passes; no passes add up to zeros."""
    if not parts:
        return StepSums(*torch.zeros(len(StepSums._fields), device=device()))
    return StepSums(*torch.stack([torch.stack(part) for part in parts]).sum(0))


def reduced(parts: Sequence[StepSums[Tensor]], groups: ParallelGroups) -> StepSums[Tensor]:
    """Return sums of the global batch, the same on every rank (collective).

    Args:
        parts: the sums of this rank's micro-batches on the last pipeline stage, else empty.
        groups: this rank's process groups.
    """
    total = torch.stack(add_up(parts))
    dist.all_reduce(total, group=groups.dp_cp)
    dist.broadcast(total, src=groups.last_stage_global_rank, group=groups.pp)
    return StepSums(*total)


def losses_per_token(sums: StepSums[float], config: DistillationConfig) -> dict[str, float]:
    """Return the losses per token: ``loss`` is what was trained on, its parts follow."""
    count = max(sums.tokens, 1.0)
    trained = config.kd_weight * sums.kd + config.ce_weight * sums.ce
    losses = {"loss": (trained + config.mtp_weight * sums.mtp) / count}
    if sums.mtp:
        losses["mtp_loss"] = sums.mtp / count
    if config.kd_weight:
        losses["kd_loss"] = sums.kd / count
    if config.ce_weight:
        losses["lm_loss"] = sums.ce / count
    return losses


class Objective(Protocol):
    """Gives the teacher's side of the loss for every micro-batch of a global batch."""

    def prepare(self, micro_batches: list[Batch], *, train: bool) -> None:
        """Do what comes before the student's pass over a global batch (a call of every rank)."""

    def targets(
        self, index: int, batch: Batch, *, keep: bool
    ) -> TeacherStates | TopKTargets | None:
        """Return what the student's logits of a micro-batch are compared with (last stage only).

        Args:
            index: number of the micro-batch in its global batch.
            batch: the micro-batch.
            keep: whether the same targets are asked for again.
        """


class LabelsAlone:
    """No teacher: the loss is the cross entropy of the labels."""

    def prepare(self, micro_batches: list[Batch], *, train: bool) -> None:
        """Prepare nothing: there is no teacher."""

    def targets(self, index: int, batch: Batch, *, keep: bool) -> None:
        """Return None: there is no teacher to compare with."""


class StoredOutputs:
    """A teacher that ran before: its largest logits come with the samples (``StoredTeacher``)."""

    def __init__(self, temperature: float) -> None:
        """Remember the softmax temperature of the stored normalisers."""
        self.temperature = temperature

    def prepare(self, micro_batches: list[Batch], *, train: bool) -> None:
        """Prepare nothing: the batches hold the targets."""

    def targets(self, index: int, batch: Batch, *, keep: bool) -> TopKTargets:
        """Read the targets from the batch."""
        return stored_targets(batch, self.temperature)


class ResidentTeacher:
    """A teacher on the same ranks, which sees the whole global batch before the student."""

    def __init__(self, teacher: Teacher, intermediate: IntermediateLosses | None) -> None:
        """Take the frozen model and the losses that also read its inner states."""
        self.teacher, self.intermediate = teacher, intermediate
        self._states: dict[int, Tensor] = {}

    def prepare(self, micro_batches: list[Batch], *, train: bool) -> None:
        """Run the teacher; in training its inner states travel to the stages that need them."""
        inner = self.intermediate if train else None
        with inner.captured(micro_batches) if inner else nullcontext():
            self._states = dict(enumerate(self.teacher.hidden_states(micro_batches)))

    def targets(self, index: int, batch: Batch, *, keep: bool) -> TeacherStates:
        """Return final hidden state of a micro-batch; its memory is freed after the last use."""
        hidden = self._states[index] if keep else self._states.pop(index)
        return teacher_states(self.teacher, hidden)


def teacher_states(teacher: Teacher, hidden: Tensor) -> TeacherStates:
    """Return the teacher's states that the losses read (last stage).

    Args:
        teacher: the frozen model.
        hidden: what its last chunk returned for a micro-batch.
    """
    chunk = teacher.chunks[-1]
    rows, *further = (gathered_hidden(state, chunk) for state in final_states(chunk, hidden))
    predicting = further[0] if further else None
    return TeacherStates(rows, teacher.output_weight, teacher.logit_cap, predicting)


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
        self._before = self.value

    def begin_step(self, measure: Callable[[], object] = lambda: None) -> Tensor:
        """Return the weight of the training step that begins; 0 while there is no value.

        Args:
            measure: is called where there is no value yet, and may give one (``update_alpha``).
        """
        self._before = self.value
        if self.value is None:
            measure()
        self.used = self._zero if self.value is None else self.value
        return self.used

    def put_back(self) -> None:
        """Forget what the step that ran last made of the weight."""
        self.value = self._before

    def update_alpha(self, sums: StepSums[Tensor], inner: Tensor) -> None:
        """Take the sums of a pass over a global batch.

        Args:
            sums: those of the loss on the logits.
            inner: sum of each intermediate loss, the same on every rank.
        """
        if not self.dynamic:
            return
        ratio = self.kd_weight * sums.kd.double() / inner.double().sum()
        # Nothing to compare in a batch without target tokens: the ratio before stays.
        valid = (ratio > 0) & torch.isfinite(ratio)
        if self.value is not None:
            self.value = torch.where(valid, ratio, self.value)
        elif valid.item():  # the host waits here before the first step alone
            self.value = ratio

    def state_dict(self) -> dict[str, float | None]:
        """Return the state for the training checkpoint."""
        return {"alpha": None if self.value is None else self.value.item()}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Restore what ``state_dict`` returned."""
        alpha = state["alpha"]
        self.value = None if alpha is None else self._zero + alpha
