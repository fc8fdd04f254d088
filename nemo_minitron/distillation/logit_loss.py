"""Distillation and language-model losses straight from hidden states.

Both output layers, the softmaxes, the loss and its gradients are done a chunk of tokens at a time,
on vocabulary shards, so logits of at most ``chunk_size`` tokens exist at any moment. Gradients are
made in the forward pass (they cost no second matrix product) and scaled in the backward.

Shape letters: N tokens (sequence x micro-batch, full sequence), c tokens of a chunk, h and H
student and teacher width, v local vocabulary rows without padding. Torch only.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup


@dataclass(frozen=True)
class VocabShard:
    """The vocabulary rows of this tensor-parallel rank.

    Attributes:
        group: tensor-parallel group.
        vocab_size: true (unpadded) global vocabulary.
        rows: rows of the local weight, padding included (the same on every rank).
    """

    group: Group
    vocab_size: int
    rows: int

    @property
    def start(self) -> int:
        """Global id of the first local row."""
        return self.group.rank() * self.rows

    @property
    def valid(self) -> int:
        """Local rows that are real vocabulary; may be 0 on the last ranks."""
        return max(0, min(self.rows, self.vocab_size - self.start))


@dataclass(frozen=True)
class LogitLossConfig:
    """What is summed: ``kd_weight * KL(teacher || student) + ce_weight * CE(labels)``."""

    temperature: float = 1.0
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    chunk_size: int = 256
    reduce_grad: bool = True
    """Sum the gradient of the hidden state over the group; False where the caller does (the
    backward of Megatron's sequence-parallel gather is a reduce-scatter)."""


def all_reduce(tensor: Tensor, group: Group, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """In-place all-reduce; nothing happens in a group of one."""
    if group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


def log_normalizers(logits: list[Tensor], shard: VocabShard) -> list[Tensor]:
    """Log of the softmax denominators over the whole vocabulary.

    Args:
        logits: ``[c, v]`` fp32 local logits of several models; ``v`` may be 0.
        shard: the vocabulary shard.

    Returns:
        ``[c, 1]`` for each model. Two collectives in all, whatever the number of models.
    """
    floor = torch.finfo(torch.float32).min
    peak = torch.stack(
        [x.amax(-1) if x.size(-1) else x.new_full(x.shape[:1], floor) for x in logits]
    )
    all_reduce(peak, shard.group, dist.ReduceOp.MAX)
    total = torch.stack(
        [(x - m[:, None]).exp_().sum(-1) for x, m in zip(logits, peak, strict=True)]
    )
    all_reduce(total, shard.group)
    return list((peak + total.log()).unsqueeze(-1))


def _label_columns(labels: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Local column of every label and whether this rank holds it."""
    column = labels - shard.start
    mine = (column >= 0) & (column < shard.valid)
    return torch.where(mine, column, 0), mine


def _kd_chunk(
    student: Tensor, teacher: Tensor, mask: Tensor, config: LogitLossConfig, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """Local part of the masked KL sum and its gradient by the student logits.

    KL(t || s) = sum_v p_t (log p_t - log p_s); d/dlogits_s = (p_s - p_t) / T (2407.14679, sec. 3).
    Both inputs are overwritten: the gradient takes the place of ``student``.
    """
    if config.temperature != 1.0:
        student.div_(config.temperature)
        teacher.div_(config.temperature)
    log_zs, log_zt = log_normalizers([student, teacher], shard)
    log_ps, log_pt = student.sub_(log_zs), teacher.sub_(log_zt)
    difference = log_pt - log_ps
    pt = log_pt.exp_()
    loss = torch.linalg.vecdot(pt, difference) @ mask
    return loss, log_ps.exp_().sub_(pt).mul_((mask / config.temperature)[:, None])


def _ce_chunk(
    student: Tensor, labels: Tensor, mask: Tensor, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """Local part of the masked cross-entropy sum and its gradient by the student logits."""
    (log_z,) = log_normalizers([student], shard)
    column, mine = _label_columns(labels, shard)
    grad = (student - log_z).exp_()
    if student.size(-1) == 0:
        return log_z.new_zeros(()), grad
    picked = student.gather(-1, column[:, None]).squeeze(-1)
    # log_z is the same on every rank of the group: the rank that owns the label adds it.
    loss = torch.where(mine, log_z.squeeze(-1) - picked, 0.0) @ mask
    grad.scatter_add_(-1, column[:, None], -mine.to(grad.dtype)[:, None])
    return loss, grad * mask[:, None]


def _weighted_sum(grads: list[tuple[float, Tensor]]) -> Tensor:
    """Sum of ``weight * grad``, in place of the first one."""
    weight, total = grads[0]
    if weight != 1.0:
        total.mul_(weight)
    for weight, grad in grads[1:]:
        total.add_(grad, alpha=weight)
    return total


def _add_outer(out: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """``out += grad^T hidden`` with ``out`` in fp32 and half-precision factors left as they are."""
    if out.dtype == grad.dtype:
        out.addmm_(grad.t(), hidden)
    else:
        out.add_(grad.t() @ hidden)


class _LogitLoss(torch.autograd.Function):
    """See ``logit_loss``."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        labels: Tensor,
        mask: Tensor,
        config: LogitLossConfig,
        shard: VocabShard,
        need_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        grad_hidden = torch.empty_like(hidden) if need_grad else None
        accumulate = torch.float64 if weight.dtype == torch.float64 else torch.float32
        grad_weight = torch.zeros_like(weight, dtype=accumulate) if need_grad else None
        local_weight = weight[: shard.valid]
        parts = hidden.new_zeros(2, dtype=accumulate)
        for start in range(0, hidden.size(0), config.chunk_size):
            rows = slice(start, start + config.chunk_size)
            logits = (hidden[rows] @ local_weight.t()).to(accumulate)
            grads = []
            if config.ce_weight or teacher_hidden is None or not need_grad:
                loss, grad = _ce_chunk(logits, labels[rows], mask[rows], shard)
                parts[1] += loss
                grads.append((config.ce_weight, grad))
            if teacher_hidden is not None and teacher_weight is not None:
                teacher = (teacher_hidden[rows] @ teacher_weight[: shard.valid].t()).to(accumulate)
                loss, grad = _kd_chunk(logits, teacher, mask[rows], config, shard)
                parts[0] += loss
                grads.append((config.kd_weight, grad))
            if grad_hidden is not None and grad_weight is not None:
                total = _weighted_sum(grads).to(weight.dtype)
                torch.matmul(total, local_weight, out=grad_hidden[rows])
                _add_outer(grad_weight[: shard.valid], total, hidden[rows])
        all_reduce(parts, shard.group)
        if need_grad:
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.group = shard.group if config.reduce_grad else None
        ctx.mark_non_differentiable(parts)
        # No tensor of the weights: making one would have the host wait for the device.
        return parts[0] * config.kd_weight + parts[1] * config.ce_weight, parts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grads[0]
        grad_hidden = grad_hidden * scale.to(grad_hidden.dtype)
        # Each rank holds the part of the gradient that flows through its vocabulary rows.
        if ctx.group is not None:
            all_reduce(grad_hidden, ctx.group)
        grad_weight = (grad_weight * scale).to(grad_hidden.dtype)
        return grad_hidden, grad_weight, *[None] * 7


def logit_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor,
    config: LogitLossConfig,
    shard: VocabShard,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Masked sum of the distillation and language-model losses, differentiable by the student.

    Args:
        hidden: ``[N, h]`` final hidden state of the student, the same on every rank of the group.
        weight: ``[rows, h]`` local rows of the student's output layer.
        labels: ``[N]`` int64 target ids.
        mask: ``[N]`` 1.0 where a token counts, 0.0 elsewhere.
        config: weights, temperature and chunk size.
        shard: the local vocabulary rows.
        teacher_hidden: ``[N, H]``; None leaves only the language-model loss.
        teacher_weight: ``[rows', H]`` local rows of the teacher's output layer, same vocabulary.

    Returns:
        Scalar ``kd_weight * KD + ce_weight * CE`` summed over this rank's tokens (the same on
        every rank of the group) and ``[KD, CE]`` (CE only when it is weighted or no gradient is
        asked for).
    """
    need_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LogitLoss.apply(
        hidden, weight, teacher_hidden, teacher_weight, labels, mask, config, shard, need_grad
    )
