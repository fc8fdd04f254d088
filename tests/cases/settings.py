"""Tasks for the rank pool: training with and without settings of Megatron's own."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from tests.cases.kd import batches, loaded, model_cfg, zero_gradients
from tests.cases.training import left_in_memory, train

Pair = tuple[ModelConfig, str]
Section = dict[str, dict[str, Any]]
GLOBAL_BATCH = 8


@dataclass(frozen=True)
class Found:
    """The effect of one section on this rank.

    Attributes:
        difference: largest one of a gradient, from those without a section.
        passes: forward passes of layers, of student and teacher.
        buckets: groups of gradients that are reduced one by one.
        settings: fields of the student's ``TransformerConfig`` that the teacher's has otherwise.
    """

    difference: float
    passes: dict[str, int]
    buckets: int
    settings: dict[str, Any]


def _student_alone(model: Any) -> dict[str, Any]:
    student, teacher = model.last_chunk.config, model.teacher.chunks[0].config
    names = ("recompute_granularity", "recompute_num_layers", "sequence_parallel")
    mine = {name: getattr(student, name) for name in names}
    return {name: v for name, v in mine.items() if v != getattr(teacher, name)}


def _count_layers(model: Any) -> dict[str, int]:
    passes = {"student": 0, "teacher": 0}

    def counted(who: str) -> Any:
        return lambda *_: passes.update({who: passes[who] + 1})

    for who, chunks in (("student", model.chunks), ("teacher", model.teacher.chunks)):
        for chunk in chunks:
            for layer in chunk.decoder.layers:
                layer.register_forward_hook(counted(who))
    return passes


def _two_batches(
    student: Pair, teacher: Pair, parallel: ParallelConfig, megatron: Section, over: dict[str, Any]
) -> tuple[list[dict[str, Tensor]], Found]:
    """Gradients of two global batches.

    Megatron overlaps from the second batch on: the first one tells it how often each gradient
    comes.
    """
    from nemo_minitron.runtime.launch import init_model_parallel

    init_model_parallel(parallel)
    cfg = model_cfg(student[0], teacher[0], parallel, megatron=megatron, **over)
    # Every rank keeps all gradients, so they can be compared.
    cfg.optim.use_distributed_optimizer = False
    model = loaded(cfg, student, teacher)
    model.configure_optimizers()
    model.train()
    passes, dp, gradients = _count_layers(model), model.groups.dp, []
    for seed in (0, 1):
        zero_gradients(model)
        mine = batches(GLOBAL_BATCH, 16, student[0].vocab_size, seed)[dp.rank() :: dp.size()]
        model.forward_backward(mine)
        gradients.append(
            {
                f"{index}.{name}": parameter.main_grad.clone()
                for index, chunk in enumerate(model.chunks)
                for name, parameter in chunk.named_parameters()
            }
        )
    chunks: list[Any] = list(model.model)
    buckets = sum(len(chunk.bucket_groups) for chunk in chunks)
    return gradients, Found(0.0, passes, buckets, _student_alone(model))


def compare_gradients(
    student: Pair,
    teacher: Pair,
    parallel: ParallelConfig,
    sections: list[Section],
    over: dict[str, Any],
) -> list[Found]:
    """Compute gradients without a section, then with each section."""
    want, plain = _two_batches(student, teacher, parallel, {}, dict(over))
    found = [plain]
    for section in sections:
        got, one = _two_batches(student, teacher, parallel, section, dict(over))
        difference = max(
            float((mine[name] - theirs[name]).abs().max())
            for mine, theirs in zip(got, want, strict=True)
            for name in theirs
        )
        found.append(Found(difference, one.passes, one.buckets, one.settings))
    return found


def trained(
    student: Pair,
    teacher: Pair,
    parallel: ParallelConfig,
    work: str,
    section: Section,
    over: dict[str, Any],
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """History and final weights of this rank after a short ``fit`` with validation and saves."""
    keys = {key: dict(value) if isinstance(value, dict) else value for key, value in over.items()}
    return train(student, teacher, parallel, work, {**keys, "megatron": section})


def left_after(
    student: Pair, teacher: Pair, parallel: ParallelConfig, work: str, section: Section
) -> list[str]:
    """Return the objects of Megatron that a short training leaves in memory."""
    trainer = {"max_steps": 2, "save_every_n_steps": 0, "limit_val_batches": 0}
    over = {"megatron": section, "trainer": trainer, "optim": {"lr_warmup_steps": 0}}
    return left_in_memory(student, teacher, parallel, work, over)
