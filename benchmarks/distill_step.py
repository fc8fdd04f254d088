"""One distillation step against its parts: teacher forward plus student forward and backward.

``python -m benchmarks.distill_step`` from the repository root. In one process per rank the step and
its parts take turns on the same tokens; the figure is the median over the rounds of
``step / (teacher + student)``. The teacher's part is an evaluation (forward, output layer, loss);
the student's is a language-model training step without the optimizer. Random weights, fp32, CPU.
Exit status 1 when a ratio of CPU times is above 1.05.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from omegaconf import OmegaConf

from benchmarks.docs_block import markdown_table, write_block
from nemo_minitron.config.distillation import DistillationConfig
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig, TeacherParallelConfig
from nemo_minitron.config.training import DataConfig, OptimConfig, TrainerConfig
from nemo_minitron.families.registry import family_of
from nemo_minitron.families.table import parameter_count
from nemo_minitron.runtime.console import show_table
from nemo_minitron.runtime.launch import device
from tests.helpers.pool import WorkerPool

# SmolLM2-135M, with fewer layers; the student is pruned in width.
TEACHER = ModelConfig(
    family="llama",
    num_layers=30,
    hidden_size=576,
    ffn_hidden_size=1536,
    num_attention_heads=9,
    num_query_groups=3,
    kv_channels=64,
    vocab_size=49152,
    max_position_embeddings=8192,
    share_embeddings_and_output_weights=True,
)
STUDENT = replace(TEACHER, hidden_size=448, ffn_hidden_size=1024)
LAYOUTS = {
    "TP=1": (1, ParallelConfig()),
    "PP=2": (2, ParallelConfig(pipeline_model_parallel_size=2)),
}
LIMIT = 1.05
HEADER = ("layout", "teacher", "student", "step", "step / sum, CPU time", "step / sum, wall time")

Seconds = tuple[float, float]
"""Wall time, and CPU time of all ranks."""


def _config(
    student: ModelConfig,
    teacher: ModelConfig | None,
    parallel: ParallelConfig,
    samples: int,
    seq: int,
    precision: str,
) -> Any:
    data = DataConfig(path="-", seq_length=seq, global_batch_size=samples)
    sections: dict[str, Any] = {
        "gpt": student,
        "parallel": parallel,
        "data": data,
        "trainer": TrainerConfig(precision=precision),
        "optim": OptimConfig(),
        "distillation": DistillationConfig(),
        "teacher_parallel": TeacherParallelConfig(),
    }
    sections |= {} if teacher is None else {"teacher": teacher}
    config = {name: asdict(section) for name, section in sections.items()}
    return OmegaConf.create({**config, "chunk_size": DistillationConfig().chunk_size})


def _fill(chunks: list[Any]) -> None:
    generator = torch.Generator(device()).manual_seed(0)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.data.normal_(0, 0.02, generator=generator)
            if "norm" in name:
                parameter.data.add_(1.0)


def _trainable(model: Any) -> None:
    """Gradient buffers and hooks of Megatron's DDP, as in training."""
    from nemo_minitron.models.optim import build_optimizer, wrap_ddp

    _fill(model.chunks)
    model.model = torch.nn.ModuleList(wrap_ddp(model.chunks, model.optim_cfg))
    build_optimizer(list(model.model), model.optim_cfg, model.trainer_cfg)
    model.train()


def micro_batches(samples: int, seq: int, vocab: int) -> list[dict[str, torch.Tensor]]:
    """Micro-batches of one random sample each, on the device."""
    ids = torch.randint(0, vocab, (samples, seq + 1), generator=torch.Generator().manual_seed(1))
    return [
        {
            "tokens": row[None, :-1],
            "labels": row[None, 1:],
            "loss_mask": torch.ones(1, seq, device=device()),
            "position_ids": torch.arange(seq, device=device())[None],
        }
        for row in ids.to(device())
    ]


def clear_gradients(model: Any) -> None:
    """Before a global batch; nothing in a model that is not trained."""
    for chunk in model.model:
        if hasattr(chunk, "zero_grad_buffer"):
            chunk.zero_grad_buffer()


