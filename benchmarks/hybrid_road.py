"""A small hybrid pruned to about half by width, by depth and by both, and distilled.

``python -m benchmarks.hybrid_road`` from the repository root, after ``make quickstart`` fetched the
text. For each seed a model of random weights with layers ``M-M*M-ME`` learns old speeches, is
pruned, and the students learn from it. Stages, texts and files are those of ``benchmarks.recipe``:
what is done is not done again, so seeds can be run one by one (``--seeds 1234``), and the table is
of all that are complete. ``--small`` takes minutes; its losses mean nothing.
"""

import argparse
import json
import os
import platform
import sys
from pathlib import Path

from benchmarks.docs_block import RESULTS, markdown_table, spread, write_block
from benchmarks.recipe import SPEECHES
from benchmarks.recipe_inputs import make_inputs
from benchmarks.recipe_jobs import BATCH, SEQ_LENGTH, TEACHER_LR, Seed, Settings
from benchmarks.stage_graph import Job, run_graph
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.registry import family_of
from nemo_minitron.families.table import parameter_count
from nemo_minitron.runtime.console import show_table

TEACHER = {
    "hybrid_override_pattern": "M-M*M-ME",
    "num_hidden_layers": 8,
    "hidden_size": 192,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "mamba_num_heads": 12,
    "mamba_head_dim": 64,
    "n_groups": 2,
    "ssm_state_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 384,
    "moe_shared_expert_intermediate_size": 384,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,  # transformers' class never ties them
}
EXPERTS = ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")
SIZES = {"ffn_hidden_size": 640, "mamba_num_heads": 8}
WIDTH = {"hidden_size": 128, **SIZES, **dict.fromkeys(EXPERTS, 320)}
BOTH = {"num_layers": 6, "hidden_size": 160, **SIZES, **dict.fromkeys(EXPERTS, 256)}
# Half of the layers, which is 58% of the parameters: embeddings stay, and a layer of every kind.
TARGETS = {"width": WIDTH, "depth": {"num_layers": 4}, "both": BOTH}
SMALL = Settings(teacher_steps=4, steps=2, samples=16, held_out=16)


def jobs_of(seed: Seed) -> list[Job]:
    """All stages of one seed, in an order in which they could run."""
    source, start = seed.inputs / str(seed.number) / "teacher", {"checkpoint": "start"}
    criteria = ("scores.layer_criteria=[lm_loss]", "scores.lm_loss_samples=16")
    jobs = [
        seed.job("start", "import", f"source={source}"),
        seed.train("teacher", "finetune", start, "old", seed.settings.teacher_steps, TEACHER_LR),
        seed.loss("teacher", "teacher"),
        seed.scores("scores", "teacher", *criteria),
    ]
    for name, target in TARGETS.items():
        keys = [f"pruning.target.{size}={value}" for size, value in target.items()]
        chosen = ["pruning.layer_criterion=lm_loss"] if "num_layers" in target else []
        jobs += [
            seed.prune(name, "teacher", "scores", *keys, *chosen),
            seed.loss(name, name),
            seed.kd(f"{name}_kd", name),
            seed.loss(f"{name}_kd", f"{name}_kd"),
        ]
    return jobs


def row_of(root: Path, name: str, seeds: list[int]) -> list[str]:
    """Letters, parameters and held-out losses of a model."""
    configs = [ModelConfig.load(root / f"seed{seed}/{name}/checkpoint") for seed in seeds]
    counts = [parameter_count(family_of(config), config)["total"] / 1e6 for config in configs]
    patterns = dict.fromkeys(f"`{config.hybrid_layer_pattern}`" for config in configs)
    files = [root / f"seed{seed}/loss_{name}/metrics.json" for seed in seeds]
    losses = [float(json.loads(file.read_text())["lm_loss"]) for file in files]
    sizes = dict.fromkeys(f"{count:.2f} M" for count in counts)
    label = f"{name.removesuffix('_kd')}, distilled" if name.endswith("_kd") else name
    cells = [label, ", ".join(patterns), ", ".join(sizes)]
    return [*cells, *(f"{loss:.3f}" for loss in losses), spread(losses, 3)]


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--speeches", type=Path, default=Path(SPEECHES))
    parser.add_argument("--seeds", type=int, nargs="*", default=[1234, 1235, 1236])
    parser.add_argument("--teacher-steps", type=int, default=150)
    parser.add_argument("--steps", type=int, default=40, help="of every student")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path(".quickstart/hybrid_road"))
    parser.add_argument("--small", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--write", action="store_true", help="update docs/results.md")
    return parser.parse_args()


def run_seed(number: int, root: Path, args: argparse.Namespace, settings: Settings) -> None:
    """Run what is missing of a seed; ``seconds.json`` keeps how long each stage took."""
    inputs, kept = root / f"inputs{number}", root / f"seed{number}" / "seconds.json"
    make_inputs(inputs, args.speeches, {"teacher": TEACHER}, [number], "NemotronH")
    seconds = run_graph(jobs_of(Seed(number, inputs, settings)), root, args.processes)
    known = json.loads(kept.read_text()) if kept.exists() else {}
    kept.write_text(json.dumps({**known, **seconds}, indent=1))


def main() -> int:
    """Run what is missing, show the table."""
    args = parse()
    root = args.folder.resolve() / ("small" if args.small else "full")
    made = Settings(teacher_steps=args.teacher_steps, steps=args.steps, samples=64)
    settings = SMALL if args.small else made
    for seed in args.seeds:
        run_seed(seed, root, args, settings)
    files = {int(file.parent.name[4:]): file for file in sorted(root.glob("seed*/seconds.json"))}
    minutes = sum(sum(json.loads(file.read_text()).values()) for file in files.values()) / 60
    names = ["teacher", *TARGETS, *(f"{name}_kd" for name in TARGETS)]
    rows = [row_of(root, name, list(files)) for name in names]
    header = ["", "layers", "parameters", *(f"seed {seed}" for seed in files), "mean ± sd"]
    show_table("held-out LM loss", header, rows)
    each = SEQ_LENGTH * BATCH
    said = (
        f"{minutes:.0f} minutes of {args.processes} process(es) ({platform.machine()}, "
        f"{os.cpu_count()} CPUs, not alone on them). Tokens: teacher "
        f"{settings.teacher_steps * each:,}, every student {settings.steps * each:,}, held out "
        f"{settings.held_out * SEQ_LENGTH:,}."
    )
    print(said)
    if args.write:
        text = f"{said}\n\n{markdown_table(header, rows)}"
        write_block("hybrid_road", text, RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
