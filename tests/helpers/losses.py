"""Distillation losses by plain autograd on whole logits: what the fused ones must equal."""

from typing import Any

import torch
from torch import Tensor

from nemo_minitron.config.distillation import DistillationConfig
from nemo_minitron.distillation.top_k import TopKTargets

# One configuration per kind, at a temperature other than 1 where there is one.
KINDS: dict[str, dict[str, Any]] = {
    "forward_kl": {"temperature": 2.0},
    "forward_kl_square": {"temperature": 2.0, "temperature_scaling": "square"},
    "reverse_kl": {"temperature": 2.0},
    "js": {"temperature": 2.0},
    "js_skewed": {"js_beta": 0.9},
    "mse": {},
    "cosine": {},
    "top_k": {"temperature": 2.0, "top_k": 7},
    "top_k_tail": {"temperature": 2.0, "top_k": 7},
}


def loss_keys(kind: str) -> dict[str, Any]:
    """Keys of ``DistillationConfig`` for an entry of ``KINDS``."""
    return {"loss": kind.removesuffix("_square").removesuffix("_skewed"), **KINDS[kind]}


def kd_per_token(config: DistillationConfig, student: Tensor, teacher: Tensor) -> Tensor:
    """``[N]`` distillation loss from whole logits ``[N, v]``, as a textbook writes it."""
    s, t = student / config.temperature, teacher / config.temperature
    q, p = s.softmax(-1), t.softmax(-1)
    if config.loss == "forward_kl":
        return (p * (p.log() - q.log())).sum(-1)
    if config.loss == "reverse_kl":
        return (q * (q.log() - p.log())).sum(-1)
    if config.loss == "js":
        b = config.js_beta
        m = b * p + (1 - b) * q
        from_student = (q * (q / m).log()).sum(-1)
        return b * (p * (p / m).log()).sum(-1) + (1 - b) * from_student
    if config.loss == "mse":
        return torch.nn.functional.mse_loss(student, teacher, reduction="none").mean(-1)
    if config.loss == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(student, teacher, dim=-1)
    assert config.top_k is not None
    ids = teacher.argsort(dim=-1, descending=True, stable=True)[:, : config.top_k]
    if config.loss == "top_k":
        p, q = t.gather(-1, ids).softmax(-1), s.gather(-1, ids).softmax(-1)
        return (p * (p.log() - q.log())).sum(-1)
    p, q = p.gather(-1, ids), q.gather(-1, ids)
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
    return (p * (p.log() - q.log())).sum(-1)


def reference(
    config: DistillationConfig, student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """``[KD, CE]`` sums of masked tokens and their weighted total."""
    scale = config.temperature**2 if config.temperature_scaling == "square" else 1.0
    kd = scale * (kd_per_token(config, student, teacher) * mask).sum()
    ce = torch.nn.functional.cross_entropy(student, labels, reduction="none")
    ce = (ce * mask).sum()
    return torch.stack([kd, ce]), config.kd_weight * kd + config.ce_weight * ce


def problem(vocab: int, tokens: int = 23, rows: int | None = None) -> dict[str, Tensor]:
    """Random fp64 inputs; both weights have ``rows`` rows, those above ``vocab`` full of junk."""
    generator = torch.Generator().manual_seed(vocab)

    def randn(rows: int, width: int, total: int = 0) -> Tensor:
        values = torch.randn(rows, width, generator=generator, dtype=torch.float64)
        junk = values.new_full((max(0, total - rows), width), 1e3)
        return torch.cat([values, junk])

    rows = rows or vocab
    return {
        "hidden": randn(tokens, 12),
        "weight": randn(vocab, 12, rows) * 0.4,
        "teacher_hidden": randn(tokens, 20),
        "teacher_weight": randn(vocab, 20, rows) * 0.4,
        "labels": torch.randint(0, vocab, (tokens,), generator=generator),
        "mask": (torch.rand(tokens, generator=generator) < 0.7).double(),
    }


def stored_targets(
    inputs: dict[str, Tensor], vocab: int, k: int, temperature: float
) -> TopKTargets:
    """Return what an offline teacher would have stored."""
    logits = inputs["teacher_hidden"] @ inputs["teacher_weight"][:vocab].t()
    values, ids = logits.topk(k, dim=-1)
    return TopKTargets(values, ids, (logits / temperature).logsumexp(-1), temperature)
