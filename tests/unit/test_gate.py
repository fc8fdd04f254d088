"""The gate of an MLP on a CPU: Megatron's values, and less kept for the backward pass."""

import pytest
import torch
import torch.nn.functional as F

from nemo_minitron.models.activations import _GatedSilu


def _plain(both: torch.Tensor) -> torch.Tensor:
    gate, linear = both.chunk(2, dim=-1)
    return F.silu(gate) * linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_plain_formula(dtype):
    torch.manual_seed(0)
    given = torch.randn(5, 2, 14, dtype=dtype)
    found = []
    for gate in (_plain, _GatedSilu.apply):
        both = given.clone().requires_grad_()
        out = gate(both)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out))
        found.append((out, both.grad))
    for plain, own in zip(*found, strict=True):
        assert torch.equal(plain, own)


def test_what_is_kept():
    kept = []
    both = torch.randn(4, 16, requires_grad=True)

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _GatedSilu.apply(both)
    assert [tensor.data_ptr() for tensor in kept] == [both.data_ptr()]
