"""What is left takes over from what is cut: closed-form refits, no gradients. Pure torch.

Beyond the papers. A linear layer y = W x that keeps the input channels K gets the weight W' that
minimises E |W x - W' x_K|^2 over the calibration tokens,

    W' = W G[:, K] (G[K, K] + l I)^-1,   G = E[x x^T],  l = ridge x mean(diag G[K, K]).

A norm that keeps the hidden channels K divides by the root mean square of x_K in place of that of
x, so that its output is too large by rms(x) / rms(x_K). Its gain is multiplied by

    c = sqrt(mean over K of E[x_i^2 / rms(x)^2]),

the root mean square over tokens of rms(x_K) / rms(x).
"""

import torch
from torch import Tensor


def refit(weight: Tensor, moments: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """Least-squares weight of the kept input channels.

    Args:
        weight: ``[out, in]``, before it is cut.
        moments: ``[in, in]`` second moments of its input, up to a factor.
        kept: ``[k]`` input channels that stay.
        ridge: added to the diagonal, relative to its mean: few tokens say little of rare channels.

    Returns:
        ``[out, k]`` of the weight's dtype; solved in fp64.

    Raises:
        ValueError: the moments are all zero.
    """
    columns = moments.index_select(1, kept).double()
    square = columns.index_select(0, kept)
    scale = square.diagonal().mean()
    if not scale > 0:
        raise ValueError(
            "the calibration's second moments are zero: the activations are; check the checkpoint"
        )
    square.diagonal().add_(ridge * scale)
    target = weight.double() @ columns
    factor = torch.linalg.cholesky(square)
    return torch.cholesky_solve(target.t(), factor).t().to(weight.dtype).contiguous()


def norm_scale(moments: Tensor, kept: Tensor) -> float:
    """Factor for the gain of a norm whose input is cut.

    Args:
        moments: ``[h]`` mean over tokens of x^2 / rms(x)^2.
        kept: ``[k]`` channels that stay.
    """
    return float(moments.index_select(0, kept).double().mean().sqrt())


def scaled_gain(gain: Tensor, scale: float, zero_centred: bool) -> Tensor:
    """Gain x scale; ``zero_centred`` gains are stored as their difference to 1."""
    offset = 1.0 if zero_centred else 0.0
    return ((gain.double() + offset) * scale - offset).to(gain.dtype)
