"""Distillation from the teacher's k largest logits of each token, resident teacher or stored ones.

Torch only. Letters: N tokens, c tokens of a chunk, k entries, v local vocabulary rows without
padding, p and q probabilities of teacher and student at temperature T.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_minitron.config.distillation import DistillationConfig
from nemo_minitron.distillation.vocab import VocabShard, all_reduce, log_normalizer


@dataclass(frozen=True)
class TopKTargets:
    """Top-k targets, equal on every rank of the tensor-parallel group.

    Attributes:
        values: ``[N, k]`` fp32 raw teacher logits (temperature 1), largest first.
        ids: ``[N, k]`` int64 global vocabulary ids, different within a token.
        log_z: ``[N]`` fp32 log of the sum of ``exp(logit / temperature)`` over the whole
            vocabulary. Only ``top_k_tail`` reads it.
        temperature: at which ``log_z`` was taken. The normaliser at one temperature does not tell
            that at another, so ``top_k_tail`` refuses any other temperature.
    """

    values: Tensor
    ids: Tensor
    log_z: Tensor
    temperature: float = 1.0

    def rows(self, rows: slice, k: int) -> "TopKTargets":
        """Return the first ``k`` entries of some tokens."""
        return TopKTargets(
            self.values[rows, :k], self.ids[rows, :k], self.log_z[rows], self.temperature
        )

    def check(self, config: DistillationConfig) -> None:
        """Refuse losses that these targets cannot give.

        Raises:
            ValueError: names the keys to change.
        """
        if config.top_k is None:
            raise ValueError(
                f"distillation.loss={config.loss} reads the teacher's whole vocabulary, but only "
                f"its {self.values.size(1)} largest logits were stored; set distillation.loss to "
                "top_k or top_k_tail"
            )
        if config.top_k > self.values.size(1):
            raise ValueError(
                f"distillation.top_k={config.top_k} is above the {self.values.size(1)} logits "
                f"stored of each token; set distillation.top_k to {self.values.size(1)} or less"
            )
        if config.loss == "top_k_tail" and config.temperature != self.temperature:
            raise ValueError(
                f"distillation.temperature={config.temperature} differs from {self.temperature}, "
                "at which the stored normaliser was taken and which top_k_tail needs; set "
                f"distillation.temperature={self.temperature} or distillation.loss=top_k"
            )


def _largest(x: Tensor, k: int) -> Tensor:
    """Return ``[c, k]`` columns of the largest entries of ``[c, n]``, largest first.

    Of equal entries the lower column wins, so that layouts agree (ties are common under bf16).
    """
    edge = x.topk(k, dim=-1).values[:, -1:]
    n = x.size(-1)
    back = torch.arange(n, 0, -1, device=x.device, dtype=torch.float32)
    rank = torch.where(x > edge, back + n, torch.where(x == edge, back, 0.0))
    columns = rank.topk(k, dim=-1).indices.sort(-1).values
    order = x.gather(-1, columns).argsort(dim=-1, descending=True, stable=True)
    return columns.gather(-1, order)


def _candidates(logits: Tensor, k: int, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """``[c, k]`` largest local logits and their global ids, filled up with -inf and no id."""
    tokens, v = logits.shape
    values = logits.new_full((tokens, k), -torch.inf)
    ids = torch.full((tokens, k), shard.vocab_size, device=logits.device)
    held = min(k, v)
    if held:
        columns = _largest(logits, held)
        values[:, :held] = logits.gather(-1, columns)
        ids[:, :held] = columns + shard.start
    return values, ids


def _gathered(x: Tensor, shard: VocabShard) -> Tensor:
    """Return ``[c, k]`` of every rank side by side: ``[c, tp * k]``."""
    parts = [torch.empty_like(x) for _ in range(shard.group.size())]
    dist.all_gather(parts, x, group=shard.group)
    return torch.cat(parts, -1)


def top_k_targets(logits: Tensor, k: int, temperature: float, shard: VocabShard) -> TopKTargets:
    """The k largest logits over the whole vocabulary: k x TP candidates travel, no logits do.

    Args:
        logits: ``[c, v]`` raw local teacher logits, fp32 or fp64; ``v`` may be 0.
        k: at most the true vocabulary.
        temperature: of the normaliser.
        shard: the vocabulary shard.
    """
    values, ids = _candidates(logits, k, shard)
    if shard.group.size() > 1:
        values, ids = _gathered(values, shard), _gathered(ids, shard)
        columns = _largest(values, k)
        values, ids = values.gather(-1, columns), ids.gather(-1, columns)
    tempered = logits if temperature == 1.0 else logits / temperature
    return TopKTargets(values, ids, log_normalizer(tempered, shard).squeeze(-1), temperature)


def _picked(
    student: Tensor, teacher: TopKTargets, shard: VocabShard
) -> tuple[Tensor, Tensor, Tensor]:
    """``[c, k]``: student logits at the teacher's ids (global), local columns, which are here."""
    column, mine = shard.local(teacher.ids)
    if student.size(-1) == 0:
        picked = student.new_zeros(column.shape)
    else:
        picked = torch.where(mine, student.gather(-1, column), 0.0)
    return all_reduce(picked, shard.group), column, mine


