"""Tasks for the rank pool: one distillation step with and without recomputed activations."""

from collections import Counter
from typing import Any

import torch

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from tests.cases.kd import batches, loaded, model_cfg, wrap, zero_gradients

_COUNTED = {
    "core_attention": "core_attn",
    "mlp": "mlp",
    "experts": "experts",
    "linear_qkv": "layer",
}
MICRO_BATCHES = 2


def _count(module: torch.nn.Module, who: str, counts: Counter[str]) -> None:
    """Count the forward passes of the parts of every layer."""
    for name, part in module.named_modules():
        kind = _COUNTED.get(name.rpartition(".")[2])
        if kind is not None:
            part.register_forward_hook(lambda *_, key=f"{who}.{kind}": counts.update([key]))


def _step(
    student: tuple[ModelConfig, str],
    teacher: tuple[ModelConfig, str],
    parallel: ParallelConfig,
    trainer: dict[str, Any],
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, float]]:
    """Loss sums, gradients of this rank, and forward passes per layer and micro-batch."""
    cfg = model_cfg(student[0], teacher[0], parallel, trainer=trainer)
    model = loaded(cfg, student, teacher)
    counts: Counter[str] = Counter()
    for chunk in model.chunks:
        _count(chunk, "student", counts)
    for chunk in model.teacher.chunks:
        _count(chunk, "teacher", counts)
    wrap(model)
    model.train()
    zero_gradients(model)
    sums = model.forward_backward(batches(MICRO_BATCHES, 16, student[0].vocab_size))
    gradients = {
        f"{index}.{name}": parameter.main_grad.clone()
        for index, chunk in enumerate(model.chunks)
        for name, parameter in chunk.named_parameters()
    }
    here = sum(len(chunk.decoder.layers) for chunk in model.chunks)
    there = sum(len(chunk.decoder.layers) for chunk in model.teacher.chunks)
    passes = {
        key: count / MICRO_BATCHES / (here if key.startswith("student") else there)
        for key, count in counts.items()
    }
    return torch.stack(sums), gradients, passes


def with_and_without(
    student: tuple[ModelConfig, str],
    teacher: tuple[ModelConfig, str],
    parallel: ParallelConfig,
    settings: list[dict[str, Any]],
) -> list[tuple[list[str], dict[str, float]]]:
    """For every setting: gradients that differ in any bit, and forward passes."""
    from nemo_minitron.runtime.launch import init_model_parallel

    init_model_parallel(parallel)
    want_sums, want, plain = _step(student, teacher, parallel, {})
    found: list[tuple[list[str], dict[str, float]]] = [([], plain)]
    for trainer in settings:
        sums, got, passes = _step(student, teacher, parallel, trainer)
        different = [name for name in want if not torch.equal(got[name], want[name])]
        if not torch.equal(sums, want_sums):
            different.append("sums")
        found.append((different, passes))
    return found
