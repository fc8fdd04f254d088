"""What ``nemo_minitron.Distillation`` refuses before it touches a model."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nemo_minitron.config.distillation import DistillationConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.models.in_schedule import _check_pair
from tests.helpers.tiny import LLAMA


def chunk(
    vocab_size: int = LLAMA.vocab_size, per_token: bool = True, fp16: bool = False
) -> SimpleNamespace:
    return SimpleNamespace(
        built_from=(replace(LLAMA, vocab_size=vocab_size), ParallelConfig()),
        config=SimpleNamespace(calculate_per_token_loss=per_token, fp16=fp16),
    )


def intermediate() -> DistillationConfig:
    settings = DistillationConfig()
    settings.intermediate.losses = ["hidden"]
    return settings


@pytest.mark.parametrize(
    ("teacher", "student", "settings", "says"),
    [
        ([chunk()] * 2, [chunk()], DistillationConfig(), "2 chunks on this rank and the student 1"),
        ([chunk(8)], [chunk(9)], DistillationConfig(), "vocab_size=8 and the student 9"),
        ([chunk()], [chunk()], intermediate(), "use minitron distill for them"),
        ([chunk()], [chunk()], DistillationConfig(offload_teacher=True), "offload_teacher=true"),
        ([chunk()], [chunk(per_token=False)], DistillationConfig(), "set it to true"),
        ([chunk()], [chunk(fp16=True)], DistillationConfig(), "fp16=true of the student's"),
    ],
)
def test_refusals(teacher, student, settings, says):
    with pytest.raises(ValueError, match=says):
        _check_pair(teacher, student, settings, None)


@pytest.mark.parametrize("vocab_size", [0, 9])
def test_a_vocabulary_that_a_model_does_not_have(vocab_size):
    with pytest.raises(ValueError, match=rf"^vocab_size={vocab_size} must be from 1 to 8, "):
        _check_pair([chunk(8)], [chunk(16)], DistillationConfig(), vocab_size)


@pytest.mark.parametrize(("vocab_size", "least"), [(None, 16), (10, 10)])
def test_more_logits_than_tokens(vocab_size, least):
    settings = DistillationConfig(loss="top_k", top_k=least + 1)
    with pytest.raises(ValueError, match=rf"top_k={least + 1} .*the vocabulary of {least}; "):
        _check_pair([chunk(16)], [chunk(16)], settings, vocab_size)
    settings.top_k = least
    _check_pair([chunk(16)], [chunk(16)], settings, vocab_size)


def test_a_padded_vocabulary_is_said():
    _check_pair([chunk(8)], [chunk(16)], DistillationConfig(), 8)


def test_stages_that_would_wait_for_each_other(monkeypatch):
    """Megatron waits for the device after each exchange of an interleaved schedule."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def pair(**settings: bool) -> None:
        one = chunk()
        vars(one.config).update(settings)
        _check_pair([chunk(), chunk()], [one, one], DistillationConfig(), None)

    with pytest.raises(ValueError, match="batch_p2p_sync=true of the student's"):
        pair(batch_p2p_comm=True, batch_p2p_sync=True)
    pair(batch_p2p_comm=True, batch_p2p_sync=False)
    pair(batch_p2p_comm=False, batch_p2p_sync=True)
