"""The end of a pipeline: one table on the console and ``report.html``, readable offline."""

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.config.axes import AXES, Scope, axis_size
from nemo_minitron.config.stages import PipelineConfig
from nemo_minitron.documents import json_value
from nemo_minitron.families.registry import family_of
from nemo_minitron.families.table import parameter_count
from nemo_minitron.reporting import plots
from nemo_minitron.reporting.model_card import templates
from nemo_minitron.reporting.results import Pruning, Results, read_results
from nemo_minitron.reporting.rows import Row, StageResult
from nemo_minitron.reporting.speed import SPEED_HEADER, generation_rows, speed_rows
from nemo_minitron.runtime.atomic import atomic_file
from nemo_minitron.runtime.console import show_table, show_texts

log = logging.getLogger(__name__)

REPORT = "report.html"
_SIZES = {
    "layers": "num_layers",
    "hidden size": "hidden_size",
    "FFN size": "ffn_hidden_size",
    "query heads": "num_attention_heads",
    "query groups": "num_query_groups",
    "head dim": "kv_channels",
    "vocabulary": "vocab_size",
}
_HEADER = (
    "model",
    "parameters",
    "size\non disk",
    "held-out\nloss",
    "perplexity",
    "writes\ntokens/s",
    "gap\nclosed",
)
"""Headings of two lines, so that the table fits the 80 columns of a terminal."""


def write_report(output_dir: str | Path, cfg: PipelineConfig) -> Path:
    """Print the final table and write ``report.html``.

    Args:
        output_dir: folder of a pipeline whose stages are all complete.
        cfg: its config; ``report`` says what the table compares (``rows.check_report``).

    Returns:
        The page.

    Raises:
        ValueError: a result that the table needs is missing or damaged.
    """
    results = read_results(Path(output_dir), cfg)
    page = Path(output_dir) / REPORT
    with atomic_file(page) as draft:
        draft.write_text(render(results), encoding="utf-8")
    for warning in results.warnings:
        log.warning("%s", warning)
    if results.rows:
        show_table(results.title, *_main_table(results.rows))
        show_texts([(row.label, text) for row in results.rows for text in row.texts])
    if table := _task_table(results.rows):
        show_table("tasks", *table)
    for stage in results.stages_of("export"):
        log.info("Hugging Face model: %s", stage.folder)
    log.info("report: %s", page)
    return page


def render(results: Results) -> str:
    """Return the HTML page: style and pictures inline, no script, no link to anywhere."""
    environment = templates(autoescape=True)
    return environment.get_template("report.html.j2").render(
        title=results.title,
        evaluation=_main_table(results.rows),
        texts=[(row.label, text) for row in results.rows for text in row.texts],
        evaluated=_evaluated(results),
        tasks=_task_table(results.rows),
        warnings=results.warnings,
        headline=_headline(results.rows),
        prunings=[
            (p.name, _size_rows(p), _dropped_layers(p), _kept_picture(p)) for p in results.prunings
        ],
        importance=[(name, _score_pictures(results, name)) for name in results.scores],
        written=[
            (s.name, generation_rows(s.metrics), _examples(s))
            for s in results.stages_of("generate")
        ],
        speed_header=SPEED_HEADER,
        speed=[
            (s.name, s.metrics["device"], speed_rows(s.metrics), s.values)
            for s in results.stages_of("benchmark")
        ],
        training=[_training(stage) for stage in results.stages if stage.metrics.get("history")],
        command=results.command,
        config=results.config,
        stages=results.stages,
        exports=[stage.folder for stage in results.stages_of("export")],
        versions=_versions(results.stages),
    )


