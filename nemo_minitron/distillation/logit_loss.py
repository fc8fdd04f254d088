"""Distillation and language-model losses straight from hidden states.

Both output layers, the softmaxes, the loss and its gradients are done a chunk of tokens at a time,
on vocabulary shards, so logits of at most ``chunk_size`` tokens exist at any moment. Gradients are
made in the forward pass (they cost no second matrix product) and scaled in the backward.

Shape letters: N tokens (sequence x micro-batch, full sequence), c tokens of a chunk, h and H
student and teacher width, v local vocabulary rows without padding. Torch only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.config.distillation import DistillationConfig
from nemo_minitron.distillation.divergences import loss_function
from nemo_minitron.distillation.top_k import TopKTargets, top_k_targets
from nemo_minitron.distillation.vocab import VocabShard, all_reduce, softmax_

# Elements of logits that a CPU works on at a time, so that a loss's passes over them hit the cache.
_CACHED = 1 << 17


@dataclass(frozen=True)
class TeacherStates:
    """A teacher whose logits are made as they are needed."""

    hidden: Tensor
    """``[N, H]`` final hidden state, the same on every rank of the group."""
    weight: Tensor
    """``[rows, H]`` local rows of the output layer, over the student's vocabulary."""
    cap: float | None = None
    """What no logit exceeds, as in ``capped_``; None without a soft cap."""
    predicting: Tensor | None = None
    """``[N, H]`` final state of its layer for multi-token prediction, if it has one."""


@dataclass(frozen=True)
class _Job:
    """Arguments of a call besides the student's hidden state and weight."""

    labels: Tensor
    """``[N]``."""
    mask: Tensor
    """``[N]``."""
    config: DistillationConfig
    shard: VocabShard
    resident: TeacherStates | None
    stored: TopKTargets | None
    """Stored outputs in place of ``resident``; without both only the LM loss is left."""
    need_grad: bool
    reduce_grad: bool
    cap: float | None
    """Soft cap of the student's logits; None without one."""

    @property
    def with_teacher(self) -> bool:
        return self.resident is not None or self.stored is not None

    @property
    def with_ce(self) -> bool:
        return bool(self.config.ce_weight) or not self.with_teacher or not self.need_grad

    def targets(self, tokens: slice, logits: Tensor | None) -> Tensor | TopKTargets:
        """Return the teacher's side of the loss: ``[c, v]`` logits or ``TopKTargets``."""
        if self.config.top_k is not None and self.stored is not None:
            return self.stored.rows(tokens, self.config.top_k)
        assert logits is not None
        if self.config.top_k is None:
            return logits
        return top_k_targets(logits, self.config.top_k, self.config.temperature, self.shard)


def _ce(
    student: Tensor, labels: Tensor, weight: Tensor, shard: VocabShard, *, stay: bool
) -> tuple[Tensor, Tensor]:
    """Return local part of the weighted cross-entropy sum and its gradient by the student logits.

    The gradient takes the place of the logits ``[c, v]``, unless they are to stay.
    """
    column, mine = shard.local(labels)
    picked = student.gather(-1, column[:, None]).squeeze(-1) if student.size(-1) else None
    grad = student.clone() if stay else student
    (log_z,) = softmax_([grad], shard)
    if picked is None:
        return log_z.new_zeros(()), grad
    # log_z is the same on every rank of the group: the rank that owns the label adds it.
    loss = torch.where(mine, log_z.squeeze(-1) - picked, 0.0) @ weight
    grad.scatter_add_(-1, column[:, None], -mine.to(grad.dtype)[:, None])
    return loss, grad.mul_(weight[:, None])


