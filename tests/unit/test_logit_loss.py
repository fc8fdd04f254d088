"""Fused distillation losses against plain autograd, in a group of one."""

import math
from typing import cast

import pytest
import torch
from torch.distributed import ProcessGroup

from nemo_minitron.config.distillation import LOSS_KINDS, DistillationConfig
from nemo_minitron.distillation.divergences import LOSSES, cosine
from nemo_minitron.distillation.logit_loss import TeacherStates, logit_loss
from nemo_minitron.distillation.top_k import TopKTargets, top_k_targets
from nemo_minitron.distillation.vocab import VocabShard
from nemo_minitron.models.attention import capped
from tests.helpers.losses import KINDS, loss_keys, problem, reference, stored_targets

VOCAB, ROWS = 101, 104


class _Alone:
    """A process group of one."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


SHARD = VocabShard(cast(ProcessGroup, _Alone()), VOCAB, ROWS)


def _config(kind: str, **over) -> DistillationConfig:
    keys = {"chunk_size": 5, **loss_keys(kind), **over}
    return DistillationConfig(**keys)


def _fused(
    config: DistillationConfig,
    inputs,
    *,
    stored: TopKTargets | None = None,
    caps: tuple[float | None, float | None] = (None, None),
):
    """``[KD, CE]`` and the gradients of half the total by hidden state and weight."""
    hidden, weight = (inputs[name].clone().requires_grad_() for name in ("hidden", "weight"))
    teacher = stored or TeacherStates(inputs["teacher_hidden"], inputs["teacher_weight"], caps[1])
    total, parts = logit_loss(
        hidden,
        weight,
        inputs["labels"],
        inputs["mask"],
        config,
        SHARD,
        teacher,
        cap=caps[0],
    )
    (total / 2).backward()
    return total.detach(), parts, hidden.grad, weight.grad


def _bf16(logits: torch.Tensor) -> torch.Tensor:
    """Rounded, with the gradient of the identity."""
    return logits + (logits.bfloat16().double() - logits).detach()


def _plain(
    config: DistillationConfig,
    inputs,
    rounding=lambda logits: logits,
    caps: tuple[float | None, float | None] = (None, None),
):
    hidden, weight = (inputs[name].clone().requires_grad_() for name in ("hidden", "weight"))
    teacher = rounding(inputs["teacher_hidden"] @ inputs["teacher_weight"][:VOCAB].t())
    student = rounding(hidden @ weight[:VOCAB].t())
    student, teacher = (capped(x, cap) for x, cap in zip((student, teacher), caps, strict=True))
    parts, total = reference(config, student, teacher, inputs["labels"], inputs["mask"])
    (total / 2).backward()
    return total.detach(), parts.detach(), hidden.grad, weight.grad


def _assert_equal(got, want, tolerance: float = 1e-9) -> None:
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w.to(g.dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_autograd(kind, ce_weight):
    """Masked tokens, 101 tokens of vocabulary in 104 rows, chunks that do not divide the tokens."""
    config = _config(kind, ce_weight=ce_weight, kd_weight=0.7)
    got, want = _fused(config, problem(VOCAB, rows=ROWS)), _plain(config, problem(VOCAB, rows=ROWS))
    if not ce_weight:
        want[1][1] = 0.0  # not computed
    _assert_equal(got, want)
    assert not got[3][VOCAB:].any(), "padding rows have a gradient"


@pytest.mark.parametrize("caps", [(3.0, None), (2.0, 4.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_that_are_capped_equal_autograd(kind, caps):
    """Of the student alone, and of both with caps of their own."""
    config = _config(kind, ce_weight=0.5, kd_weight=0.7)
    inputs = problem(VOCAB, rows=ROWS)
    _assert_equal(_fused(config, inputs, caps=caps), _plain(config, inputs, caps=caps))


def test_all_kinds_are_covered():
    assert {loss_keys(kind)["loss"] for kind in KINDS} == set(LOSS_KINDS) == set(LOSSES)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_counts(kind):
    """No target token: zero loss and zero gradients, no NaN."""
    inputs = problem(VOCAB, rows=ROWS)
    inputs["mask"].zero_()
    for tensor in _fused(_config(kind, ce_weight=0.5), inputs):
        assert not tensor.any()


@pytest.mark.parametrize("zeros", [("student",), ("teacher",), ("student", "teacher")])
def test_the_cosine_of_a_row_of_zeros_is_zero(zeros):
    """And has no gradient: there is no direction to turn to."""
    logits = {name: torch.randn(2, VOCAB) for name in ("student", "teacher")}
    for name in zeros:
        logits[name][0] = 0.0
    row = logits["student"][1].clone().requires_grad_()
    (1 - torch.cosine_similarity(row, logits["teacher"][1], dim=0)).backward()
    config, weight = DistillationConfig(loss="cosine"), torch.tensor([1.0, 0.0])
    loss, grad = cosine(logits["student"].clone(), logits["teacher"].clone(), weight, config, SHARD)
    assert loss == 1.0
    assert not grad.any()
    _, grad = cosine(logits["student"], logits["teacher"], torch.ones(2), config, SHARD)
    assert not grad[0].any()
    torch.testing.assert_close(grad[1], row.grad)


@pytest.mark.parametrize("kind", ["top_k", "top_k_tail"])
def test_stored_targets_are_as_good_as_a_teacher(kind):
    """More entries stored than asked for are no harm."""
    config, inputs = _config(kind, ce_weight=0.5), problem(VOCAB, rows=ROWS)
    stored = stored_targets(inputs, VOCAB, 9, config.temperature)
    _assert_equal(_fused(config, inputs, stored=stored), _fused(config, inputs), 1e-12)


def test_top_k_of_the_whole_vocabulary_is_forward_kl():
    inputs = problem(VOCAB, rows=ROWS)
    want = _fused(_config("forward_kl"), inputs)
    for kind in ("top_k", "top_k_tail"):
        _assert_equal(_fused(_config(kind, top_k=VOCAB), inputs), want)


def test_equal_logits_are_taken_in_order_of_id():
    logits = torch.tensor([[1.0, 3.0, 1.0, 3.0, 1.0, 0.0]])
    shard = VocabShard(cast(ProcessGroup, _Alone()), 6, 6)
    targets = top_k_targets(logits, 4, 1.0, shard)
    assert targets.ids.tolist() == [[1, 3, 0, 2]]
    assert targets.values.tolist() == [[3.0, 3.0, 1.0, 1.0]]
    torch.testing.assert_close(targets.log_z, logits.logsumexp(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_accumulates_in_fp32(kind):
    """Against fp64 arithmetic on the same logits, which bf16 has rounded."""
    inputs = problem(VOCAB, rows=ROWS)
    config = _config(kind)
    halves = {name: x if name in ("labels", "mask") else x.bfloat16() for name, x in inputs.items()}
    halves["mask"] = inputs["mask"].float()
    rounded = {name: x.double() if x.dtype == torch.bfloat16 else x for name, x in halves.items()}
    got, want = _fused(config, halves), _plain(config, rounded, _bf16)
    assert got[1].dtype == torch.float32
    torch.testing.assert_close(got[1][0].double(), want[1][0], rtol=1e-5, atol=0)
    for g, w in zip(got[2:], want[2:], strict=True):
        assert g.dtype == torch.bfloat16
        assert (g.double() - w).norm() / w.norm() < 1e-2  # gradients of logits are rounded once


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_stay_finite(kind):
    """Logits of +-1e4 in fp32, a teacher without tail mass among them."""
    inputs = problem(VOCAB, rows=ROWS)
    inputs = {name: x if name == "labels" else x.float() for name, x in inputs.items()}
    inputs["hidden"] *= 3e3
    inputs["teacher_hidden"] *= -3e3
    for tensor in _fused(_config(kind, ce_weight=0.5), inputs):
        assert torch.isfinite(tensor).all()


def test_a_second_backward_is_refused():
    inputs = problem(VOCAB, rows=ROWS)
    hidden = inputs["hidden"].requires_grad_()
    config = DistillationConfig(kd_weight=0.0, ce_weight=1.0)
    weight, labels = inputs["weight"], inputs["labels"]
    total, _ = logit_loss(hidden, weight, labels, inputs["mask"], config, SHARD)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_stored_targets_that_do_not_suffice():
    inputs = problem(VOCAB, rows=ROWS)
    stored = stored_targets(inputs, VOCAB, 9, 1.0)
    for kind, over, message in (
        ("forward_kl", {}, r"loss=forward_kl reads the teacher's whole vocabulary"),
        ("top_k", {"top_k": 10}, r"top_k=10 is above the 9 logits stored"),
        ("top_k_tail", {}, r"temperature=2.0 differs from 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            _fused(_config(kind, **over), inputs, stored=stored)
    assert math.isfinite(_fused(_config("top_k"), inputs, stored=stored)[0])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"loss": "kl"}, "loss=kl must be one of forward_kl"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"temperature": 2.0, "loss": "mse"}, "temperature=2.0 has no meaning"),
        ({"temperature_scaling": "t2"}, "temperature_scaling=t2 must be none or square"),
        ({"js_beta": 1.0, "loss": "js"}, "js_beta=1.0 must be between 0 and 1"),
        ({"js_beta": 0.3}, "js_beta=0.3 is for distillation.loss=js"),
        ({"loss": "top_k"}, "loss=top_k needs distillation.top_k"),
        ({"top_k": 5}, "top_k=5 is for distillation.loss=top_k or top_k_tail"),
        ({"top_k": 0, "loss": "top_k"}, "top_k=0 must be at least 1"),
        ({"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        ({"kd_weight": -1.0}, "kd_weight=-1.0 must not be negative"),
        ({"kd_weight": 0.0}, "leave no loss"),
    ],
)
def test_bad_keys(keys, message):
    with pytest.raises(ValueError, match=f"distillation.{message}|{message}"):
        DistillationConfig(**keys)


def test_k_above_the_vocabulary():
    with pytest.raises(ValueError, match="top_k=102 is larger than the vocabulary of 101"):
        DistillationConfig(loss="top_k", top_k=102).check_vocabulary(VOCAB)
