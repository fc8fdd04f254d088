"""How fast models read and write, and what memory that takes, on any layout that can generate.

Models take turns in one process, so that whatever else the machine does hits all of them.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_minitron.distillation.offload import HostWeights
from nemo_minitron.models.inference import CachedModel
from nemo_minitron.runtime.launch import device
from nemo_minitron.runtime.worlds import barrier

# Kept free below the limit: allocators round up, and activations are not quite linear.
_SLACK = 0.05
EQUAL, LARGEST = "equal", "largest"


@dataclass(frozen=True)
class Work:
    """Sizes of the batches that are measured.

    Attributes:
        batch: sequences on each data-parallel rank.
        prompt_length: tokens of each prompt.
        new_tokens: that follow.
        seed: of the prompts.
    """

    batch: int
    prompt_length: int
    new_tokens: int
    seed: int


@dataclass
class Candidate:
    """A model that takes its turn.

    Attributes:
        label: its name in tables.
        model: the model, on this rank.
        seconds: ``(prefill, decode)`` of every measurement.
        memory: ``memory_of`` at the last measurement.
    """

    label: str
    model: CachedModel
    seconds: list[tuple[float, float]] = field(default_factory=list)
    memory: dict[str, int | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Move the weights to host memory on a GPU, until they are measured."""
        tensors = [*self.model.chunk.parameters(), *self.model.chunk.buffers()]
        self.host = HostWeights(tensors)
        if torch.cuda.is_available():
            self.host.release()


def run_once(candidate: Candidate, work: Work, steps: int | None = None) -> tuple[float, float]:
    """Return seconds of prefill and of decoding, the same on every rank (collective).

    Args:
        candidate: whose ``memory`` this fills too.
        work: what to do.
        steps: number of tokens to decode, or None for all. Memory is reserved for all.
    """
    steps = work.new_tokens - 1 if steps is None else steps
    vocab = candidate.model.vocab_size
    draw = torch.Generator().manual_seed(work.seed)
    prompts = torch.randint(0, vocab, (work.batch, work.prompt_length), generator=draw)
    if not torch.cuda.is_available():
        return _timed(candidate, prompts.to(device()), work, steps)
    with candidate.host.on_device():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return _timed(candidate, prompts.to(device()), work, steps)


@torch.inference_mode()
def _timed(candidate: Candidate, tokens: Tensor, work: Work, steps: int) -> tuple[float, float]:
    model = candidate.model
    model.start(work.batch, work.prompt_length + work.new_tokens)
    moments = [_moment()]
    tokens = _next(model, tokens)
    moments.append(_moment())
    for _ in range(steps):
        tokens = _next(model, tokens)
    moments.append(_moment())
    candidate.memory = memory_of(model)
    model.stop()
    found = torch.tensor([moments[1] - moments[0], moments[2] - moments[1]], dtype=torch.float64)
    found = found.to(device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=dist.group.WORLD)
    prefill, decode = found.tolist()
    return prefill, decode


def _next(model: CachedModel, tokens: Tensor) -> Tensor:
    """Return ``[b, 1]`` most likely tokens after ``[b, s]``."""
    logits = model.forward(tokens)
    ids = None if logits is None else logits.argmax(-1)
    return model.from_last_stage(ids, tokens.size(0))[:, None]


def _moment() -> float:
    """Return the time once every rank has arrived here."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    barrier()
    return time.perf_counter()


def memory_of(model: CachedModel) -> dict[str, int | None]:
    """Bytes of the rank that has most: ``weights``, ``kv_cache``, and on a GPU ``peak`` of all."""
    weights = {p.untyped_storage().data_ptr(): p.nbytes for p in model.chunk.parameters()}
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else -1
    found = torch.tensor([sum(weights.values()), model.cache_bytes, peak], device=device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=dist.group.WORLD)
    held, cache, most = (int(x) for x in found.tolist())
    return {"weights": held, "kv_cache": cache, "peak": None if most < 0 else most}


def used(memory: dict[str, int | None]) -> int:
    """Bytes that count against the limit: the peak where it is known, else weights and cache."""
    peak = memory["peak"]
    return int(peak if peak is not None else (memory["weights"] or 0) + (memory["kv_cache"] or 0))


def largest_batch(candidate: Candidate, work: Work, limit: int, most: int) -> int:
    """Return the largest batch that fits, by a straight line through two batches (collective).

    Raises:
        ValueError: one sequence does not fit.
    """
    points = []
    for batch in (1, 2):
        run_once(candidate, replace(work, batch=batch), steps=1)
        points.append(used(candidate.memory))
    start, slope = points[0], max(points[1] - points[0], 1)
    room = int(limit * (1 - _SLACK)) - start
    if room < 0:
        raise ValueError(
            f"memory_limit_gb={limit / 1e9:g}: {candidate.label} takes {start / 1e9:.3g} GB with "
            f"one sequence of {work.prompt_length + work.new_tokens} tokens, and {_SLACK:.0%} stay "
            "free; raise memory_limit_gb, shorten prompt_length, or split the model further "
            "(parallel.*)"
        )
    return min(1 + room // slope, most)


def take_turns(
    candidates: Sequence[Candidate],
    batches: Sequence[int],
    work: Work,
    rounds: int,
    advance: Callable[[], None],
) -> list[dict[str, Any]]:
    """Measure every model ``rounds`` times at its batch; a first round does not count.

    Args:
        candidates: the models, in the order of the first round; each round starts with another.
        batches: of each model.
        work: the rest of what is measured.
        rounds: that count.
        advance: called after every measurement.

    Returns:
        Figures of each model: ``batch_size``, ``memory`` and medians with lowest and highest.
    """
    for candidate in candidates:
        candidate.seconds.clear()
    pairs = list(zip(candidates, batches, strict=True))
    for number in range(rounds + 1):
        turn = number % len(pairs)
        for candidate, batch in [*pairs[turn:], *pairs[:turn]]:
            each = replace(work, batch=batch)
            seconds = run_once(candidate, each)
            if number:
                candidate.seconds.append(seconds)
            advance()
    return [_figures(candidate, batch, work) for candidate, batch in pairs]


def _figures(candidate: Candidate, batch: int, work: Work) -> dict[str, Any]:
    """Tokens per second count those of all data-parallel ranks; latencies are those of a batch."""
    everywhere = batch * candidate.model.groups.dp.size()
    prefill = [seconds for seconds, _ in candidate.seconds]
    step = [seconds / (work.new_tokens - 1) for _, seconds in candidate.seconds]
    return {
        "batch_size": batch,
        "memory": candidate.memory,
        "prefill_tokens_per_second": _spread(
            [everywhere * work.prompt_length / s for s in prefill]
        ),
        "decode_tokens_per_second": _spread([everywhere / s for s in step]),
        "first_token_seconds": _spread(prefill),
        "token_seconds": _spread(step),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}