def _meet() -> None:
    """Wait for every rank and its device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    torch.distributed.barrier()


def _timed(work: Callable[[], Any], model: Any) -> Seconds:
    """Run on every rank at once."""
    clear_gradients(model)
    _meet()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    spent = torch.tensor(time.process_time() - cpu, dtype=torch.float64, device=device())
    _meet()
    wall = time.perf_counter() - wall
    torch.distributed.all_reduce(spent)
    return wall, spent.item()


def distiller(
    teacher: ModelConfig,
    student: ModelConfig,
    parallel: ParallelConfig,
    samples: int,
    seq: int,
    precision: str = "32",
) -> Any:
    """Random student, ready for training, and random teacher; the layout is initialised."""
    from nemo_minitron.models.distill import DistillationGPTModel

    both = DistillationGPTModel(_config(student, teacher, parallel, samples, seq, precision))
    _fill(both.teacher.chunks)
    _trainable(both)
    return both


def measure(
    teacher: ModelConfig,
    student: ModelConfig,
    parallel: ParallelConfig,
    samples: int,
    seq: int,
    rounds: int,
    precision: str = "32",
) -> dict[str, list[Seconds]]:
    """Times of every round of the step and its parts; the first round of each is left out."""
    from nemo_minitron.models.gpt import MinitronGPTModel
    from nemo_minitron.runtime.launch import init_model_parallel

    init_model_parallel(parallel)
    both = distiller(teacher, student, parallel, samples, seq, precision)
    alone = MinitronGPTModel(_config(student, None, parallel, samples, seq, precision))
    _trainable(alone)
    frozen = MinitronGPTModel(_config(teacher, None, parallel, samples, seq, precision))
    _fill(frozen.chunks)
    frozen.eval()
    batches = micro_batches(samples, seq, teacher.vocab_size)
    runs: dict[str, tuple[Callable[[], Any], Any]] = {
        "step": (lambda: both.forward_backward(batches), both),
        "teacher": (lambda: frozen.evaluate_batch(batches), frozen),
        "student": (lambda: alone.forward_backward(batches), alone),
    }
    times: dict[str, list[Seconds]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in runs if number % 2 else reversed(runs):
            seconds = _timed(*runs[name])
            if number:
                times[name].append(seconds)
    return times


def ratios(times: dict[str, list[Seconds]]) -> tuple[float, float]:
    """Median over the rounds of step / (teacher + student): of wall and of CPU time."""
    found = []
    for kind in (0, 1):
        rounds = zip(*(times[name] for name in ("step", "teacher", "student")), strict=True)
        found.append(statistics.median(s[kind] / (t[kind] + u[kind]) for s, t, u in rounds))
    return found[0], found[1]


def _row(layout: str, times: dict[str, list[Seconds]]) -> list[str]:
    cpu = [statistics.median(x[1] for x in times[name]) for name in ("teacher", "student", "step")]
    wall_ratio, cpu_ratio = ratios(times)
    return [layout, *(f"{x:.2f} s" for x in cpu), f"{cpu_ratio:.3f}", f"{wall_ratio:.3f}"]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8, help="of teacher and student")
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--samples", type=int, default=4, help="micro-batches of one sample")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="update docs/benchmarks.md")
    return parser.parse_args(arguments)


def _describe(args: argparse.Namespace, teacher: ModelConfig, student: ModelConfig) -> str:
    sizes = [
        f"{parameter_count(family_of(config), config)['total'] / 1e6:.0f}M"
        for config in (teacher, student)
    ]
    return (
        f"Teacher of {sizes[0]} and student of {sizes[1]} parameters: {args.layers} layers of "
        f"SmolLM2-135M's width, and the same with {STUDENT}; vocabulary 49,152. {args.samples} "
        f"micro-batches of {args.seq_length} tokens, forward KL. Teacher: forward pass with its "
        "output layer and a loss; student: forward and backward of a language-model step. CPU "
        f"seconds over all ranks, medians of {args.rounds} rounds in which the three take turns in "
        "one process per rank; the ratios are medians of the rounds' ratios. fp32, one thread per "
        f"rank ({platform.machine()}), torch {torch.__version__.split('+')[0]}.\n\n"
    )


def main() -> int:
    """Measure every layout and show the table; 1 when a step costs more than its parts allow."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    args = parse()
    teacher = replace(TEACHER, num_layers=args.layers)
    student = replace(STUDENT, num_layers=args.layers)
    pool, results = WorkerPool(), {}
    try:
        for layout, (size, parallel) in LAYOUTS.items():
            sizes = (args.samples, args.seq_length, args.rounds)
            results[layout] = pool.run(size, measure, teacher, student, parallel, *sizes)[0]
    finally:
        pool.close()
    rows = [_row(layout, times) for layout, times in results.items()]
    show_table("One distillation step", HEADER, rows)
    if args.write:
        text = "## A distillation step and its parts\n\n" + _describe(args, teacher, student)
        write_block("distill_step", text + markdown_table(HEADER, rows))
    return int(any(ratios(times)[1] > LIMIT for times in results.values()))


if __name__ == "__main__":
    sys.exit(main())
