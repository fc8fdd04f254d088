"""Mamba-2 (2405.21060) in plain torch, for machines without the CUDA kernels of ``mamba_ssm``.

Megatron-Core's ``MambaMixer`` brings the projections, the sharding and the checkpoint; these
functions take the place of the kernels that it calls, with their names for arguments. Torch only.

Letters: b sequences, l tokens, q tokens of a chunk, g groups, k heads of a group, h = g k heads,
p channels of a head, n state size, d channels of the convolution, w its width. Everything is local
to the rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class GatedRMSNorm(nn.Module):
    """RMSNorm over groups of channels, of an input that a gate has multiplied.

    Args:
        hidden_size: channels.
        eps: added to the mean of squares.
        group_size: channels that are normalised together; None takes all of them.
        norm_before_gate: must be false: the gate comes first.
        device: of the weight.
        dtype: of the weight.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if norm_before_gate:
            raise ValueError("norm_before_gate=True is not supported: Mamba-2's gate comes first")
        self.eps, self.group_size = eps, group_size or hidden_size
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Normalise ``x silu(z)``, both ``[..., hidden_size]``; without ``z`` there is no gate."""
        out = _wide(x) if z is None else _wide(x) * F.silu(_wide(z))
        groups = out.unflatten(-1, (-1, self.group_size))
        normed = groups * (groups.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (normed.flatten(-2) * self.weight).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """Return ``x`` in at least float32, in which the kernels compute too."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU of a convolution that sees a token and those before it, channel by channel.

    Args:
        x: ``[b, l, d]``.
        weight: ``[d, w]``.
        bias: ``[d]``.

    Returns:
        ``[b, l, d]``.
    """
    width = weight.shape[1]
    padded = F.pad(x.transpose(1, 2), (width - 1, 0))
    out = F.conv1d(padded, weight.unsqueeze(1), bias, groups=weight.shape[0])
    return F.silu(out).transpose(1, 2)


def _left(decay: Tensor) -> Tensor:
    """Return the factor of a decay given as its logarithm, limited to ``exp(-60)`` and above.

    Smaller numbers would become denormal in products, in which processors are many times slower.
    """
    return decay.clamp(-60, 0).exp_()


def _chunk(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The scan over one chunk, as matrix products (2405.21060, section 6).

    Args:
        x: ``[b, q, h, p]``.
        dt: ``[b, q, h]``, the time steps.
        a: ``[h]``, negative.
        b: ``[b, q, g, n]``.
        c: ``[b, q, g, n]``.
        state: ``[b, g, k p, n]``, after the chunk before.

    Returns:
        The output, shaped as ``x``, and the state after this chunk.
    """
    groups, channels = b.shape[2], x.shape[3]
    b, c = b.transpose(1, 2), c.transpose(1, 2)  # [b, g, q, n]
    tokens = x.unflatten(2, (groups, -1))  # [b, q, g, k, p]
    steps = dt.transpose(1, 2).unflatten(1, (groups, -1))  # [b, g, k, q]
    # How much of the state is left after each token, in logarithms.
    decay = (steps * a.view(groups, -1, 1)).cumsum(-1)
    # What a token takes from the chunks before.
    before = (c @ state.mT).unflatten(-1, (-1, channels)).transpose(2, 3)  # [b, g, k, q, p]
    out = (before * _left(decay).unsqueeze(-1)).flatten(0, 2)
    # What it takes from those before it in the chunk, and nothing from later ones.
    left = _left(decay.unsqueeze(-1) - decay.unsqueeze(-2))
    taken = left * (c @ b.mT).tril().unsqueeze(2)
    inputs = tokens.permute(0, 2, 3, 1, 4) * steps.unsqueeze(-1)
    out = out.baddbmm_(taken.flatten(0, 2), inputs.flatten(0, 2))
    # What the chunk leaves behind.
    total = decay[..., -1:]
    until = (_left(total - decay) * steps).permute(0, 1, 3, 2).unsqueeze(-1)
    added = (tokens.transpose(1, 2) * until).flatten(3)  # [b, g, q, k p]
    kept = _left(total).expand(*total.shape[:3], channels).flatten(2).unsqueeze(-1)
    after = (state * kept).flatten(0, 1).baddbmm_(added.mT.flatten(0, 1), b.flatten(0, 1))
    return out.view(before.shape).flatten(1, 2).transpose(1, 2), after.view(state.shape)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803  # mamba_ssm's names
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    chunk_size: int,
    D: Tensor | None = None,  # noqa: N803
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    return_final_states: bool = False,
) -> Any:
    """Mamba-2's scan: ``s_t = exp(A dt_t) s_(t-1) + dt_t x_t B_t``, ``y_t = C_t s_t + D x_t``.

    Time is linear in the tokens. What is kept for the backward pass are the inputs and one state
    per chunk; the rest is computed again, as in the kernels.

    Args:
        x: ``[b, l, h, p]``.
        dt: ``[b, l, h]``, before bias and softplus.
        A: ``[h]``, negative.
        B: ``[b, l, g, n]``.
        C: ``[b, l, g, n]``.
        chunk_size: q.
        D: ``[h]`` or ``[h, p]``.
        z: gate, shaped as ``x``; the output is multiplied by its SiLU.
        dt_bias: ``[h]``.
        initial_states: ``[b, h, p, n]``; zero without.
        dt_softplus: whether ``dt`` goes through a softplus.
        return_final_states: return the states after the last token too.

    Returns:
        ``y``, shaped and typed as ``x``; with the final states ``[b, h, p, n]`` a pair.
    """
    dtype, (batch, length, heads, channels), groups = x.dtype, x.shape, B.shape[2]
    x, dt, A, B, C = map(_wide, (x, dt, A, B, C))  # noqa: N806
    dt = dt if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    state = x.new_zeros(batch, heads, channels, B.shape[-1])
    state = state if initial_states is None else initial_states.to(x.dtype)
    state = state.reshape(batch, groups, -1, B.shape[-1])
    outputs = []
    for begin in range(0, length, chunk_size):
        x_q, dt_q, b_q, c_q = (t[:, begin : begin + chunk_size] for t in (x, dt, B, C))
        chunk = (x_q, dt_q, A, b_q, c_q, state)
        if torch.is_grad_enabled():
            y, state = checkpoint(_chunk, *chunk, use_reentrant=False, preserve_rng_state=False)
        else:
            y, state = _chunk(*chunk)
        outputs.append(y)
    out = torch.cat(outputs, 1)
    if D is not None:
        out = out + x * (D if D.dim() == 2 else D.unsqueeze(-1))
    if z is not None:
        out = out * F.silu(_wide(z))
    out = out.to(dtype)
    return (out, state.view(batch, heads, channels, -1)) if return_final_states else out


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,  # noqa: N803
    D: Tensor,  # noqa: N803
    chunk_size: int,
    activation: str = "silu",
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = False,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """Everything between Mamba-2's two projections but the norm: convolution, scan, gate.

    Args:
        zxbcdt: ``[b, l, 2 h p + 2 g n + h]``: gate, x, B, C and dt of all tokens.
        conv1d_weight: ``[h p + 2 g n, w]``.
        conv1d_bias: ``[h p + 2 g n]``.
        dt_bias: ``[h]``.
        A: ``[h]``, negative.
        D: ``[h]``, or ``[h, p]`` where ``headdim`` is None.
        chunk_size: tokens of a chunk of the scan.
        activation: after the convolution; SiLU.
        headdim: p.
        ngroups: g.
        norm_before_gate: not used: the norm is not in here.
        seq_idx: must be None: packed sequences need the kernels.

    Returns:
        ``[b, l, h p]``.

    Raises:
        ValueError: packed sequences, or another activation.
    """
    if seq_idx is not None or activation != "silu":
        raise ValueError(
            "without mamba_ssm's kernels a Mamba layer reads no packed sequences, and its "
            f"activation is silu (not {activation})"
        )
    heads, channels = D.shape[0], headdim or D.shape[-1]
    inner, state = heads * channels, (conv1d_weight.shape[0] - heads * channels) // 2
    z, xbc, dt = zxbcdt.split([inner, inner + 2 * state, heads], -1)
    x, b, c = causal_conv(xbc, conv1d_weight, conv1d_bias).split([inner, state, state], -1)
    out: Tensor = mamba_chunk_scan_combined(
        x.unflatten(-1, (heads, channels)),
        dt,
        A,
        b.unflatten(-1, (ngroups, -1)),
        c.unflatten(-1, (ngroups, -1)),
        chunk_size,
        D=D,
        z=z.unflatten(-1, (heads, channels)),
        dt_bias=dt_bias,
        dt_softplus=True,
    )
    return out.flatten(-2)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    D: Tensor,  # noqa: N803
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    intermediate_ssm_states: Tensor | None = None,
) -> Tensor:
    """One token of the scan, as a step of decoding takes it; the state is updated in place.

    Args:
        state: ``[b, heads, p, n]``, p channels of each head and n states of each.
        x: ``[b, 1, heads, p]``.
        dt: ``[b, 1, heads, p]``, equal for all channels of a head.
        A: ``[heads, p, n]``, negative.
        B: ``[b, 1, groups, n]``.
        C: ``[b, 1, groups, n]``.
        D: ``[heads, p]``.
        z: not supported here, as the mixer's norm takes the gate.
        dt_bias: ``[heads, p]``.
        dt_softplus: take the softplus of dt.
        state_batch_indices: not supported here; Megatron's static batching has none.
        intermediate_ssm_states: not supported here; it is for speculative decoding.

    Returns:
        ``[b, 1, heads, p]``, dtype of x.
    """
    assert z is None
    assert state_batch_indices is None
    assert intermediate_ssm_states is None
    now, step = x[:, 0].float(), dt[:, 0].float()
    step = step if dt_bias is None else step + dt_bias.float()
    step = F.softplus(step) if dt_softplus else step
    each = state.size(1) // B.size(2)
    into, out = (t[:, 0].float().repeat_interleave(each, 1).unsqueeze(2) for t in (B, C))
    decay = (A.float() * step.unsqueeze(-1)).exp()
    state.copy_(state.float() * decay + (step * now).unsqueeze(-1) * into)
    y = (state.float() * out).sum(-1) + D.float() * now
    return y.to(x.dtype).unsqueeze(1)
