"""Memory and CPU time of the distillation loss: this package against ModelOpt's ``LogitsKLLoss``.

``python -m benchmarks.kd_loss`` from the repository root. Both sides start from the same hidden
states and end with the gradients of the student's hidden states and output layer; every row is a
process of its own. fp32 on the CPU. Exit status 1 when a limit of ``LIMITS`` is not kept.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.docs_block import markdown_table, write_block
from benchmarks.kd_loss_worker import STUDENT, TEACHER, TIMED_CALLS
from nemo_minitron.config.distillation import DistillationConfig
from nemo_minitron.runtime.console import show_table
from tests.oracle.environment import MODELOPT, ROOT, oracle_python

WORKER = Path(__file__).with_name("kd_loss_worker.py")
SHAPES = [(49_152, 2048), (128_256, 1024)]
# Ours over the peer's: peak extra memory, CPU time; relative error of the gradients.
LIMITS = {"memory": 0.1, "cpu": 0.9, "gradients": 1e-5}
HEADER = (
    "vocabulary, tokens",
    "ours MiB",
    "ModelOpt MiB",
    "memory",
    "ours CPU s",
    "ModelOpt CPU s",
    "CPU",
    "gradient error",
)


@dataclass
class Comparison:
    """One line of the table; memory in bytes, time in seconds."""

    vocab: int
    tokens: int
    ours: dict[str, float]
    peer: dict[str, float]
    gradient_error: float
    """Largest relative error of the two gradients."""

    @property
    def memory(self) -> float:
        """Ours over the peer's."""
        return self.ours["extra_bytes"] / self.peer["extra_bytes"]

    @property
    def cpu(self) -> float:
        """Ours over the peer's."""
        return self.ours["seconds"] / self.peer["seconds"]

    @property
    def within_limits(self) -> bool:
        """Whether every limit is kept."""
        found = {"memory": self.memory, "cpu": self.cpu, "gradients": self.gradient_error}
        return all(found[name] <= limit for name, limit in LIMITS.items())

    def cells(self) -> list[str]:
        """As text."""
        mib = [f"{side['extra_bytes'] / 2**20:,.0f}" for side in (self.ours, self.peer)]
        seconds = [f"{side['seconds']:.1f}" for side in (self.ours, self.peer)]
        ratios = f"1/{1 / self.memory:.0f}", f"{self.cpu:.2f}x"
        name, error = f"{self.vocab:,}, {self.tokens:,}", f"{self.gradient_error:.0e}"
        return [name, *mib, ratios[0], *seconds, ratios[1], error]


def run_side(side: str, shape: tuple[int, int], args: argparse.Namespace, out: Path) -> None:
    """One row in a fresh process; ``out`` appears."""
    python = sys.executable if side == "ours" else oracle_python()
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)
    if side == "ours":
        environment["PYTHONPATH"] = str(ROOT)
    command = [python, WORKER, side, *map(str, shape), out, "--threads", str(args.threads)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=args.timeout
    )
    if done.returncode:
        raise RuntimeError(f"{side} failed:\n{done.stderr[-4000:]}")


def compare(shape: tuple[int, int], args: argparse.Namespace, work: Path) -> Comparison:
    """Both sides on one shape."""
    found, grads = {}, {}
    for side in ("ours", "modelopt"):
        out = work / f"{side}.json"
        run_side(side, shape, args, out)
        (found[side],) = json.loads(out.read_text())
        grads[side] = torch.load(f"{out}.pt")
    errors = [
        ((a - b).norm() / b.norm()).item()
        for a, b in zip(grads["ours"], grads["modelopt"], strict=True)
    ]
    return Comparison(*shape, found["ours"], found["modelopt"], max(errors))


def describe(args: argparse.Namespace, seconds: float) -> str:
    """What was run, for the page."""
    return (
        f"Forward KL and its gradients from hidden states (student {STUDENT} wide, teacher "
        f"{TEACHER}) to the student's hidden states and output layer: `logit_loss`, "
        f"{DistillationConfig().chunk_size} tokens a chunk, against `LogitsKLLoss` of "
        f"{MODELOPT.replace('==', ' ')} (the same code in 0.47.0) on whole logits, in the same "
        "run. MiB: peak of resident memory above the inputs, without the gradient of the output "
        "layer, which both sides need. CPU s: user and system time of all threads, the faster of "
        f"{TIMED_CALLS} calls after a first one. Each row is a fresh process. fp32, "
        f"{args.threads} CPU thread(s) ({platform.machine()}), torch "
        f"{torch.__version__.split('+')[0]}, {seconds / 60:.0f} minutes in all.\n\n"
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="per process")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for each row")
    parser.add_argument("--write", action="store_true", help="update docs/benchmarks.md")
    return parser.parse_args(arguments)


def main() -> int:
    """Run, show the table, and say whether the limits are kept."""
    args = parse()
    oracle_python()  # fails early where ModelOpt cannot be had
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        results = [compare(shape, args, Path(work)) for shape in SHAPES]
    rows = [result.cells() for result in results]
    show_table("distillation loss", HEADER, rows)
    if args.write:
        text = "## Cost of the distillation loss\n\n" + describe(args, time.monotonic() - start)
        write_block("kd_loss", text + markdown_table(HEADER, rows))
    return int(not all(result.within_limits for result in results))


if __name__ == "__main__":
    sys.exit(main())
