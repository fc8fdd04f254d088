"""Streaming pruning of a big checkpoint: peak memory, and time beside copying what is kept.

``python -m benchmarks.prune`` from the repository root. A synthetic Llama-3.1-8B-shaped bf16
checkpoint is pruned to the width of Llama-3.1-Minitron-4B; then the pruned checkpoint is copied by
the same reader and writer. Every run is a process of its own that finds its input out of the page
cache and ends with its output on the disk; runs alternate. Exit status 1 when a limit is passed.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.docs_block import markdown_table, write_block
from nemo_minitron.checkpoint.lazy import LazyTensor, Store
from nemo_minitron.checkpoint.torch_dist import read_torch_dist, write_torch_dist
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.registry import family_of
from nemo_minitron.families.table import parameter_count
from nemo_minitron.pruning.plan import Plan, full_plan, pruned_config
from nemo_minitron.pruning.slicing import prune_checkpoint
from nemo_minitron.runtime.console import show_table

MODEL = ModelConfig(
    family="llama",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=128256,
    max_position_embeddings=8192,
    dtype="bfloat16",
)
HIDDEN, FFN = 3072, 9216
"""Llama-3.1-Minitron-4B-Width (2408.11796, section 4)."""
MAX_GB, MAX_RATIO = 2.0, 1.5
HEADER = ("run", "read GB", "written GB", "seconds", "peak memory GB")


def random_plan(config: ModelConfig) -> Plan:
    """A plan of the target's sizes with indices spread over the whole range."""
    generator = torch.Generator().manual_seed(0)

    def some(size: int, keep: int) -> list[int]:
        return torch.randperm(size, generator=generator)[:keep].sort().values.tolist()

    layers = range(config.num_layers)
    return full_plan(config).replaced(
        hidden=some(config.hidden_size, HIDDEN),
        ffn=[some(config.ffn_hidden_size, FFN) for _ in layers],
    )


def synthetic_store(config: ModelConfig) -> Store:
    """Random bf16 weights under Megatron names; rows repeat, which no step here notices."""
    noise = torch.randn(1 << 24, dtype=torch.float32).mul_(0.02).bfloat16()

    def read(shape: tuple[int, ...]) -> Tensor:
        count = torch.Size(shape).numel()
        return noise.expand(-(-count // noise.numel()), -1).flatten()[:count].view(shape)

    return {
        name: LazyTensor(shape, torch.bfloat16, partial(read, shape))
        for name, row, _ in family_of(config).parameters(config)
        for shape in [row.shape(config)]
    }


def write_synthetic(folder: Path, config: ModelConfig) -> None:
    """A Megatron checkpoint of random weights."""
    folder.mkdir(parents=True)
    write_torch_dist(folder, synthetic_store(config), family_of(config), config, workers=1)
    config.save(folder)


def forget_pages(folder: Path) -> None:
    """Write a folder back and drop it from the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sync(folder: Path) -> None:
    """Wait until the files of a folder are on the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def peak_bytes() -> int:
    """Largest resident set of this process so far."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def job(name: str, source: Path, target: Path, workers: int) -> None:
    """One run in this process: prints seconds and peak memory."""
    config = ModelConfig.load(source)
    family = family_of(config)
    start = time.perf_counter()
    if name == "prune":
        prune_checkpoint(source, config, random_plan(config), target, workers)
    else:
        target.mkdir()
        store = read_torch_dist(source, family, config)
        write_torch_dist(target, store, family, config, workers=workers)
        config.save(target)
    sync(target)
    print(json.dumps({"seconds": time.perf_counter() - start, "peak": peak_bytes()}))


def run_job(benchmark: str, name: str, source: Path, target: Path, workers: int) -> dict[str, Any]:
    """One run of ``job`` of a benchmark in a fresh process."""
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", "--job", name]
    command += [str(source), str(target), "--workers", str(workers)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def compare(work: Path, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Prune and copy, alternately."""
    runs: dict[str, list[dict[str, Any]]] = {"prune": [], "copy": []}
    for _ in range(args.repeats):
        for name, source in (("prune", "model"), ("copy", "pruned")):
            target = work / ("pruned" if name == "prune" else "copied")
            shutil.rmtree(target, ignore_errors=True)
            forget_pages(work / source)
            run = run_job("prune", name, work / source, target, args.workers)
            print(f"{name}: {run['seconds']:.1f} s", flush=True)
            runs[name].append(run)
    return runs


def parse(about: str, free: int) -> argparse.Namespace:
    """Command line of a benchmark of a big model.

    Args:
        about: docstring of the benchmark.
        free: GB that 32 layers need.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32, help="32 makes the 8B model")
    parser.add_argument("--folder", help=f"where {free} GB are free for 32 layers")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="as the stage's key")
    parser.add_argument("--job", nargs=3, metavar=("NAME", "SOURCE", "TARGET"))
    parser.add_argument("--write", action="store_true", help="update docs/benchmarks.md")
    return parser.parse_args()


def describe(args: argparse.Namespace, config: ModelConfig, ratio: float) -> str:
    """What was run, for the page."""
    count = parameter_count(family_of(config), config)["total"]
    return (
        "## Streaming pruning\n\n"
        f"Llama-3.1-8B shapes with {args.layers} layers ({count / 1e9:.2f}B "
        f"parameters, bf16) pruned to hidden {HIDDEN}, ffn {FFN} by the streaming executor with "
        f"{args.workers} workers, and the pruned checkpoint copied by the same reader and writer; "
        f"page cache dropped before every run, output synced, medians of {args.repeats} alternated "
        f"runs ({platform.machine()}, {os.cpu_count()} CPUs). Pruning takes {ratio:.2f}x the time "
        "of the copy: [what streaming pruning costs](design/streaming-cost.md).\n\n"
    )


def main() -> int:
    """Run, show the table, and say whether the limits hold."""
    args = parse(__doc__, free=35)
    if args.job:
        job(args.job[0], Path(args.job[1]), Path(args.job[2]), args.workers)
        return 0
    config = replace(MODEL, num_layers=args.layers)
    small = pruned_config(config, random_plan(config))
    sizes = [parameter_count(family_of(c), c)["total"] * 2 / 1e9 for c in (config, small)]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_synthetic(Path(folder) / "model", config)
        runs = compare(Path(folder), args)
    seconds = {name: median(run["seconds"] for run in runs[name]) for name in runs}
    peaks = {name: max(run["peak"] for run in runs[name]) / 1e9 for name in runs}
    rows = [
        [name, f"{read:.1f}", f"{sizes[1]:.1f}", f"{seconds[name]:.1f}", f"{peaks[name]:.2f}"]
        for name, read in (("prune", sizes[0]), ("copy", sizes[1]))
    ]
    ratio = seconds["prune"] / seconds["copy"]
    show_table(f"streaming pruning: {ratio:.2f}x the copy", HEADER, rows)
    if args.write:
        write_block("prune", describe(args, config, ratio) + markdown_table(HEADER, rows))
    return int(peaks["prune"] > MAX_GB or ratio > MAX_RATIO)


if __name__ == "__main__":
    sys.exit(main())
