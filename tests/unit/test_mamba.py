"""Mamba-2 in plain torch, against its recurrence and against transformers' layer."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nemo_minitron.runtime.mamba import (
    GatedRMSNorm,
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
)

BATCH, LENGTH, HEADS, GROUPS, CHANNELS, STATE = 2, 21, 6, 2, 4, 5


def inputs(length: int = LENGTH) -> dict[str, Any]:
    torch.manual_seed(0)
    shapes = {
        "x": (BATCH, length, HEADS, CHANNELS),
        "dt": (BATCH, length, HEADS),
        "A": (HEADS,),
        "B": (BATCH, length, GROUPS, STATE),
        "C": (BATCH, length, GROUPS, STATE),
        "D": (HEADS,),
        "z": (BATCH, length, HEADS, CHANNELS),
        "dt_bias": (HEADS,),
        "initial_states": (BATCH, HEADS, CHANNELS, STATE),
    }
    found = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    found["A"] = -found["A"].exp()
    return {name: tensor.requires_grad_() for name, tensor in found.items()}


def recurrence(x, dt, A, B, C, D, z, dt_bias, initial_states):  # noqa: N803
    """The definition, token by token."""
    b, c = (t.repeat_interleave(HEADS // GROUPS, 2) for t in (B, C))
    dt = F.softplus(dt + dt_bias)
    state, out = initial_states, []
    for t in range(x.shape[1]):
        decay = (dt[:, t] * A).exp()[..., None, None]
        added = dt[:, t, :, None, None] * x[:, t, :, :, None] * b[:, t, :, None]
        state = state * decay + added
        out.append((state * c[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(out, 1) * F.silu(z), state


@pytest.mark.parametrize("chunk_size", [1, 4, 7, 21, 64])
def test_the_scan_is_the_recurrence_and_so_are_its_gradients(chunk_size):
    given = inputs()
    wanted, wanted_state = recurrence(**given)
    found, state = mamba_chunk_scan_combined(
        **given, chunk_size=chunk_size, dt_softplus=True, return_final_states=True
    )
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(state, wanted_state, atol=1e-12, rtol=1e-12)
    weights = torch.randn_like(wanted)
    grads = torch.autograd.grad((found * weights).sum() + state.sum(), list(given.values()))
    expected = torch.autograd.grad(
        (wanted * weights).sum() + wanted_state.sum(), list(given.values())
    )
    torch.testing.assert_close(grads, expected, atol=1e-10, rtol=1e-10)


def test_a_strong_decay_does_not_overflow():
    given = inputs()
    given["A"] = given["A"] * 1e4
    found = mamba_chunk_scan_combined(**given, chunk_size=8, dt_softplus=True)
    torch.testing.assert_close(found, recurrence(**given)[0])
    assert torch.autograd.grad(found.sum(), given["dt"])[0].isfinite().all()


def test_half_precision_is_summed_in_float32():
    given = {name: tensor.detach().bfloat16() for name, tensor in inputs(512).items()}
    exact = recurrence(**{name: tensor.double() for name, tensor in given.items()})[0]
    found = mamba_chunk_scan_combined(**given, chunk_size=64, dt_softplus=True)
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().max() < 2**-8 * exact.abs().max()


def test_the_scan_goes_on_from_its_final_states():
    given = {name: tensor.detach() for name, tensor in inputs().items()}
    whole = mamba_chunk_scan_combined(**given, chunk_size=4, dt_softplus=True)
    state, parts = given.pop("initial_states"), []
    for piece in (slice(0, 10), slice(10, None)):
        part = {name: t[:, piece] if t.dim() > 2 else t for name, t in given.items()}
        y, state = mamba_chunk_scan_combined(
            **part, chunk_size=4, dt_softplus=True, initial_states=state, return_final_states=True
        )
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_the_layer_is_that_of_transformers():
    """NemotronH's mixer, with its own torch path as the reference; gradients too."""
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

    torch.manual_seed(0)
    config = NemotronHConfig(
        hidden_size=32,
        mamba_num_heads=HEADS,
        mamba_head_dim=8,
        n_groups=GROUPS,
        ssm_state_size=16,
        chunk_size=8,
        conv_kernel=4,
    )
    mixer = NemotronHMamba2Mixer(config, layer_idx=0)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    norm = GatedRMSNorm(HEADS * 8, config.layer_norm_epsilon, HEADS * 8 // GROUPS)
    norm.weight = mixer.norm.weight
    hidden = torch.randn(BATCH, LENGTH, 32, requires_grad=True)
    wanted = mixer(hidden)
    y = mamba_split_conv1d_scan_combined(
        mixer.in_proj(hidden),
        mixer.conv1d.weight.squeeze(1),
        mixer.conv1d.bias,
        mixer.dt_bias,
        -mixer.A_log.exp(),
        mixer.D,
        chunk_size=5,
        headdim=8,
        ngroups=GROUPS,
    )
    found = mixer.out_proj(norm(y))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    known = [hidden, *mixer.parameters()]
    weights = torch.randn_like(wanted)
    for ours, theirs in zip(
        torch.autograd.grad((found * weights).sum(), known),
        torch.autograd.grad((wanted * weights).sum(), known),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_packed_sequences_are_refused():
    with pytest.raises(ValueError, match="reads no packed sequences"):
        mamba_split_conv1d_scan_combined(
            torch.zeros(1, 4, 26),
            torch.zeros(18, 4),
            torch.zeros(18),
            torch.zeros(2),
            torch.zeros(2),
            torch.zeros(2),
            chunk_size=2,
            headdim=3,
            seq_idx=torch.zeros(1, 4),
        )
