"""The maths of the intermediate losses against plain definitions and autograd."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from nemo_minitron.distillation.intermediate import attach, relation_loss, state_loss
from nemo_minitron.models.norms import normed_input
from nemo_minitron.models.places import _watch_norm

torch.manual_seed(0)
S, B = 6, 2


def _random(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


@pytest.fixture
def mask() -> Tensor:
    mask = torch.ones(S, B)
    mask[2, 0] = mask[5, 1] = 0.0
    return mask


def test_cosine_and_mse(mask):
    student, teacher = _random(S, B, 5), _random(S, B, 5)
    cosine = mse = 0.0
    for s in range(S):
        for b in range(B):
            x, y = student[s, b], teacher[s, b]
            cosine += mask[s, b] * (1 - x @ y / (x.norm() * y.norm()))
            mse += mask[s, b] * (x - y).square().sum() / 5
    torch.testing.assert_close(state_loss(student, teacher, mask, "cosine"), cosine)
    torch.testing.assert_close(state_loss(student, teacher, mask, "mse"), mse)


def test_half_precision_states_are_compared_in_fp32(mask):
    student, teacher = _random(S, B, 5).bfloat16(), _random(S, B, 5).bfloat16()
    loss = state_loss(student, teacher, mask, "mse")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, state_loss(student.float(), teacher.float(), mask, "mse"))


@pytest.mark.parametrize("metric", ["cosine", "mse"])
def test_masked_tokens_have_no_gradient(mask, metric):
    student = _random(S, B, 5, grad=True)
    state_loss(student, _random(S, B, 5), mask, metric).backward()
    assert student.grad is not None
    assert (student.grad[mask == 0] == 0).all()
    assert (student.grad[mask == 1] != 0).any(-1).all()


def _relation_by_hand(student, teacher, mask, heads):
    """KL of softmaxed dot products, loop by loop (2012.15828, eq. 3-6), causal."""
    total = 0.0
    for x, y in zip(student, teacher, strict=True):
        x, y = x.flatten(2), y.flatten(2)
        for b in range(B):
            for head in range(heads):
                p, q = (t[:, b].chunk(heads, -1)[head] for t in (x, y))  # [s, e], widths may differ
                for s in range(S):
                    of_student = (p[: s + 1] @ p[s] / p.size(1) ** 0.5).log_softmax(0)
                    of_teacher = (q[: s + 1] @ q[s] / q.size(1) ** 0.5).log_softmax(0)
                    kl = (of_teacher.exp() * (of_teacher - of_student)).sum()
                    total = total + mask[s, b] * kl / heads
    return total


def _qkv(heads: int, groups: int, width: int, grad: bool = False) -> list[Tensor]:
    return [_random(S, B, count, width, grad=grad) for count in (heads, groups, groups)]


def test_relation_of_models_with_other_heads(mask):
    """Value and gradient; 4 heads of 3 against 6 heads of 2, both split into 2."""
    student, teacher = _qkv(4, 2, 3, grad=True), _qkv(6, 2, 2)
    allowed = torch.ones(S, S, dtype=torch.bool).tril()
    loss = relation_loss(
        student, teacher, mask, allowed, local_heads=2, total_heads=2, gather=lambda x: x
    )
    want = _relation_by_hand(student, teacher, mask, 2)
    torch.testing.assert_close(loss, want)
    got = torch.autograd.grad(loss, student)
    for gradient, expected in zip(got, torch.autograd.grad(want, student), strict=True):
        torch.testing.assert_close(gradient, expected)


def test_relation_is_the_sum_over_ranks_that_share_the_heads(mask):
    student, teacher = _qkv(4, 4, 3), _qkv(8, 4, 2)
    allowed = torch.ones(S, S, dtype=torch.bool).tril()
    loss = partial(relation_loss, total_heads=4, gather=lambda x: x)
    whole = loss(student, teacher, mask, allowed, local_heads=4)
    parts = [
        loss(
            [x.chunk(2, dim=2)[rank] for x in student],
            [x.chunk(2, dim=2)[rank] for x in teacher],
            mask,
            allowed,
            local_heads=2,
        )
        for rank in range(2)
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_attach_adds_the_weighted_gradient():
    x = _random(3, 4, grad=True)
    weight = torch.tensor(0.25, dtype=torch.float64)
    joined = attach(x * 2, (x**3).sum(), weight)
    torch.testing.assert_close(joined, x * 2)
    joined.sin().sum().backward()
    want = torch.autograd.grad((x * 2).sin().sum() + weight * (x**3).sum(), x)[0]
    torch.testing.assert_close(x.grad, want)


class _Fused(nn.Module):
    """What Transformer Engine's fused norm + linear layer looks like."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm_weight = nn.Parameter(torch.rand(4, dtype=torch.float64))
        self.weight = nn.Parameter(_random(3, 4))
        self.config = type(
            "Config",
            (),
            {
                "layernorm_zero_centered_gamma": False,
                "layernorm_epsilon": 1e-5,
                "normalization": "RMSNorm",
            },
        )

    def forward(self, x: Tensor) -> Tensor:
        return normed_input(self, x) @ self.weight.t()


def test_a_norm_fused_into_its_linear_layer_gets_the_same_gradients():
    """Transformer Engine has no module for the norm: the loss joins at the layer's input."""
    fused, x, target = _Fused(), _random(5, 2, 4, grad=True), _random(5, 2, 4)
    weight, ones = torch.tensor(0.5, dtype=torch.float64), torch.ones(5, 2)

    def use(states, carrier):
        return attach(carrier, state_loss(states[0], target, ones, "cosine"), weight)

    handle = _watch_norm(nn.Identity(), fused, use)
    fused(x).square().sum().backward()
    handle.remove()
    normed = normed_input(fused, x)
    plain = (normed @ fused.weight.t()).square().sum()
    total = plain + 0.5 * state_loss(normed, target, ones, "cosine")
    want = torch.autograd.grad(total, [x, *fused.parameters()])
    for got, expected in zip([x, *fused.parameters()], want, strict=True):
        torch.testing.assert_close(got.grad, expected)