def _add_entries(grad: Tensor, column: Tensor, mine: Tensor, entries: Tensor) -> None:
    """Add ``[c, k]`` entries to the columns of ``grad`` that this rank holds."""
    if grad.size(-1):
        grad.scatter_add_(-1, column, torch.where(mine, entries, 0.0))


def top_k(
    student: Tensor,
    teacher: TopKTargets,
    weight: Tensor,
    config: DistillationConfig,
    shard: VocabShard,
) -> tuple[Tensor, Tensor]:
    """Forward KL over the teacher's k largest logits, both distributions renormalised over them.

    See ``divergences.LossFunction``; 2407.14679, appendix A.3.
    """
    picked, column, mine = _picked(student, teacher, shard)
    log_q = (picked / config.temperature).log_softmax(-1)
    log_p = (teacher.values.to(picked.dtype) / config.temperature).log_softmax(-1)
    p = log_p.exp()
    loss = torch.where(mine, p * (log_p - log_q), 0.0).sum(-1)
    grad = student.zero_()
    _add_entries(grad, column, mine, (log_q.exp() - p) * (weight / config.temperature)[:, None])
    return loss @ weight, grad


def top_k_tail(
    student: Tensor,
    teacher: TopKTargets,
    weight: Tensor,
    config: DistillationConfig,
    shard: VocabShard,
) -> tuple[Tensor, Tensor]:
    """Forward KL over the teacher's k largest logits and one entry that holds the rest of both.

    See ``divergences.LossFunction``. With r the tail: d/ds_j = (q_j - p_j) / T for the k entries
    and softmax_r(s)_j (q_r - p_r) / T for the others.
    """
    if teacher.ids.size(-1) == shard.vocab_size:  # no tail: both normalisers are those of the k
        return top_k(student, teacher, weight, config, shard)
    student = student.div_(config.temperature)
    picked, column, mine = _picked(student, teacher, shard)
    # The k entries out of the way, far below anything: what is left is the tail.
    floor = torch.full_like(picked, torch.finfo(picked.dtype).min / 2)
    _add_entries(student, column, mine, floor)
    log_rest = log_normalizer(student, shard)
    log_z = torch.logaddexp(picked.logsumexp(-1, keepdim=True), log_rest)
    log_q, log_q_rest = picked - log_z, (log_rest - log_z).squeeze(-1)
    log_p, p_rest = _teacher_masses(teacher, picked.dtype, config.temperature)
    p = log_p.exp()
    loss = torch.where(mine, p * (log_p - log_q), 0.0).sum(-1)
    if shard.first:
        loss = loss + p_rest * (p_rest.log() - log_q_rest)
    scale = weight / config.temperature
    grad = student.sub_(log_rest).exp_().mul_(((log_q_rest.exp() - p_rest) * scale)[:, None])
    _add_entries(grad, column, mine, (log_q.exp() - p) * scale[:, None])
    return loss @ weight, grad


def _teacher_masses(
    teacher: TopKTargets, dtype: torch.dtype, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return ``[c, k]`` log probabilities of the k entries and ``[c]`` probability of the rest."""
    log_p = teacher.values.to(dtype) / temperature - teacher.log_z.to(dtype)[:, None]
    # Rounding may leave a sum above 1: the rest is then as good as nothing.
    rest = -torch.expm1(log_p.logsumexp(-1)).clamp_max_(0)
    return log_p, rest.clamp_min_(torch.finfo(dtype).tiny)