def _main_table(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return header and rows of what was evaluated, without the columns that no row fills."""
    cells = [_cells(row) for row in rows]
    filled = [any(row[column] != "-" for row in cells) for column in range(len(_HEADER))]
    header = tuple(itertools.compress(_HEADER, filled))
    return header, [tuple(itertools.compress(row, filled)) for row in cells]


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.label,
        millions(row.parameters),
        "-" if row.size is None else f"{row.size / 1e6:,.0f} MB",
        *(
            "-" if value is None else f"{value:{form}}"
            for value, form in (
                (row.loss, ".4f"),
                (row.perplexity, ".2f"),
                (row.speed, ",.1f"),
                (row.closed, ".0%"),
            )
        ),
    )


def _task_table(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]] | None:
    """Return header and rows, a model per row and a metric per column, or None without any task."""
    names = list(dict.fromkeys(name for row in rows for name in row.tasks))
    if not names:
        return None
    cells = [(row.label, *(row.tasks.get(name, "-") for name in names)) for row in rows]
    return ("model", *names), cells


def millions(count: int) -> str:
    """Return a parameter count with four digits: ``134.5 M``, ``8.030 B``."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            value = count / size
            return f"{value:.{max(0, 3 - len(str(int(value))) + 1)}f} {unit}"
    return str(count)


def _evaluated(results: Results) -> str:
    """Say which tokens the losses are averaged over."""
    splits = {s.values.get("data", {}).get("split_name") for s in results.stages_of("evaluate")}
    counts = sorted({row.tokens for row in results.rows if row.tokens is not None})
    tokens = " or ".join(f"{count:,}" for count in counts)
    names = sorted(name for name in splits if name)
    return f"{tokens} tokens" + (f" of the {' and '.join(names)} split" if names else "")


def _headline(rows: Sequence[Row]) -> str:
    if len(rows) < 2:
        return ""
    first, last = rows[0], rows[-1]
    text = (
        f"{last.label}: {last.parameters / first.parameters:.0%} of the parameters of {first.label}"
    )
    if first.loss is not None and last.loss is not None:
        text += f", held-out loss {last.loss:.3f} against {first.loss:.3f}"
    closed = "" if last.closed is None else f"; {last.closed:.0%} of the loss of pruning won back"
    return f"{text}{closed}."


def _size_rows(pruning: Pruning) -> list[tuple[str, str, str, str]]:
    before, after = (
        {
            **{label: getattr(config, name) for label, name in _SIZES.items()},
            "parameters": counts["total"],
            "without embeddings": counts["non_embedding"],
        }
        for config in (pruning.before, pruning.after)
        for counts in [parameter_count(family_of(config), config)]
    )
    return [
        (label, f"{old:,}", f"{new:,}", "" if old == new else f"{new / old:.0%}")
        for (label, old), new in zip(before.items(), after.values(), strict=True)
    ]


def _dropped_layers(pruning: Pruning) -> str:
    """List the dropped layers, counted from 1 as in NeMo; empty if all layers stay."""
    kept = set(pruning.plan["layers"])
    gone = [str(layer + 1) for layer in range(pruning.before.num_layers) if layer not in kept]
    return ", ".join(gone)


def _kept_picture(pruning: Pruning) -> plots.Picture:
    plan, before = pruning.plan, pruning.before
    axes = [axis for axis in AXES.values() if axis.scope is Scope.LAYER]
    kept = {
        axis.label: (
            axis_size(before, axis.name),
            {layer: len(plan[axis.name][i]) for i, layer in enumerate(plan["layers"])},
        )
        for axis in axes
        if any(plan.get(axis.name, []))
    }
    return plots.kept_sizes(kept, before.num_layers)


def _score_pictures(results: Results, name: str) -> list[plots.Picture]:
    """Draw maps and curves of an importance stage, with the cut of the pruning that used it."""
    folder = (results.output_dir / name).resolve()
    users = [p for p in results.prunings if p.importance and p.importance.resolve() == folder]
    plan: dict[str, Any] | None = users[0].plan if users else None
    scores = results.scores[name]
    pictures = []
    if "ffn" in scores:
        kept = None if plan is None else max(map(len, plan["ffn"]))
        pictures.append(plots.ffn_heat_map(scores["ffn"], kept))
    if "head" in scores:
        heads = None
        if plan is not None:
            heads = {layer: set(plan["head"][i]) for i, layer in enumerate(plan["layers"])}
        pictures.append(plots.head_heat_map(scores["head"], heads))
    if "layer" in scores:
        pictures.append(plots.layer_bars(scores["layer"], None if plan is None else plan["layers"]))
    if "hidden" in scores:
        kept = None if plan is None else len(plan["hidden"])
        pictures.append(plots.hidden_curve(scores["hidden"], kept))
    return pictures


def _training(stage: StageResult) -> tuple[str, str, plots.Picture]:
    """Name, a line of figures and the curve of a training stage."""
    history = stage.metrics["history"]
    figures = [f"{history[-1]['step']} steps"]
    speeds = sorted(h["tokens_per_second"] for h in history if h.get("tokens_per_second"))
    if speeds:
        figures.append(f"{speeds[len(speeds) // 2]:,.0f} tokens/s (median)")
    losses = [h["val_loss"] for h in history if h.get("val_loss") is not None]
    if losses:
        figures.append(f"validation loss {losses[0]:.4f} to {losses[-1]:.4f}")
    return stage.name, ", ".join(figures), plots.training_curve(history)


def _examples(stage: StageResult, count: int = 2) -> list[dict[str, Any]]:
    """Return the first samples of a stage that wrote text."""
    with (stage.folder / "data.jsonl").open(encoding="utf-8") as file:
        return [json_value(line) for line in itertools.islice(file, count)]


def _versions(stages: Sequence[StageResult]) -> list[tuple[str, str]]:
    """Return package and version; several versions when stages ran with different ones."""
    found: dict[str, list[str]] = {}
    for stage in stages:
        for package, version in stage.versions.items():
            if version not in found.setdefault(package, []):
                found[package].append(version)
    return [(package, ", ".join(versions)) for package, versions in sorted(found.items())]
