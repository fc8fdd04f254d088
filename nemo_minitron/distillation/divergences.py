"""Distillation losses on vocabulary shards, each with its gradient by the student logits.

Every loss has the signature of ``LossFunction``. Torch only. Letters: c tokens, v local vocabulary
rows without padding, s and t student and teacher logits, q and p their softmaxes at temperature T.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.config.distillation import DistillationConfig
from nemo_minitron.distillation.top_k import top_k, top_k_tail
from nemo_minitron.distillation.vocab import VocabShard, all_reduce, softmax_
from nemo_minitron.runtime.plugins import named

LossFunction = Callable[
    [Tensor, Any, Tensor, DistillationConfig, VocabShard], tuple[Tensor, Tensor]
]
"""``(student, teacher, weight, config, shard) -> (loss, gradient)``.

``student``: ``[c, v]`` local logits, fp32 or fp64, overwritten; ``teacher``: the same, or a
``TopKTargets`` of c tokens for the top-k kinds; ``weight``: ``[c]`` factor of each token's loss, 0
where it does not count. ``loss``: scalar whose sum over the group is the weighted sum of the
tokens' losses; ``gradient``: ``[c, v]`` of that sum by the student logits, maybe in place of
``student``. ``v`` may be 0.
"""


def _tempered(student: Tensor, teacher: Tensor, config: DistillationConfig) -> None:
    if config.temperature != 1.0:
        student.div_(config.temperature)
        teacher.div_(config.temperature)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return ``[c]`` row by row product of ``[c, v]``."""
    return torch.linalg.vecdot(a, b)


def forward_kl(
    student: Tensor, teacher: Tensor, weight: Tensor, config: DistillationConfig, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """KL(t || s) = sum_v p (log p - log q) (2407.14679, section 3); d/ds = (q - p) / T."""
    _tempered(student, teacher, config)
    difference = teacher - student
    log_zs, log_zt = softmax_([student, teacher], shard)
    loss = _dot(teacher, difference)
    if shard.first:  # log p - log q = difference + log_zs - log_zt, and p sums to 1
        loss += (log_zs - log_zt).squeeze(-1)
    return loss @ weight, student.sub_(teacher).mul_((weight / config.temperature)[:, None])


def reverse_kl(
    student: Tensor, teacher: Tensor, weight: Tensor, config: DistillationConfig, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """KL(s || t) = sum_v q (log q - log p); d/ds_j = q_j (log q_j - log p_j - KL) / T."""
    _tempered(student, teacher, config)
    ratio = student - teacher
    log_zs, log_zt = softmax_([student, teacher], shard)
    ratio += log_zt - log_zs
    loss = _dot(student, ratio)
    mean = all_reduce(loss.clone(), shard.group)
    grad = student.mul_(ratio.sub_(mean[:, None]))
    return loss @ weight, grad.mul_((weight / config.temperature)[:, None])


def js(
    student: Tensor, teacher: Tensor, weight: Tensor, config: DistillationConfig, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """Jensen-Shannon: b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q.

    2306.13649, eq. 1, with b = ``js_beta``.

    d/ds_j = (1 - b) q_j (log(q_j / m_j) - KL(q || m)) / T.
    """
    beta = config.js_beta
    _tempered(student, teacher, config)
    log_q, log_p = student.clone(), teacher.clone()
    log_zs, log_zt = softmax_([student, teacher], shard)
    log_q, log_p = log_q.sub_(log_zs), log_p.sub_(log_zt)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    from_student = _dot(student, log_q.sub_(log_m))
    loss = beta * _dot(teacher, log_p.sub_(log_m)) + (1 - beta) * from_student
    mean = all_reduce(from_student, shard.group)
    grad = student.mul_(log_q.sub_(mean[:, None]))
    return loss @ weight, grad.mul_((weight * (1 - beta) / config.temperature)[:, None])


def mse(
    student: Tensor, teacher: Tensor, weight: Tensor, config: DistillationConfig, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """Return the mean over the true (unpadded, global) vocabulary of (s - t)^2, raw logits."""
    difference = student.sub_(teacher)
    loss = _dot(difference, difference) @ weight / shard.vocab_size
    return loss, difference.mul_((weight * (2 / shard.vocab_size))[:, None])


def cosine(
    student: Tensor, teacher: Tensor, weight: Tensor, config: DistillationConfig, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """1 - cos(s, t) of the raw logits; d/ds = -(t / (|s| |t|) - cos s / |s|^2)."""
    dots = torch.stack([_dot(student, teacher), _dot(student, student), _dot(teacher, teacher)])
    product, ss, tt = all_reduce(dots, shard.group)
    tiny = torch.finfo(ss.dtype).tiny  # rows of zeros: cosine 0 and no gradient
    ss, tt = (torch.where(x > tiny, x, torch.inf) for x in (ss, tt))
    norms = ss.sqrt() * tt.sqrt()
    cos = product / norms
    grad = student.mul_((weight * cos / ss)[:, None]).sub_(teacher.mul_((weight / norms)[:, None]))
    return (1 - cos) @ weight * float(shard.first), grad


LOSSES: dict[str, LossFunction] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "js": js,
    "mse": mse,
    "cosine": cosine,
    "top_k": top_k,
    "top_k_tail": top_k_tail,
}
"""Value of ``distillation.loss`` -> the loss."""


@cache
def loss_function(kind: str) -> LossFunction:
    """Return the loss that ``distillation.loss`` names, of this package or of another.

    Raises:
        ValueError: the package that adds it cannot be imported.
    """
    return named("losses", LOSSES, kind, "distillation.loss")
