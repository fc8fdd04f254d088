"""Import and export of a big Hugging Face model: peak memory, and speed beside ``cp``.

``python -m benchmarks.convert`` from the repository root. A synthetic Llama-3.1-8B-shaped bf16
model in several safetensors files is imported and exported again by the stages' own code; ``cp -r``
copies the same bytes. Every run is a process of its own that finds its input out of the page cache
and ends with its output on the disk; runs alternate. Exit status 1 when a limit is passed.
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
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.docs_block import markdown_table, write_block
from benchmarks.prune import (
    MODEL,
    forget_pages,
    parse,
    peak_bytes,
    run_job,
    sync,
    synthetic_store,
)
from nemo_minitron.checkpoint.hf import to_hf, write_hf
from nemo_minitron.checkpoint.lazy import on_read, refuse_nonfinite
from nemo_minitron.checkpoint.source import open_source
from nemo_minitron.checkpoint.torch_dist import read_torch_dist, write_torch_dist
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.registry import family_of
from nemo_minitron.families.table import parameter_count
from nemo_minitron.runtime.console import show_table

# Beside 2x the largest tensor: Python, torch and what the page cache maps of files being read.
BUFFERS_GB = 0.8
MIN_SPEED = 0.5
HEADER = ("run", "seconds", "GB/s", "of cp's speed", "peak memory GB")


def job(name: str, source: Path, target: Path, workers: int) -> None:
    """One run in this process: prints seconds and peak memory."""
    start = time.perf_counter()
    target.mkdir()
    if name == "import":
        opened = open_source(str(source))
        config = opened.config
        write_torch_dist(target, opened.store, opened.family, config, workers=workers)
        config.save(target)
    else:
        config = ModelConfig.load(source)
        family = family_of(config)
        store = on_read(read_torch_dist(source, family, config), refuse_nonfinite)
        write_hf(target, to_hf(family, config, store), family.to_hf(config), "5GB", workers)
    sync(target)
    print(json.dumps({"seconds": time.perf_counter() - start, "peak": peak_bytes()}))


def measured(name: str, source: Path, target: Path, workers: int) -> dict[str, Any]:
    """One run: of ``cp``, or in a fresh Python process."""
    forget_pages(source)
    shutil.rmtree(target, ignore_errors=True)
    if name == "cp":
        start = time.perf_counter()
        subprocess.run(["cp", "-r", str(source), str(target)], check=True)
        sync(target)
        return {"seconds": time.perf_counter() - start, "peak": 0}
    return run_job("convert", name, source, target, workers)


def compare(work: Path, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Import, export and cp, alternately; one output at a time beside the two inputs."""
    runs: dict[str, list[dict[str, Any]]] = {"import": [], "export": [], "cp": []}
    places = {
        "import": ("hf", "megatron"),
        "export": ("megatron", "copy"),
        "cp": ("hf", "copy"),
    }
    for _ in range(args.repeats):
        for name, (source, target) in places.items():
            runs[name].append(measured(name, work / source, work / target, args.workers))
            print(name, runs[name][-1], flush=True)
    return runs


def describe(args: argparse.Namespace, config: ModelConfig, limit: float) -> str:
    """What was run, for the page."""
    count = parameter_count(family_of(config), config)["total"]
    return (
        "## Import and export\n\n"
        f"Llama-3.1-8B shapes with {args.layers} layers ({count / 1e9:.2f}B parameters, bf16, "
        "safetensors files of at most 5 GB), import to Megatron and export back with "
        f"{args.workers} workers, NaN check included, beside `cp -r`; page cache dropped before "
        f"every run, output synced, medians of {args.repeats} alternated runs "
        f"({platform.machine()}, {os.cpu_count()} CPUs). Bound of the peak: {limit:.2f} GB, twice "
        f"the largest tensor (the embedding) and {BUFFERS_GB} GB for Python, torch and buffers.\n\n"
    )


def main() -> int:
    """Run, show the table, and say whether the limits hold."""
    args = parse(__doc__, free=50)
    if args.job:
        job(args.job[0], Path(args.job[1]), Path(args.job[2]), args.workers)
        return 0
    config = replace(MODEL, num_layers=args.layers)
    family = family_of(config)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = Path(folder) / "hf"
        source.mkdir()
        store = to_hf(family, config, synthetic_store(config))
        size = sum(tensor.nbytes for tensor in store.values()) / 1e9
        largest = max(tensor.nbytes for tensor in store.values()) / 1e9
        write_hf(source, store, family.to_hf(config), "5GB", args.workers)
        runs = compare(Path(folder), args)
    seconds = {name: median(run["seconds"] for run in runs[name]) for name in runs}
    peaks = {name: max(run["peak"] for run in runs[name]) / 1e9 for name in runs}
    rows, limit = [], 2 * largest + BUFFERS_GB
    for name, time_ in seconds.items():
        cells = [name, f"{time_:.1f}", f"{size / time_:.2f}", f"{seconds['cp'] / time_:.2f}x"]
        rows.append([*cells, f"{peaks[name]:.2f}" if peaks[name] else ""])
    show_table(f"import and export: bound of the peak {limit:.2f} GB", HEADER, rows)
    if args.write:
        write_block("convert", describe(args, config, limit) + markdown_table(HEADER, rows))
    slow = max(seconds["import"], seconds["export"]) * MIN_SPEED > seconds["cp"]
    return int(max(peaks.values()) > limit or slow)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
