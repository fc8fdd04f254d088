"""Losses between inner states of teacher and student, and how they join the backward. Torch only.

All losses are sums over tokens of the local rows; the caller divides by the tokens of the global
batch, as for the loss on the logits. Shape letters: s local sequence, t full sequence, b
micro-batch, h student width, H teacher width, n local heads, g local query groups, d head dim, r
local relation heads, e width of a relation head.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx


class _Attach(torch.autograd.Function):
    """See ``attach``."""

    @staticmethod
    def forward(ctx: FunctionCtx, activation: Tensor, loss: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx: BackwardCFunction, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grads[0], weight, None


def attach(activation: Tensor, loss: Tensor, weight: Tensor) -> Tensor:
    """The activation; its backward also runs that of ``weight * loss``.

    Megatron's auxiliary-loss idiom (``MoEAuxLossAutoScaler``): the loss need not reach the end of
    the pipeline.

    Args:
        activation: any tensor that the rest of the model reads.
        loss: scalar that depends on it.
        weight: scalar of the loss's dtype, on its device.
    """
    out: Tensor = _Attach.apply(activation, loss, weight)
    return out


def state_loss(student: Tensor, teacher: Tensor, mask: Tensor, metric: str) -> Tensor:
    """Return masked sum of distances between hidden states.

    Args:
        student: ``[s, b, H]`` student states, in the teacher's width.
        teacher: ``[s, b, H]``.
        mask: ``[s, b]`` 1 where a token counts.
        metric: ``cosine``: 1 - cosine; ``mse``: mean over channels of the squared difference.

    Returns:
        Scalar, fp32 (fp64 for fp64 states).
    """
    student, teacher = _accumulable(student), _accumulable(teacher)
    if metric == "cosine":
        distance = 1.0 - F.cosine_similarity(student, teacher, dim=-1)
    else:
        distance = (student - teacher).square().mean(-1)
    return (distance * mask.to(distance.dtype)).sum()


def _accumulable(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _relation(states: Tensor, keys: Tensor, heads: int, allowed: Tensor) -> Tensor:
    """Log-softmax of scaled dot products between positions.

    Args:
        states: ``[s, b, ...]`` queries, keys or values of this rank's positions.
        keys: ``[t, b, ...]`` the same of all positions.
        heads: local relation heads.
        allowed: ``[s, t]`` True where a position may look.

    Returns:
        ``[b, r, s, t]``; minus infinity where not allowed.
    """
    # [s, b, n, d] -> [s, b, r, e] -> [b, r, s, e]
    left, right = (
        _accumulable(x).flatten(2).unflatten(2, (heads, -1)).permute(1, 2, 0, 3)
        for x in (states, keys)
    )
    scores = left @ right.transpose(-1, -2) / left.size(-1) ** 0.5
    return scores.masked_fill(~allowed, -torch.inf).log_softmax(-1)


def relation_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    mask: Tensor,
    allowed: Tensor,
    *,
    local_heads: int,
    total_heads: int,
    gather: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return the masked sum of KL(teacher || student) of relations (2012.15828, eq. 3-6).

    The relations query-query, key-key and value-value are added with weight 1 and averaged over
    relation heads. Positions see themselves and those before, as in the models' attention.

    Args:
        student: query ``[s, b, n, d]``, key and value ``[s, b, g, d]`` as attention reads them.
        teacher: the same of the teacher, whose sizes may differ.
        mask: ``[s, b]`` 1 where a token counts.
        allowed: ``[s, t]`` bool, True where a local position may look; t in gathered order.
        local_heads: relation heads of this rank.
        total_heads: of all tensor-parallel ranks.
        gather: local positions -> all, ``[s, ...]`` to ``[t, ...]``, differentiable.

    Returns:
        Scalar, fp32 or fp64: this rank's relation heads alone.
    """
    total = mask.new_zeros((), dtype=_accumulable(student[0]).dtype)
    for of_student, of_teacher in zip(student, teacher, strict=True):
        log_s = _relation(of_student, gather(of_student), local_heads, allowed)
        log_t = _relation(of_teacher, gather(of_teacher), local_heads, allowed)
        # 0 where neither may look: the difference of two infinities has no value.
        difference = (log_t - log_s).masked_fill(~allowed, 0.0)
        divergence = (log_t.exp() * difference).sum(-1)  # [b, r, s]
        total = total + (divergence.sum(1) * mask.t().to(divergence.dtype)).sum()
    return total / total_heads
