"""Mamba-2's scan in plain torch: time by length, against matrix products of as many operations.

``python -m benchmarks.mamba_scan`` from the repository root, on one core in fp32. Sizes of a layer
of Nemotron-H 8B at a tensor-parallel size of 8. Exit status 1 when a limit of ``LIMITS`` is not
kept.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.docs_block import markdown_table, write_block
from nemo_minitron.runtime.console import show_table
from nemo_minitron.runtime.mamba import mamba_chunk_scan_combined

HEADS, CHANNELS, GROUPS, STATES, CHUNK = 16, 64, 1, 128, 128
LENGTHS = (512, 1024, 2048, 4096)
# Time over that of matrix products; time per token at the longest over that at the shortest.
LIMITS = {"products": 3.0, "linear": 1.25}
_TEXT = (
    "## The scan of Mamba-2\n\nWithout CUDA the layers of hybrid models run in plain torch. One "
    "layer of "
    "Nemotron-H 8B at a tensor-parallel size of 8 (16 heads of 64 channels, 128 states), fp32, one "
    "core, forward, processor time, beside square matrix products with as many operations.\n\n"
)
HEADER = ("tokens", "scan ms", "us per token", "products ms", "scan / products")


def operations(length: int) -> float:
    """Multiplies and adds of the four matrix products of every chunk (2405.21060, section 6)."""
    square = 2 * CHUNK * CHUNK * (GROUPS * STATES + HEADS * CHANNELS)
    states = 2 * 2 * CHUNK * STATES * HEADS * CHANNELS
    return length / CHUNK * (square + states)


def timed(runs: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Median processor seconds of calls that take turns, after one of each that is not counted."""
    found: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats + 1):
        for run, seconds in zip(runs, found, strict=True):
            start = time.thread_time()
            run()
            seconds.append(time.thread_time() - start)
    return [statistics.median(seconds[1:]) for seconds in found]


def measured(length: int, repeats: int) -> tuple[float, float]:
    """Seconds of the scan, and of matrix products with as many operations."""
    draw = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=draw)

    given: dict[str, Any] = {
        "x": random(1, length, HEADS, CHANNELS),
        "dt": random(1, length, HEADS),
        "A": -random(HEADS).exp(),
        "B": random(1, length, GROUPS, STATES),
        "C": random(1, length, GROUPS, STATES),
        "chunk_size": CHUNK,
        "dt_softplus": True,
    }
    side = 512
    matrix, count = random(side, side), round(operations(length) / (2 * side**3))

    def products() -> None:
        for _ in range(max(count, 1)):
            matrix @ matrix

    with torch.no_grad():
        scan, plain = timed([lambda: mamba_chunk_scan_combined(**given), products], repeats)
    return scan, plain * operations(length) / (max(count, 1) * 2 * side**3)


def main() -> int:
    """Measure, print, and say whether the limits are kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {length: measured(length, args.repeats) for length in LENGTHS}
    rows = [
        (
            f"{length:,}",
            f"{scan * 1e3:.1f}",
            f"{scan / length * 1e6:.1f}",
            f"{plain * 1e3:.1f}",
            f"{scan / plain:.2f}x",
        )
        for length, (scan, plain) in found.items()
    ]
    show_table(f"Mamba-2's scan on one core ({platform.machine()})", HEADER, rows)
    each = {length: scan / length for length, (scan, _) in found.items()}
    worst = max(scan / plain for scan, plain in found.values())
    growth = each[LENGTHS[-1]] / each[LENGTHS[0]]
    print(f"largest ratio {worst:.2f}, time per token of the longest {growth:.2f} of the shortest")
    if args.write:
        write_block("mamba_scan", _TEXT + markdown_table(HEADER, rows))
    return int(worst > LIMITS["products"] or growth > LIMITS["linear"])


if __name__ == "__main__":
    sys.exit(main())
