"""Read the results of a pipeline's stages for the report, without torch."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nemo_minitron.checkpoint.manifest import flatten
from nemo_minitron.config import load
from nemo_minitron.config.model import MODEL_YAML, ModelConfig
from nemo_minitron.config.phases import with_own
from nemo_minitron.config.stages import PipelineConfig
from nemo_minitron.documents import read_json_object, read_yaml
from nemo_minitron.reporting.rows import (
    Item,
    Row,
    StageResult,
    check_report,
    row_items,
    table_rows,
)

# Data keys that deal documents to splits, and those that do not change what is evaluated.
_DEAL = ("seed", "split", "document_separator", "text_key")
_SPEED = ("micro_batch_size", "global_batch_size", "cache_dir")


@dataclass(frozen=True)
class Pruning:
    """The result of one ``prune`` stage."""

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
    """Warnings: why the table may not mean what it says."""
    command: str = ""
    """What runs the whole pipeline again; empty where it was not started by command line."""
    config: str = ""
    """The pipeline's resolved config, YAML."""

    def stages_of(self, stage: str) -> list[StageResult]:
        """Return the results of one kind of stage, in pipeline order."""
        return [result for result in self.stages if result.stage == stage]


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
        rows=table_rows(cfg, {stage.name: stage for stage in stages}),
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
    """List evaluations whose documents may also be training data of another stage."""
    found = []
    for test in (s for s in stages if s.stage == "evaluate"):
        for train in (s for s in stages if s.stage in ("distill", "finetune")):
            mine = test.values.get("data", {})
            shared = [one for one in _data_of(train) if _paths(mine) & _paths(one)]
            if not shared:
                continue
            other = {k for one in shared for k in _DEAL if mine.get(k) != one.get(k)}
            different = [f"data.{key}" for key in _DEAL if key in other]
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


def _data_of(train: StageResult) -> list[dict[str, Any]]:
    """Return the keys ``data.*`` of a training, those of each of its phases."""
    data = train.values.get("data", {})
    phases = (train.values.get("trainer") or {}).get("phases") or [{}]
    return [with_own(data, phase.get("data") or {}) for phase in phases]


def _paths(data: dict[str, Any]) -> set[str]:
    """Return the paths that a stage read: one source or several."""
    blend = [source["path"] for source in data.get("blend") or ()]
    return set(blend) or ({str(data["path"])} if data.get("path") else set())


def _unlike(cfg: PipelineConfig, stages: list[StageResult]) -> list[str]:
    """List the reasons why figures of different rows are not comparable."""
    names = [item["evaluate"] for item in row_items(cfg)]
    shown = [stage.values for stage in stages if stage.name in names]
    read = (values["data"] for values in shown if _paths(values.get("data", {})))
    data = [one | dict.fromkeys(_SPEED) for one in read]
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
    """Read a JSON file of a stage; return an empty result if the file does not exist."""
    try:
        return read_json_object(path) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{error}; run its stage again") from error


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


def shell_line(words: Sequence[str]) -> str:
    """Join words to a readable command line with as few quotes as Hydra and the shell need."""
    return " ".join(_quote(_bare(word)) for word in words)


def _bare(word: str) -> str:
    """``key='value'`` without the quotes where Hydra reads a plain word as a string anyway."""
    match = re.fullmatch(r"([\w.]+)='([A-Za-z/._][\w./@+-]*)'", word)
    return word if match is None else load.override(match[1], match[2])


def _quote(word: str) -> str:
    if "'" in word and not set(word) & set('"$`\\!'):
        return f'"{word}"'
    return shlex.quote(word)
