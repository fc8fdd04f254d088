"""A distillation step against its parts, its gradients on the device and the CPU, and its waits.

The trace of torch's profiler counts what makes the host wait for the device. What a step of 2n
micro-batches has more than one of n is what micro-batches cost; it must be nothing.
"""

import gzip
import shutil
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.distill_step import (
    TEACHER,
    clear_gradients,
    distiller,
    measure,
    micro_batches,
    ratios,
)
from benchmarks.gpu.common import Options, Result, fill, mib, on_cpu, peak_bytes, relative
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.runtime.launch import distributed
from tests.cases.sync import Waits

# Llama-3.2-1B and a student of three quarters of its width.
BIG = replace(
    TEACHER,
    num_layers=16,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=128_256,
)
BIG_STUDENT = replace(BIG, hidden_size=1536, ffn_hidden_size=6144)
TINY = replace(TEACHER, num_layers=2, hidden_size=96, ffn_hidden_size=192, vocab_size=1024)
TINY_STUDENT = replace(TINY, hidden_size=72, ffn_hidden_size=128)
RATIO_LIMIT = 1.05
GRADIENT_LIMIT = 1e-4
# Calls of the runtime that return when the device has caught up, and copies that do the same
# because one end is ordinary (pageable) host memory.
WAITING = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "Memcpy DtoH (Device -> Pageable)",
    "Memcpy HtoD (Pageable -> Device)",
)
HEADER = ["what", "teacher ms", "student ms", "step ms", "step / sum", "step's peak MiB"]
_TRACE = "step.trace.json.gz"


def gradients(teacher: ModelConfig, student: ModelConfig) -> tuple[Tensor, Tensor]:
    """``[KD, CE, tokens]`` and all gradients of one global batch, in fp32."""
    with distributed(ParallelConfig()):
        both = distiller(teacher, student, ParallelConfig(), 2, 64)
        fill(both.teacher.chunks, 1)
        fill(both.chunks, 2)
        clear_gradients(both)
        sums = both.forward_backward(micro_batches(2, 64, teacher.vocab_size))
        found = [p.main_grad.flatten() for chunk in both.chunks for p in chunk.parameters()]
        return torch.stack(sums).cpu(), torch.cat(found).cpu()


def _counts(both: Any, batches: list[Any], trace: Path) -> Counter[str]:
    """What waits during a global batch: operators on a CPU, traced calls where there is CUDA."""
    clear_gradients(both)
    if not torch.cuda.is_available():
        with Waits() as mode:
            both.forward_backward(batches)
        return mode.found
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        both.forward_backward(batches)
    raw = trace.with_suffix("")
    profiler.export_chrome_trace(str(raw))
    with raw.open("rb") as source, gzip.open(trace, "wb") as target:
        shutil.copyfileobj(source, target)
    raw.unlink()
    events = {event.key: event.count for event in profiler.key_averages()}
    return Counter({name: events[name] for name in WAITING if name in events})


def _waits(
    teacher: ModelConfig, student: ModelConfig, sizes: tuple[int, int], options: Options
) -> dict[str, Any]:
    """Waits of a step of some micro-batches and of twice as many, and what a step needs at most."""
    samples, seq = sizes
    precision = _precision(options)
    both = distiller(teacher, student, ParallelConfig(), samples, seq, precision)
    batches = micro_batches(2 * samples, seq, teacher.vocab_size)

    def step() -> None:
        clear_gradients(both)
        both.forward_backward(batches[:samples])

    step()  # what is compiled or allocated once is no part of the trace
    peak = peak_bytes(step)
    found = [
        _counts(both, batches[:count], options.output / _TRACE) for count in (samples, 2 * samples)
    ]
    more = {name: count - found[0][name] for name, count in found[1].items()}
    return {
        "peak_bytes": peak,
        "micro_batches": [samples, 2 * samples],
        "waits": [dict(counts) for counts in found],
        "per_micro_batch": {name: count / samples for name, count in more.items() if count},
    }


def _precision(options: Options) -> str:
    return "32" if options.small else "bf16-mixed"


def run(options: Options) -> Result:
    """Gradients first, then times, then the trace."""
    wanted, found = on_cpu(gradients, TINY, TINY_STUDENT), gradients(TINY, TINY_STUDENT)
    errors = [relative(a, b) for a, b in zip(found, wanted, strict=True)]
    teacher, student = (TINY, TINY_STUDENT) if options.small else (BIG, BIG_STUDENT)
    samples, seq, rounds = (2, 32, 2) if options.small else (8, 2048, 7)
    with distributed(ParallelConfig()):
        sizes = (samples, seq, rounds)
        times = measure(teacher, student, ParallelConfig(), *sizes, _precision(options))
    with distributed(ParallelConfig()):
        waits = _waits(teacher, student, (samples, seq), options)
    ratio = ratios(times)[0]
    figures = {
        "gradient_errors": errors,
        "times": times,
        "ratio": ratio,
        **waits,
    }
    seconds = [statistics.median(x[0] for x in times[n]) for n in ("teacher", "student", "step")]
    shown = [*(f"{1e3 * x:.1f}" for x in seconds), f"{ratio:.3f}", mib(waits["peak_bytes"])]
    name = f"{samples} x {seq:,} tokens, {'fp32' if options.small else 'bf16'}"
    checks = {
        f"losses and gradients within {GRADIENT_LIMIT:.0e} of the CPU's": max(errors)
        <= GRADIENT_LIMIT,
        "no host wait per micro-batch": not waits["per_micro_batch"],
    }
    if not options.small:  # a CPU's tiny step is all overhead
        checks[f"a step takes at most {RATIO_LIMIT} times its parts"] = ratio <= RATIO_LIMIT
    text = _text(teacher, student)
    return Result("A distillation step", text, HEADER, [[name, *shown]], checks, figures)


def _text(teacher: ModelConfig, student: ModelConfig) -> str:
    how = "torch's profiler" if torch.cuda.is_available() else "the operators that would wait"
    return (
        f"Teacher of {teacher.num_layers} layers, width {teacher.hidden_size}, vocabulary "
        f"{teacher.vocab_size:,}; student of width {student.hidden_size}; forward KL. The step, a "
        "teacher's evaluation and a student's language-model step take turns on the same "
        "micro-batches; medians, the ratio is the median of the rounds' ratios. Gradients are "
        "compared with the CPU's on a small pair in fp32. Host waits of a step and of one with "
        f"twice the micro-batches are counted by {how}."
    )
