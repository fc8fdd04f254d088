"""Write the map of the package: what to open for a change, and what every file is about.

    python scripts/map_docs.py docs/map.md

The second part is the first sentence of every module's docstring, so a file describes itself in one
place. ``tests/unit/test_repo.py`` fails while the page and the files differ.
"""

import ast
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "nemo_minitron"
HEAD = """\
# Where to change what

Written by `make docs` from `scripts/map_docs.py` and the docstrings of the modules; do not edit.
Paths are relative to `nemo_minitron/`. [A tour](contributing-tour.md) follows one score, one cut
and one training step through the files; [contributing](../CONTRIBUTING.md#layers) says which folder
may import which.
"""
# What somebody wants to change -> the files to open, the first one first.
CHANGES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("support another model family", ("families/llama.py", "families/registry.py")),
    ("make another size prunable", ("config/axes.py", "families/dims.py")),
    ("give layers of one model different values", ("config/layers.py", "config/model.py")),
    ("score channels, heads or experts in another way", ("importance/hooks.py",)),
    ("aggregate scores over tokens and samples in another way", ("importance/aggregate.py",)),
    ("change which indices are kept, or how ties are broken", ("pruning/plan.py",)),
    ("change how indices become rows of a tensor", ("families/dims.py", "pruning/slicing.py")),
    ("change how rows travel when a model is pruned in memory", ("pruning/exchange.py",)),
    ("add a divergence between teacher and student", ("distillation/divergences.py",)),
    ("change the memory or speed of the logit loss", ("distillation/logit_loss.py",)),
    ("add a loss between hidden states", ("distillation/intermediate.py",)),
    ("change how teacher states reach other pipeline stages", ("models/teacher.py",)),
    ("change what a training step does", ("models/gpt.py", "models/distill.py")),
    ("change the optimizer or its settings", ("models/optim.py", "models/settings.py")),
    ("change what a training checkpoint holds", ("models/lightning.py", "models/optim_state.py")),
    ("add a config key", ("config/stages.py", "config/training_stages.py", "config/base.py")),
    ("change what makes a result stale", ("config/identity.py", "checkpoint/manifest.py")),
    ("add a stage", ("stages/evaluate.py", "config/schema.py")),
    ("read another form of text", ("data/formats.py",)),
    ("read the checkpoint of another program", ("checkpoint/foreign/megatron_sources.py",)),
    (
        "take an argument of Megatron-LM over",
        ("checkpoint/foreign/argument_tables.py", "checkpoint/foreign/argument_overrides.py"),
    ),
    ("change how results appear, resume or are replaced", ("checkpoint/artifact.py",)),
    ("change what a signal does", ("runtime/endings.py", "runtime/supervise.py")),
    ("follow a new release of Megatron-Core", ("runtime/megatron.py",)),
    ("change memory estimates of `minitron plan`", ("planning/memory.py",)),
    ("change the report or the model card", ("reporting/report.py", "reporting/model_card.py")),
)


def page() -> str:
    """Text of ``docs/map.md``."""
    folders = sorted({path.parent for path in PACKAGE.rglob("*.py")})
    return "\n".join([HEAD, _changes(), *map(_folder, folders)])


def first_sentence(path: Path) -> str:
    """What a module says of itself: the first line of its docstring.

    Raises:
        ValueError: it has none, or the line does not end a sentence.
    """
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    line = docstring.partition("\n")[0]
    if not line.endswith("."):
        raise ValueError(f"{path}: the docstring must begin with one line that ends in a full stop")
    return line.replace("``", "`").replace("|", "\\|")


def _changes() -> str:
    rows = [f"| {what} | {', '.join(map(_link, files))} |" for what, files in CHANGES]
    return "\n".join(["## I want to ...", "", "| | open |", "|---|---|", *rows, ""])


def _link(name: str) -> str:
    if not (PACKAGE / name).is_file():
        raise ValueError(f"CHANGES names {name}, which does not exist")
    return f"[`{name}`](../nemo_minitron/{name})"


def _folder(folder: Path) -> str:
    name = folder.relative_to(PACKAGE).as_posix()
    rows = [
        f"| {_link(path.relative_to(PACKAGE).as_posix())} | {first_sentence(path)} |"
        for path in sorted(folder.glob("*.py"))
        if path.name != "__init__.py"
    ]
    title = "## The package itself" if name == "." else f"## `{name}/`"
    about = first_sentence(folder / "__init__.py")
    return "\n".join([title, "", about, "", "| file | what it is about |", "|---|---|", *rows, ""])


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
