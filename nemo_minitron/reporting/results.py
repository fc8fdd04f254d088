"""What the stages of a pipeline left on disk, read for the report, without torch."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nemo_minitron.checkpoint.manifest import flatten
from nemo_minitron.config import load
from nemo_minitron.config.model import MODEL_YAML, ModelConfig
from nemo_minitron.config.stages import PipelineConfig
from nemo_minitron.documents import read_json_object, read_yaml, yaml_value
from nemo_minitron.reporting.shell import shell_line

Item = Mapping[str, Any]  # a stage of a pipeline, or a row of its table, as in the config
_ROW_KEYS = {"label", "evaluate", "gap"}
_REPORT_KEYS = {"title", "rows"}
# Data keys that deal documents to splits, and those that do not change what is evaluated.
_DEAL = ("seed", "split", "document_separator", "text_key")
_SPEED = ("micro_batch_size", "global_batch_size", "cache_dir")


@dataclass(frozen=True)
class StageResult:
    """One stage folder."""

    name: str
    stage: str
    folder: Path
    command: str
    """What makes this result when typed in a shell."""
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
    """This and the next two are None if only tasks were evaluated."""
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
    """As ``task_scores``."""
    texts: list[dict[str, str]] = field(default_factory=list)
    """What the model wrote: ``prompt`` and ``completion``."""


@dataclass(frozen=True)
class Pruning:
    """What one prune stage did."""

    name: str
    before: ModelConfig
    after: ModelConfig
    plan: dict[str, Any]
    """``plan.json``: kept indices, 0-based (``pruning/plan.py``)."""
    importance: Path | None


@dataclass(frozen=True)
class Results:
    """Everything the report shows."""

    title: str
    output_dir: Path
    stages: list[StageResult]
    rows: list[Row]
    prunings: list[Pruning]
    scores: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """Importance stage -> axis -> scores."""
    warnings: list[str] = field(default_factory=list)
    """Why the table may not mean what it says."""
    command: str = ""
    """What runs the whole pipeline again; empty where it was not started by command line."""
    config: str = ""
    """The pipeline's resolved config, YAML."""

    def stages_of(self, stage: str) -> list[StageResult]:
        """The results of one kind of stage, in pipeline order."""
        return [result for result in self.stages if result.stage == stage]


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
    for row in _row_items(cfg):
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


def _row_items(cfg: PipelineConfig) -> list[Item]:
    every = [{"label": name, "evaluate": name} for name in _evaluations(cfg)]
    return list(cfg.report.get("rows") or every)


def read_results(output_dir: Path, cfg: PipelineConfig) -> Results:
    """Read all stage folders of a finished pipeline.

    Args:
        output_dir: the pipeline's folder; each stage is ``output_dir/<name>``.
        cfg: the pipeline's config.

    Raises:
        ValueError: ``report`` is wrong, or a file that the table needs is missing or damaged.
    """
    from safetensors.numpy import load_file

    check_report(cfg)
    stages = [_read_stage(output_dir, item) for item in cfg.stages]
    return Results(
        title=cfg.report.get("title") or "Minitron report",
        output_dir=output_dir,
        stages=stages,
        rows=_rows(cfg, {stage.name: stage for stage in stages}),
        prunings=[_read_pruning(s) for s in stages if s.stage == "prune"],
        scores={
            stage.name: load_file(stage.folder / "scores.safetensors")
            for stage in stages
            if stage.stage == "importance"
        },
        warnings=_leaks(stages) + _unlike(cfg, stages),
        command=_pipeline_command(),
        config=yaml.safe_dump(asdict(cfg), sort_keys=False),
    )


def _pipeline_command() -> str:
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return ""
    words = HydraConfig.get().overrides.task
    return shell_line(["minitron", "pipeline", *map(str, words), *load.config_flags()])


def _leaks(stages: list[StageResult]) -> list[str]:
    """Evaluations that may have seen documents some stage trained on."""
    found = []
    for test in (s for s in stages if s.stage == "evaluate"):
        for train in (s for s in stages if s.stage in ("distill", "finetune")):
            mine, theirs = test.values.get("data", {}), train.values.get("data", {})
            if not _paths(mine) & _paths(theirs):
                continue
            different = [f"data.{key}" for key in _DEAL if mine.get(key) != theirs.get(key)]
            if str(mine.get("path")).endswith(".npy"):
                why = "a .npy is not split"
            elif mine.get("split_name") == "train":
                why = "data.split_name=train"
            elif different:
                why = f"{', '.join(different)} differ"
            else:
                continue
            found.append(
                f"{test.name} may hold text that {train.name} trained on (same data.path; {why})"
            )
    return found


def _paths(data: dict[str, Any]) -> set[str]:
    """What a stage read, one source or several."""
    blend = [source["path"] for source in data.get("blend") or ()]
    return {str(data.get("path") or ""), *blend} if not blend else set(blend)


def _unlike(cfg: PipelineConfig, stages: list[StageResult]) -> list[str]:
    """Rows whose figures do not compare."""
    names = [item["evaluate"] for item in _row_items(cfg)]
    shown = [stage.values for stage in stages if stage.name in names]
    data = [values.get("data", {}) | dict.fromkeys(_SPEED) for values in shown]
    found = []
    if not all(item == data[0] for item in data):
        found.append(
            "the rows of the table were measured on different data, so they do not compare"
        )
    settings = [
        {**values.get("lm_eval", {}), "batch_size": None} for values in shown if values.get("tasks")
    ]
    if not all(item == settings[0] for item in settings):
        found.append("the tasks ran with different lm_eval.* keys, so their scores do not compare")
    return found


def _read_stage(output_dir: Path, item: Item) -> StageResult:
    folder = output_dir / item["name"]
    overrides, config = folder / ".hydra" / "overrides.yaml", folder / ".hydra" / "config.yaml"
    if overrides.is_file():
        words = [str(word) for word in read_yaml(overrides) or []]
    else:
        keys = {**flatten(dict(item.get("config") or {})), "output_dir": str(folder)}
        words = [load.override(key, value) for key, value in keys.items() if key]
    manifest = _read_json(folder / "manifest.json")
    return StageResult(
        name=item["name"],
        stage=item["stage"],
        folder=folder,
        command=shell_line(["minitron", item["stage"], *words]),
        config=config.read_text() if config.is_file() else "",
        metrics=_read_json(folder / "metrics.json"),
        versions=manifest.get("versions", {}),
        created=manifest.get("created", ""),
    )


def _read_json(path: Path) -> dict[str, Any]:
    """What a JSON file of a stage says; nothing where there is none."""
    try:
        return read_json_object(path) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{error}; run its stage again") from error


def _rows(cfg: PipelineConfig, stages: Mapping[str, StageResult]) -> list[Row]:
    items = _row_items(cfg)
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
    """Bytes of the model that was evaluated: of a result its checkpoint, of an export all of it."""
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
    """A figure of the loss on text, which an evaluation of tasks alone does not have."""
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


def _read_pruning(stage: StageResult) -> Pruning:
    values = stage.values
    importance = values.get("importance")
    return Pruning(
        name=stage.name,
        before=_model(Path(values["checkpoint"])),
        after=_model(stage.folder),
        plan=_read_json(stage.folder / "plan.json"),
        importance=Path(importance) if importance else None,
    )


def _model(folder: Path) -> ModelConfig:
    nested = folder / "checkpoint"
    return ModelConfig.load(nested if (nested / MODEL_YAML).is_file() else folder)
