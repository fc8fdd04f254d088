"""What scoring costs beside the same forward passes without it.

``python -m benchmarks.importance`` from the repository root, on a machine that does nothing else.
Every matrix has the shape of SmolLM2-135M's (its attention is cut into 12 heads in 4 query groups
instead of 9 in 3, so that two ranks can share them); random weights. In one process per rank,
batches alternate between plain passes and passes with every hook of the default scores. A pass
varies by several per cent even on a quiet machine, so there are many. Exit status 1 when the hooks
cost more than 1.03x.

Batches are what the stage makes of its defaults, one sample of ``data.seq_length`` tokens; shorter
ones cost more (docs/design/scoring-cost.md).
"""

import argparse
import platform
import sys
import time
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from benchmarks.docs_block import markdown_table, write_block
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import ScoreConfig
from nemo_minitron.config.training import DataConfig
from nemo_minitron.runtime.console import show_table
from tests.helpers.pool import WorkerPool

MODEL = ModelConfig(
    family="llama",
    num_layers=30,
    hidden_size=576,
    ffn_hidden_size=1536,
    num_attention_heads=12,
    num_query_groups=4,
    kv_channels=48,
    vocab_size=49152,
    max_position_embeddings=2048,
    share_embeddings_and_output_weights=True,
)
MAX_RATIO = 1.03
TOKENS_PER_RUN = 12288  # of each kind; one run of the worker pool has to end in minutes
KINDS = ("plain", "hooked")
HEADER = ("layout", "plain s", "with hooks s", "median ratio", "CPU time ratio")

Passes = dict[str, list[tuple[float, float]]]
"""Kind of pass -> (wall, CPU) seconds of each, in pairs of neighbours."""


def time_passes(tp: int, batches: int, seq_length: int) -> Passes:
    """Run on every rank: plain and hooked passes by turns, the first pair to warm up."""
    from nemo_minitron.importance.hooks import ChunkRecorder
    from nemo_minitron.models.build import build_gpt
    from nemo_minitron.models.schedule import run_schedule
    from nemo_minitron.runtime.groups import ParallelGroups
    from nemo_minitron.runtime.launch import init_model_parallel

    parallel = ParallelConfig(tensor_model_parallel_size=tp)
    init_model_parallel(parallel)
    groups = ParallelGroups.current()
    (chunk,) = build_gpt(MODEL, parallel, groups)
    torch.manual_seed(0)
    for parameter in chunk.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    chunk.return_hidden = True
    chunk.eval()
    recorder = ChunkRecorder(chunk, groups, ScoreConfig(), lambda index: 1)
    batch = _batch(seq_length)
    seconds: Passes = {kind: [] for kind in KINDS}
    # Neither kind is always the first of its pair.
    order = [kind for pair in range(batches + 1) for kind in (KINDS, KINDS[::-1])[pair % 2]]
    with torch.no_grad():
        for kind in order:
            with ExitStack() as handles:
                if kind == "hooked":
                    recorder.register(partial(_keep, handles))
                torch.distributed.barrier(group=groups.tp)
                start = time.perf_counter(), time.process_time()
                run_schedule([chunk], [batch], _nothing, forward_only=True, collect_outputs=True)
                spent = time.perf_counter() - start[0], time.process_time() - start[1]
            seconds[kind].append(spent)
    return {kind: passes[1:] for kind, passes in seconds.items()}


def _keep(handles: ExitStack, handle: RemovableHandle) -> None:
    """Remove a hook at the end of the context."""
    handles.callback(handle.remove)


def _nothing(index: int, batch: Any, hidden: torch.Tensor) -> None:
    """The hooks have seen all there is to see."""


def _batch(seq_length: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, MODEL.vocab_size, (1, seq_length))
    positions = torch.arange(seq_length)[None]
    return {"tokens": tokens, "position_ids": positions}


def runs(pool: WorkerPool, tp: int, batches: int, seq_length: int) -> list[Passes]:
    """What ``time_passes`` found on every rank, in as many runs as the pool's time limit asks."""
    found: list[Passes] = [{kind: [] for kind in KINDS} for _ in range(tp)]
    at_once = max(1, TOKENS_PER_RUN // seq_length)
    for start in range(0, batches, at_once):
        count = min(at_once, batches - start)
        ranks = pool.run(tp, time_passes, tp, count, seq_length)
        for total, rank in zip(found, ranks, strict=True):
            for kind, passes in rank.items():
                total[kind] += passes
    return found


def row(tp: int, ranks: list[Passes]) -> tuple[list[str], float]:
    """Line of the table and the ratio that counts: the median over pairs of neighbours."""
    plain, hooked = (ranks[0][kind] for kind in KINDS)
    ratio = median(after[0] / before[0] for before, after in zip(plain, hooked, strict=True))
    cpu = [sum(cpu for rank in ranks for _, cpu in rank[kind]) for kind in ("hooked", "plain")]
    walls = [sum(wall for wall, _ in kind) for kind in (plain, hooked)]
    cells = [f"TP={tp}", *(f"{wall:.2f}" for wall in walls), f"{ratio:.3f}"]
    return [*cells, f"{cpu[0] / cpu[1]:.3f}"], ratio


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=72)
    parser.add_argument("--seq-length", type=int, default=DataConfig.seq_length)
    parser.add_argument("--write", action="store_true", help="update docs/benchmarks.md")
    return parser.parse_args(arguments)


def main() -> int:
    """Run, show the table, and say whether the limit holds."""
    args, pool = parse(), WorkerPool()
    try:
        found = [row(tp, runs(pool, tp, args.batches, args.seq_length)) for tp in (1, 2)]
    finally:
        pool.close()
    show_table("scoring beside plain forward passes", HEADER, [cells for cells, _ in found])
    if args.write:
        text = (
            "## Importance\n\nForward passes of a SmolLM2-135M-shaped model up to its final hidden "
            "state, by turns without and with the hooks of the default scores (all four axes), "
            f"{args.batches} batches of 1 x {args.seq_length} tokens each, fp32, one thread "
            f"per rank ({platform.machine()}). The ratio is the median over neighbouring batches; "
            "CPU time is that of all ranks. Where it goes: "
            "[what scoring costs](design/scoring-cost.md).\n\n"
        )
        write_block("importance", text + markdown_table(HEADER, [cells for cells, _ in found]))
    return int(any(ratio > MAX_RATIO for _, ratio in found))


if __name__ == "__main__":
    sys.exit(main())
