"""The lineage entry of every stage that writes a model: what it did, in words and numbers."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoint.lineage import model_facts, read_lineage, read_source_card
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.phases import Phase
from nemo_minitron.config.schema import flatten
from nemo_minitron.config.stages import DistillConfig, ImportConfig, PruneConfig, PruningConfig
from nemo_minitron.config.training import DataConfig
from nemo_minitron.config.training_stages import TrainingStageConfig
from nemo_minitron.documents import read_yaml
from nemo_minitron.pruning.scores import META_FILE, read_meta

_TRAINING_KEYS = (
    "trainer.max_steps",
    "data.global_batch_size",
    "data.seq_length",
    "optim.lr",
    "optim.min_lr",
    "optim.lr_decay_style",
    "optim.lr_warmup_steps",
    "optim.weight_decay",
    "trainer.precision",
    "trainer.seed",
)
_DISTILLATION_KEYS = ("loss", "temperature", "temperature_scaling", "kd_weight", "ce_weight")
_INTERMEDIATE_KEYS = ("losses", "layer_map", "metric", "alpha")


def import_entry(cfg: ImportConfig, config: ModelConfig) -> dict[str, Any]:
    """Return the lineage entry of an imported model."""
    source = read_source_card(Path(cfg.source))
    if cfg.source_ignore:
        source["passed_over"] = list(cfg.source_ignore)
    return {"stage": "import", "source": source, "model": model_facts(config)}


def prune_entry(
    cfg: PruneConfig, small: ModelConfig, dropped: list[int], rounds: Path
) -> dict[str, Any]:
    """Return the lineage entry of a pruned model.

    Args:
        cfg: the stage.
        small: the pruned model.
        dropped: layers that went, counted from 1 in the model that was pruned.
        rounds: folder of the rounds that were scored by the stage itself, if any were.
    """
    settings = _changed(asdict(cfg.pruning), asdict(PruningConfig()))
    settings = {f"pruning.{key}": value for key, value in settings.items()}
    if dropped and cfg.pruning.drop_layers is None:
        settings["pruning.layer_criterion"] = cfg.pruning.layer_criterion
    return {
        "stage": "prune",
        "settings": settings,
        "dropped_layers": dropped,
        "scores": _scores(cfg, rounds),
        "model": model_facts(small),
    }


def _changed(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the dotted keys whose values differ from their defaults."""
    known = flatten(defaults)
    return {key: value for key, value in flatten(values).items() if value != known.get(key)}


def _scores(cfg: PruneConfig, rounds: Path) -> list[dict[str, Any]]:
    """List the origin of the scores: the ``importance`` stage, then each round of this stage."""
    found = []
    if cfg.importance is not None:
        folder = Path(cfg.importance)
        found.append(_provenance(folder, _settings_of(folder).get("data.path")))
    numbers = sorted(int(path.name) for path in rounds.glob("*") if path.name.isdigit())
    for number in numbers:
        folder = rounds / str(number)
        if (folder / META_FILE).is_file():
            found.append({"round": number, **_provenance(folder, cfg.data.path)})
    return found


def _provenance(folder: Path, data: object) -> dict[str, Any]:
    """Describe one folder of scores; ``data`` is the path of the calibration text."""
    meta = read_meta(folder)
    aggregation, how = meta.get("aggregation", {}), meta.get("data", {})
    facts = {
        "axes": meta.get("axes"),
        "criterion": meta.get("criterion"),
        "batch_aggregation": aggregation.get("batch"),
        "seq_aggregation": aggregation.get("seq"),
        "data": None if data is None else Path(str(data)).name,
        "split": how.get("split_name"),
        "samples": meta.get("num_samples"),
        "tokens": meta.get("num_tokens"),
        "seq_length": how.get("seq_length"),
        "lm_loss_samples": meta.get("lm_loss_samples"),
    }
    return {key: value for key, value in facts.items() if value is not None}


def _settings_of(result: Path) -> dict[str, Any]:
    """Return the config that made a result, dotted keys, as it is stored beside it."""
    path = result / ".hydra" / "config.yaml"
    return flatten(read_yaml(path)) if path.is_file() else {}


def training_entry(
    cfg: TrainingStageConfig, stage: str, config: ModelConfig, metrics: dict[str, Any]
) -> dict[str, Any]:
    """Return the lineage entry of a trained model; ``metrics`` is the content of metrics.json."""
    values = flatten(asdict(cfg))
    entry: dict[str, Any] = {
        "stage": stage,
        "data": {"name": _data_name(cfg), "tokens": int(metrics["train_tokens"])},
        "settings": {key: values[key] for key in _TRAINING_KEYS},
    }
    if cfg.trainer.phases is not None:
        entry["settings"]["trainer.phases"] = "; ".join(map(_phase, cfg.phases()))
    if isinstance(cfg, DistillConfig):
        entry["settings"] = {**_distillation(cfg), **entry["settings"]}
        entry["teacher"] = _teacher(cfg)
    losses = {key: metrics.get(key) for key in ("loss", "val_loss")}
    entry["losses"] = {key: round(x, 4) for key, x in losses.items() if x is not None}
    entry["model"] = model_facts(config)
    return entry


def _phase(phase: Phase) -> str:
    data = phase.data
    return f"{phase.steps} steps of {data.global_batch_size} x {data.seq_length} tokens"


def _data_name(cfg: TrainingStageConfig) -> str:
    """Name the data of all phases, each source once."""
    return "; ".join(dict.fromkeys(_read_by(phase.data) for phase in cfg.phases()))


def _read_by(data: DataConfig) -> str:
    """Return the last part of ``data.path``, or the sources of a blend with their weights."""
    sources = data.blend or ()
    names = [f"{Path(source['path']).name} ({source['weight']:g})" for source in sources]
    return ", ".join(names) or Path(data.path).name


def _distillation(cfg: DistillConfig) -> dict[str, Any]:
    section = cfg.distillation
    names = [*_DISTILLATION_KEYS, *(["top_k"] if section.top_k is not None else [])]
    settings = {f"distillation.{name}": getattr(section, name) for name in names}
    if section.intermediate.losses:
        inner = asdict(section.intermediate)
        settings |= {f"distillation.intermediate.{key}": inner[key] for key in _INTERMEDIATE_KEYS}
    return settings


def _teacher(cfg: DistillConfig) -> dict[str, Any]:
    """Return the facts about the teacher that the recipe names."""
    if cfg.teacher is None:
        folder = Path(str(cfg.teacher_logits))
        name = _settings_of(folder).get("checkpoint") or folder
        return {"name": Path(str(name)).name, "stored_logits": True}
    folder = Path(cfg.teacher) / "checkpoint"
    facts = model_facts(ModelConfig.load(folder))
    stages = [entry["stage"] for entry in read_lineage(folder)]
    return {"name": Path(cfg.teacher).resolve().name, "stages": stages, **facts}
