"""What only a GPU can show, in one command: ``python -m benchmarks.gpu`` or ``make gpu``.

Each part is a process of its own with a time limit. Its result is ``PART.json`` in the output
folder, so a part that fails takes nothing from the others, and parts can be run one by one. Without
CUDA the same code runs on the CPU; ``--small`` makes it fit the test suite. ``table.md`` holds all
results of the folder. Exit status 1 when a part failed or a check does not hold.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.docs_block import markdown_table, write_block
from nemo_minitron.runtime.console import show_table

ROOT = Path(__file__).resolve().parents[2]
# Part -> seconds it may take; all together stay below twenty minutes.
PARTS = {"logits": 100, "scores": 100, "kd_loss": 240, "step": 180, "quickstart": 570}

SMALL_SECONDS = 600  # of any part on a CPU, which may be busy


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(".gpu/results"), help="of results")
    parser.add_argument("--work", type=Path, default=Path(".gpu/work"), help="models, unfinished")
    parser.add_argument("--assets", type=Path, default=Path(".quickstart"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--small", action="store_true", help="tiny sizes, for a CPU")
    parser.add_argument("--write", action="store_true", help="update docs/benchmarks.md")
    parser.add_argument("--one", choices=PARTS, help=argparse.SUPPRESS)  # in this process
    args = parser.parse_args(arguments)
    for name in ("output", "work", "assets"):
        setattr(args, name, getattr(args, name).resolve())
    return args


def run_here(part: str, args: argparse.Namespace) -> None:
    """Run a part in this process and write its result."""
    import torch

    from benchmarks.gpu.common import Options, as_json

    torch.set_float32_matmul_precision("highest")  # TF32 would not be fp32
    start = time.monotonic()
    options = Options(args.small, args.output, args.work, args.assets)
    result = importlib.import_module(f"benchmarks.gpu.{part}").run(options)
    text = json.dumps(as_json(result, options, time.monotonic() - start), indent=1)
    unfinished = args.output / f"{part}.json.partial"
    unfinished.write_text(text + "\n")
    unfinished.rename(args.output / f"{part}.json")


def run_apart(part: str, args: argparse.Namespace) -> str:
    """Run a part in a process of its own; what it prints goes to ``log.txt``.

    Returns:
        Why there is no new result; empty when there is one.
    """
    command = [sys.executable, "-m", "benchmarks.gpu", "--one", part]
    for name in ("output", "work", "assets"):
        command += [f"--{name}", str(getattr(args, name))]
    command += ["--small"] if args.small else []
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    limit = SMALL_SECONDS if args.small else PARTS[part]
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    with (args.output / "log.txt").open("a") as log:
        log.write(f"==== {part}\n")
        log.flush()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"took over {limit} s"
        finally:
            if process.poll() is None:  # with all that it started
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return f"ended with exit code {code}" if code else ""


def describe(found: dict[str, Any]) -> str:
    """A result as Markdown."""
    checks = "; ".join(
        f"{name}: {'yes' if held else 'NO'}" for name, held in found["checks"].items()
    )
    versions = ", ".join(f"{k} {v}" for k, v in found["machine"].items() if k != "device")
    size = "small sizes, " if found["small"] else ""
    where = f"{size}{found['machine']['device']}, {versions}, {found['seconds']:.0f} s"
    table = markdown_table(found["header"], found["rows"])
    return f"### {found['title']}\n\n{found['text']} {checks}. ({where}.)\n\n{table}\n"


def report(results: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    """Tables on the terminal, in ``table.md`` and, where asked for, in the documentation."""
    for found in results.values():
        show_table(found["title"], found["header"], found["rows"])
        for name, held in found["checks"].items():
            sys.stdout.write(f"{'ok ' if held else 'NOT'} {name}\n")
    text = "\n".join(describe(found) for found in results.values())
    (args.output / "table.md").write_text(text)
    if args.write:
        write_block("gpu", "## Measured on a GPU\n\n" + text)


def main() -> int:
    """Run the parts one after the other and show every result of the output folder."""
    args = parse()
    for folder in (args.output, args.work):
        folder.mkdir(parents=True, exist_ok=True)
    if args.one:
        run_here(args.one, args)
        return 0
    failed = {part: reason for part in args.parts if (reason := run_apart(part, args))}
    paths = {part: args.output / f"{part}.json" for part in PARTS}
    results = {part: json.loads(p.read_text()) for part, p in paths.items() if p.exists()}
    report(results, args)
    for part, reason in failed.items():
        sys.stdout.write(f"NOT {part}: {reason}; see {args.output / 'log.txt'}\n")
    held = all(all(results[p]["checks"].values()) for p in args.parts if p not in failed)
    return int(bool(failed) or not held)


if __name__ == "__main__":
    sys.exit(main())
