"""The gated delta rule (2412.06464) in plain torch, for machines without the kernels of ``fla``.

Megatron-Core's ``GatedDeltaNet`` brings the projections, the sharding and the checkpoint; these
functions take the place of the kernels that it calls, with their names for arguments. Torch only.

Letters: b sequences, l tokens, c chunks, q tokens of a chunk, h heads, d channels of a query and a
key, e channels of a value, w width of the convolution. Everything is local to the rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    """Return ``x`` in at least float32, in which the kernels compute too."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Divide ``[..., d]`` by the length of its last dim."""
    wide = _wide(x)
    return (wide * (wide.square().sum(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "silu", **more: Any
) -> tuple[Tensor, None]:
    """SiLU of a convolution that sees a token and those before it, channel by channel.

    Args:
        x: ``[b, l, channels]``.
        weight: ``[channels, w]``.
        bias: ``[channels]``.
        activation: SiLU, by one of its names.
        more: must hold nothing that is set: states and packed sequences need the kernels.

    Returns:
        ``[b, l, channels]``, and no state.
    """
    _refuse(more)
    assert activation in ("silu", "swish"), activation
    channels, width = weight.shape
    padded = F.pad(x.transpose(1, 2), (width - 1, 0))
    out = F.conv1d(padded, weight.unsqueeze(1), bias, groups=channels)
    return F.silu(out).transpose(1, 2), None


def _refuse(more: dict[str, Any]) -> None:
    given = [name for name, value in more.items() if value is not None and value is not False]
    if given:
        raise ValueError(
            f"without fla's kernels a gated delta net takes no {', '.join(given)}: it reads no "
            "packed sequences and keeps no state; install flash-linear-attention"
        )


def _chunks(x: Tensor, size: int) -> Tensor:
    """``[b, l, h, ...]`` -> ``[b, h, c, q, ...]``, zeros after the last token."""
    x = _wide(x.transpose(1, 2))
    short = -x.shape[2] % size
    padded = F.pad(x, (0, 0) * (x.dim() - 3) + (0, short))
    return padded.unflatten(2, (-1, size))


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    **more: Any,
) -> tuple[Tensor, None]:
    """``S_t = exp(g_t) S_(t-1) + beta_t k_t (v_t - k_t exp(g_t) S_(t-1))``, ``o_t = q_t S_t``.

    Time is linear in the tokens. Inside a chunk the writes, each of which depends on what those
    before it left, are one triangular system (2406.06484, section 3).

    Args:
        q: ``[b, l, h, d]``; divided by the square root of d.
        k: ``[b, l, h, d]``.
        v: ``[b, l, h, e]``.
        g: ``[b, l, h]``, the logarithm of what is left of the state.
        beta: ``[b, l, h]``, between 0 and 1.
        chunk_size: tokens of a chunk.
        more: must hold nothing that is set, as above.

    Returns:
        ``o``, shaped and typed as ``v``, and no state.
    """
    _refuse(more)
    length, channels = q.shape[1], q.shape[-1]
    size = min(chunk_size, length)
    dtype = v.dtype
    q, k, v, g, beta = (_chunks(x, size) for x in (q * channels**-0.5, k, v, g, beta))
    decay = g.cumsum(-1)  # [b, h, c, q]: what is left after each token, in logarithms
    later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    between = decay.unsqueeze(-1) - decay.unsqueeze(-2)
    left = between.masked_fill(later, float("-inf")).exp()  # [b, h, c, q, q]
    given = k * beta.unsqueeze(-1)
    wanted = torch.cat([v * beta.unsqueeze(-1), given * decay.exp().unsqueeze(-1)], -1)
    solved = torch.linalg.solve_triangular(
        (given @ k.mT) * left, wanted, upper=False, unitriangular=True
    )
    new, known = solved.split([v.shape[-1], channels], -1)  # known: of the state before
    inside, before = (q @ k.mT) * left, q * decay.exp().unsqueeze(-1)
    last = decay[..., -1:]
    until, kept = k * (last - decay).exp().unsqueeze(-1), last.exp().unsqueeze(-1)
    state = v.new_zeros(*v.shape[:2], channels, v.shape[-1])
    out = []
    for chunk in range(v.shape[2]):
        written = new[:, :, chunk] - known[:, :, chunk] @ state
        out.append(before[:, :, chunk] @ state + inside[:, :, chunk] @ written)
        state = state * kept[:, :, chunk] + until[:, :, chunk].mT @ written
    return torch.cat(out, 2)[:, :, :length].transpose(1, 2).to(dtype).contiguous(), None
