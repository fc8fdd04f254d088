"""The table of a report: what each evaluation of a pipeline found, a row for each."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_minitron.config.stages import PipelineConfig
from nemo_minitron.documents import yaml_value

Item = Mapping[str, Any]  # a stage of a pipeline, or a row of its table, as in the config
_ROW_KEYS = {"label", "evaluate", "gap"}
_REPORT_KEYS = {"title", "rows"}


@dataclass(frozen=True)
class StageResult:
    """One stage folder."""

    name: str
    stage: str
    folder: Path
    command: str
    """The command that makes this result when typed in a shell."""
    config: str
    """The resolved config, YAML."""
    metrics: dict[str, Any]
    versions: dict[str, str]
    created: str

    @property
    def values(self) -> dict[str, Any]:
        """The resolved config."""
        return yaml_value(self.config) or {}


@dataclass(frozen=True)
class Row:
    """One line of the evaluation table."""

    label: str
    loss: float | None
    """Held-out LM loss. It, perplexity and tokens are None if only tasks were evaluated."""
    perplexity: float | None
    tokens: int | None
    parameters: int
    closed: float | None
    """Share of the loss gap between pruned and teacher that was closed; None without a gap."""
    size: int | None = None
    """Bytes of the model's folder; None if it is no longer there."""
    speed: float | None = None
    """Tokens per second that it writes, as a ``benchmark`` stage measured; None without one."""
    tasks: dict[str, str] = field(default_factory=dict)
    """Scores of tasks, as ``task_scores`` returns them."""
    texts: list[dict[str, str]] = field(default_factory=list)
    """What the model wrote: ``prompt`` and ``completion``."""


def task_scores(metrics: Mapping[str, Any]) -> dict[str, str]:
    """``<task> <metric>`` -> value and standard error, out of a ``metrics.json``."""
    return {
        f"{task} {metric}": f"{score['value']:.3f}"
        + ("" if score["stderr"] is None else f" +- {score['stderr']:.3f}")
        for task, found in metrics.get("tasks", {}).items()
        for metric, score in found.items()
    }


def check_report(cfg: PipelineConfig) -> None:
    """Refuse ``report`` keys that name nothing, before any stage runs.

    ``report.rows`` is a list of ``{label, evaluate, gap}``: ``evaluate`` names an ``evaluate``
    item of ``stages``; ``gap`` (optional) is ``[pruned label, teacher label]``, the gap this row
    closes. Without any ``gap`` the first row is the teacher, the second the pruned model, and later
    rows close the gap between them. Without ``rows`` every ``evaluate`` stage is one.

    Raises:
        ValueError: names the key and what it could be.
    """
    unknown = set(cfg.report) - _REPORT_KEYS
    if unknown:
        raise ValueError(
            f"report holds unknown keys {sorted(unknown)}; known: {sorted(_REPORT_KEYS)}"
        )
    evaluations = _evaluations(cfg)
    labels: list[str] = []
    for row in row_items(cfg):
        if set(row) - _ROW_KEYS or not {"label", "evaluate"} <= set(row):
            raise ValueError(
                f"report.rows holds {dict(row)}; a row is {{label, evaluate}} and maybe gap: "
                "[pruned label, teacher label]"
            )
        if row["evaluate"] not in evaluations:
            raise ValueError(
                f"report.rows evaluate={row['evaluate']} is not an evaluate stage of this "
                f"pipeline; it must be one of {evaluations}"
            )
        gap = row.get("gap") or []
        if gap and (len(gap) != 2 or not set(gap) <= set(labels)):
            raise ValueError(
                f"report.rows gap={gap} of '{row['label']}' must be [pruned label, teacher label], "
                f"labels of earlier rows: {labels}"
            )
        labels.append(row["label"])
    if len(set(labels)) != len(labels):
        raise ValueError(f"report.rows labels {labels} must differ from each other")


def _evaluations(cfg: PipelineConfig) -> list[str]:
    return [item["name"] for item in cfg.stages if item["stage"] == "evaluate"]


def row_items(cfg: PipelineConfig) -> list[Item]:
    """Return rows as the config has them, or one for every evaluation."""
    every = [{"label": name, "evaluate": name} for name in _evaluations(cfg)]
    return list(cfg.report.get("rows") or every)


def table_rows(cfg: PipelineConfig, stages: Mapping[str, StageResult]) -> list[Row]:
    """Return a row for each evaluation that the report compares."""
    items = row_items(cfg)
    losses = {item["label"]: _loss(stages[item["evaluate"]], "lm_loss") for item in items}
    first = list(losses)[:2]
    explicit = any("gap" in item for item in items)
    speeds = _speeds(stages.values())
    rows = []
    for number, item in enumerate(items):
        gap = item.get("gap") if explicit else ([first[1], first[0]] if number >= 2 else None)
        stage, loss = stages[item["evaluate"]], losses[item["label"]]
        tokens = _loss(stage, "tokens")
        rows.append(
            Row(
                label=item["label"],
                loss=loss,
                perplexity=_loss(stage, "perplexity"),
                tokens=None if tokens is None else int(tokens),
                parameters=int(_metric(stage, "parameters", "total")),
                closed=None if not gap else _closed(losses[gap[0]], losses[gap[1]], loss),
                size=_size(stage),
                speed=speeds.get(stage.values.get("checkpoint", "")),
                tasks=task_scores(stage.metrics),
                texts=stage.metrics.get("texts", []),
            )
        )
    return rows


def _size(stage: StageResult) -> int | None:
    """Return the bytes of an evaluated model: the checkpoint of a result, or a whole export."""
    named = stage.values.get("checkpoint")
    if named is None:
        return None
    folder = Path(named)
    folder = folder / "checkpoint" if (folder / "checkpoint").is_dir() else folder
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) or None


def _speeds(stages: Iterable[StageResult]) -> dict[str, float]:
    """Folder of a model -> tokens per second that it writes, from the ``benchmark`` stages."""
    return {
        folder: model["equal"]["decode_tokens_per_second"]["median"]
        for stage in stages
        if stage.stage == "benchmark"
        for folder, model in zip(
            stage.values.get("checkpoint", []), stage.metrics.get("models", []), strict=True
        )
    }


def _loss(stage: StageResult, name: str) -> float | None:
    """Return a figure of the loss on text, which an evaluation of tasks alone does not have."""
    if "tasks" in stage.metrics and "lm_loss" not in stage.metrics:
        return None
    return _metric(stage, name)


def _closed(pruned: float | None, teacher: float | None, loss: float | None) -> float | None:
    if pruned is None or teacher is None or loss is None or pruned <= teacher:
        return None
    return (pruned - loss) / (pruned - teacher)


def _metric(stage: StageResult, *path: str) -> float:
    value: Any = stage.metrics
    for name in path:
        if not isinstance(value, dict) or name not in value:
            raise ValueError(
                f"{stage.folder / 'metrics.json'} holds no {'.'.join(path)}; run stage "
                f"'{stage.name}' again"
            )
        value = value[name]
    return float(value)
