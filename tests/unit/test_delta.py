"""The gated delta rule in plain torch, against its recurrence and against transformers' own."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_minitron.runtime.delta import causal_conv1d, chunk_gated_delta_rule, l2norm

BATCH, LENGTH, HEADS, CHANNELS, VALUES = 2, 21, 4, 6, 5


def inputs(decay: float = 1.0, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    torch.manual_seed(0)
    q, k = (torch.randn(BATCH, LENGTH, HEADS, CHANNELS, dtype=dtype) for _ in "qk")
    found = {
        "q": l2norm(q),
        "k": l2norm(k),
        "v": torch.randn(BATCH, LENGTH, HEADS, VALUES, dtype=dtype),
        "g": -torch.rand(BATCH, LENGTH, HEADS, dtype=dtype) * decay,
        "beta": torch.rand(BATCH, LENGTH, HEADS, dtype=dtype),
    }
    return {name: tensor.requires_grad_() for name, tensor in found.items()}


def recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The definition, token by token, in fp64."""
    q, k, v, g, beta = (x.double() for x in (q, k, v, g, beta))
    state, out = v.new_zeros(BATCH, HEADS, CHANNELS, VALUES), []
    for t in range(q.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        error = v[:, t] - (k[:, t, :, :, None] * state).sum(2)
        state = state + k[:, t, :, :, None] * (error * beta[:, t, :, None])[:, :, None]
        out.append((q[:, t, :, :, None] * state).sum(2) * CHANNELS**-0.5)
    return torch.stack(out, 1)


@pytest.mark.parametrize("chunk_size", [1, 4, 7, 64])
def test_the_rule_is_the_recurrence_and_so_are_its_gradients(chunk_size: int) -> None:
    given = inputs()
    wanted = recurrence(**given)
    found, _ = chunk_gated_delta_rule(**given, chunk_size=chunk_size)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)
    weights = torch.randn_like(found)
    grads = torch.autograd.grad((found * weights).sum(), list(given.values()))
    expected = torch.autograd.grad((wanted * weights).sum(), list(given.values()))
    torch.testing.assert_close(grads, expected, atol=1e-10, rtol=1e-10)


def test_a_strong_decay_does_not_overflow() -> None:
    given = inputs(decay=1e4)
    found, _ = chunk_gated_delta_rule(**given, chunk_size=8)
    torch.testing.assert_close(found, recurrence(**given), atol=1e-12, rtol=1e-12)
    assert torch.autograd.grad(found.sum(), given["g"])[0].isfinite().all()


def test_half_precision_is_summed_in_float32() -> None:
    given = {name: tensor.detach().bfloat16() for name, tensor in inputs().items()}
    found, _ = chunk_gated_delta_rule(**given)
    assert found.dtype == torch.bfloat16
    exact = recurrence(**given)
    assert (found - exact).abs().max() < 2**-7 * exact.abs().max()


def test_what_transformers_computes() -> None:
    """Its torch fallback, gradients too; several chunks, and key heads shared by value heads."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    given = inputs(dtype=torch.float32)
    wanted, _ = torch_chunk_gated_delta_rule(
        given["q"], given["k"], given["v"], g=given["g"], beta=given["beta"], chunk_size=8
    )
    found, _ = chunk_gated_delta_rule(**given, chunk_size=16)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    grads = (torch.autograd.grad(x.square().sum(), list(given.values())) for x in (found, wanted))
    torch.testing.assert_close(next(grads), next(grads), atol=1e-4, rtol=1e-4)


def test_the_convolution_sees_what_came_before() -> None:
    x, weight = torch.randn(BATCH, LENGTH, 3), torch.randn(3, 4)
    found, _ = causal_conv1d(x, weight)
    padded = torch.cat([torch.zeros(BATCH, 3, 3), x], 1)
    wanted = sum(padded[:, w : w + LENGTH] * weight[:, w] for w in range(4))
    torch.testing.assert_close(found, torch.nn.functional.silu(torch.as_tensor(wanted)))


def test_states_and_packed_sequences_are_refused() -> None:
    given = inputs()
    with pytest.raises(ValueError, match=r"takes no cu_seqlens.*install flash-linear-attention"):
        chunk_gated_delta_rule(**given, initial_state=None, cu_seqlens=torch.tensor([0, 21]))
    with pytest.raises(ValueError, match="takes no output_final_state"):
        causal_conv1d(given["v"][:, :, 0], torch.ones(VALUES, 3), output_final_state=True)