def _blocks(rows: slice, logits: Tensor, shard: VocabShard) -> Iterator[tuple[slice, slice]]:
    """Cut a chunk into blocks: slices of all tokens and of the chunk.

    One block where each would cost collectives, or kernel launches.
    """
    count, size = logits.size(0), logits.size(0)
    if logits.device.type == "cpu" and shard.group.size() == 1:
        size = max(1, _CACHED // max(1, logits.size(1)))
    for start in range(0, count, size):
        stop = min(start + size, count)
        yield slice(rows.start + start, rows.start + stop), slice(start, stop)


def capped_(logits: Tensor, cap: float | None) -> Tensor:
    """``cap * tanh(logits / cap)`` in place of the logits, where there is a cap."""
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def _output_layer(hidden: Tensor, weight: Tensor, buffer: Tensor, cap: float | None) -> Tensor:
    """Return ``[c, v]`` logits in the precision of ``buffer``, whose first c rows they fill."""
    out = buffer[: hidden.size(0)]
    if out.dtype == weight.dtype:
        torch.mm(hidden, weight.t(), out=out)
    else:
        out.copy_(hidden @ weight.t())
    return capped_(out, cap)


def _add_outer(out: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """Add ``grad^T hidden`` to ``out``, fp32; half-precision factors stay as they are."""
    if out.dtype == grad.dtype:
        out.addmm_(grad.t(), hidden)
    else:
        out.add_(grad.t() @ hidden)


def _kd(job: _Job, tokens: slice, student: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the local part of the distillation sum and ``kd_weight`` times its gradient.

    Args:
        job: the call.
        tokens: which of all tokens these are.
        student: ``[c, v]`` logits, overwritten.
        teacher: the same, None where they are stored.
    """
    config, weight = job.config, job.mask[tokens]
    if config.kd_scale != 1.0:
        weight = weight * config.kd_scale
    targets = job.targets(tokens, teacher)
    loss, grad = loss_function(config.loss)(student, targets, weight, config, job.shard)
    return loss, grad if config.kd_weight == 1.0 else grad.mul_(config.kd_weight)


def _chunk_losses(
    job: _Job, rows: slice, student_logits: Tensor, teacher_logits: Tensor | None, parts: Tensor
) -> None:
    """Add ``[KD, CE]`` of a chunk to ``parts``; the gradient takes the place of its logits.

    Args:
        job: the call.
        rows: of the chunk among all tokens.
        student_logits: ``[c, v]``, overwritten with the gradient of the loss.
        teacher_logits: the same, overwritten; None without a resident teacher.
        parts: ``[2]``.
    """
    config = job.config
    for tokens, block in _blocks(rows, student_logits, job.shard):
        student = student_logits[block]
        # The derivative of capped_, before the losses overwrite its result.
        slope = None if job.cap is None else 1 - (student / job.cap).square_()
        grads = []
        if job.with_ce:
            labels, stay = job.labels[tokens], job.with_teacher
            loss, grad = _ce(student, labels, job.mask[tokens], job.shard, stay=stay)
            parts[1] += loss
            grads.append(grad if config.ce_weight == 1.0 else grad.mul_(config.ce_weight))
        if job.with_teacher:
            teacher = None if teacher_logits is None else teacher_logits[block]
            loss, grad = _kd(job, tokens, student, teacher)
            parts[0] += loss
            grads.append(grad)
        total = grads[-1] if len(grads) == 1 else grads[-1].add_(grads[0])
        if total.data_ptr() != student.data_ptr():
            student.copy_(total)
        if slope is not None:
            student.mul_(slope)


class _LogitLoss(torch.autograd.Function):
    """See ``logit_loss``."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, job: _Job) -> tuple[Tensor, Tensor]:
        config, shard = job.config, job.shard
        accumulate = torch.float64 if weight.dtype == torch.float64 else torch.float32
        grad_hidden = torch.empty_like(hidden) if job.need_grad else None
        grad_weight = torch.zeros_like(weight, dtype=accumulate) if job.need_grad else None
        weight = weight[: shard.valid]
        parts = hidden.new_zeros(2, dtype=accumulate)
        size = (min(config.chunk_size, hidden.size(0)), shard.valid)
        buffer = hidden.new_empty(size, dtype=accumulate)
        resident = job.resident
        teacher_buffer = None if resident is None else torch.empty_like(buffer)
        for start in range(0, hidden.size(0), config.chunk_size):
            rows = slice(start, min(start + config.chunk_size, hidden.size(0)))
            student = _output_layer(hidden[rows], weight, buffer, job.cap)
            teacher = None
            if resident is not None and teacher_buffer is not None:
                shown = resident.weight[: shard.valid]
                teacher = _output_layer(resident.hidden[rows], shown, teacher_buffer, resident.cap)
            _chunk_losses(job, rows, student, teacher, parts)
            if grad_hidden is not None and grad_weight is not None:
                grad = student.to(weight.dtype)
                torch.mm(grad, weight, out=grad_hidden[rows])
                _add_outer(grad_weight[: shard.valid], grad, hidden[rows])
        all_reduce(parts, shard.group)
        if job.need_grad:
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.group = shard.group if job.reduce_grad else None
        ctx.mark_non_differentiable(parts)
        # No tensor of the weights: making one would have the host wait for the device.
        return config.kd_weight * parts[0] + config.ce_weight * parts[1], parts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a second copy of the weight's gradient can be as large as the weight. A second
        # backward through the same graph is refused by autograd, which sees the change.
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_hidden.mul_(grads[0].to(grad_hidden.dtype))
        # Each rank holds the part of the gradient that flows through its vocabulary rows.
        if ctx.group is not None:
            all_reduce(grad_hidden, ctx.group)
        grad_weight.mul_(grads[0])
        return grad_hidden, grad_weight.to(grad_hidden.dtype), None


def logit_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor,
    config: DistillationConfig,
    shard: VocabShard,
    teacher: TeacherStates | TopKTargets | None = None,
    *,
    reduce_grad: bool = True,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the masked sum of distillation and LM losses, differentiable by the student.

    Args:
        hidden: ``[N, h]`` final hidden state of the student, the same on every rank of the group.
        weight: ``[rows, h]`` local rows of the student's output layer.
        labels: ``[N]`` int64 target ids.
        mask: ``[N]`` 1.0 where a token counts, 0.0 elsewhere.
        config: loss, weights, temperature and chunk size.
        shard: the local vocabulary rows.
        teacher: N tokens of a resident teacher, or stored targets for ``top_k`` and
            ``top_k_tail``. Without a teacher only the language-model loss is left.
        reduce_grad: whether to sum the gradient of the hidden state over the group; False where the
            caller does (the backward of Megatron's sequence-parallel gather is a reduce-scatter).
        cap: what no logit of the student exceeds (``capped_``).

    Returns:
        Scalar ``kd_weight * KD + ce_weight * CE`` summed over this rank's tokens (the same on
        every rank of the group) and ``[KD, CE]`` (CE only when it is weighted or no gradient is
        asked for).

    Raises:
        ValueError: stored targets cannot give the loss of ``config``.
    """
    stored = teacher if isinstance(teacher, TopKTargets) else None
    resident = teacher if isinstance(teacher, TeacherStates) else None
    if stored is not None:
        stored.check(config)
    need_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    job = _Job(labels, mask, config, shard, resident, stored, need_grad, reduce_grad, cap)
    total, parts = _LogitLoss.apply(hidden, weight, job)
    return total, parts
