"""``minitron finetune``: language-model training of a model on its own, as ``distill`` does it too.

Teacher correction (2408.11796, section 2.1) before pruning, and fine-tuning on text that the
teacher wrote.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.checkpoint.artifact import check_output
from nemo_minitron.checkpoint.lineage import record
from nemo_minitron.config.layout import check_layout
from nemo_minitron.config.megatron import GROUP
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.phases import Phase
from nemo_minitron.config.stages import FinetuneConfig
from nemo_minitron.config.training_stages import DistillConfig, TrainingStageConfig
from nemo_minitron.data.checks import check_batches, check_data
from nemo_minitron.data.sft import check_packing
from nemo_minitron.families.registry import longest_sequence
from nemo_minitron.planning.compute import built_teacher, training_flops
from nemo_minitron.runtime.ranks import launched_world_size, rank
from nemo_minitron.stages.settings import (
    check_training_settings,
    on_ranks,
    opened_inputs,
    splits,
)

if TYPE_CHECKING:
    from nemo_minitron.models.gpt import MinitronGPTModel
    from nemo_minitron.models.phases import Samples


def check(cfg: FinetuneConfig) -> None:
    """Refuse bad input before any rank or weight exists.

    Raises:
        ValueError: names the value, the relation and the key to set.
    """
    check_output(cfg, "finetune")
    with opened_inputs(cfg):
        check_training(cfg, "checkpoint", ModelConfig.load(Path(cfg.checkpoint) / "checkpoint"))


def run(cfg: FinetuneConfig) -> None:
    """Train and write the result; a killed run goes on from its last checkpoint."""

    def build(config: ModelConfig, folder: Path) -> tuple[Any, list[tuple[Any, ...]]]:
        from omegaconf import OmegaConf

        from nemo_minitron.models.gpt import MinitronGPTModel

        keys = {**sections(cfg, config), "chunk_size": cfg.chunk_size}
        return MinitronGPTModel(OmegaConf.create(keys)), datasets(cfg, config, folder)

    train(cfg, "finetune", "checkpoint", build)


def check_training(
    cfg: TrainingStageConfig, key: str, model: ModelConfig, *others: ModelConfig
) -> None:
    """Refuse a layout or data that the model to train cannot take.

    Args:
        cfg: config of the stage.
        key: config key that names the result folder of the model to train.
        model: its sizes.
        others: models that see the same samples.

    Raises:
        ValueError: names the value, the relation and the key to set.
    """
    try:
        check_layout(model, cfg.parallel)
    except ValueError as error:
        raise ValueError(f"{key}={getattr(cfg, key)}: {error}") from error
    check_training_settings(cfg, model)
    lengths = filter(None, map(longest_sequence, (model, *others)))
    longest = min(lengths, default=None)
    for phase in cfg.phases():
        with phase.naming():
            _check_one_kind(cfg, phase)
            world_size = cfg.parallel.world_size(launched_world_size())
            check_batches(phase.data, cfg.parallel, world_size, cfg.megatron.transformer.get(GROUP))
            check_data(
                phase.data,
                splits=splits(cfg.trainer),
                train_samples=phase.steps * phase.data.global_batch_size,
                vocab_size=model.vocab_size,
                tokenizer_dir=Path(getattr(cfg, key)) / "checkpoint" / "tokenizer",
                max_seq_length=longest,
            )
            check_packing(phase.data, model, *(other.without_prediction() for other in others))


def _check_one_kind(cfg: TrainingStageConfig, phase: Phase) -> None:
    """Refuse phases of which one has validation samples and another has none."""
    rows = Path(phase.data.path or "").suffix == ".npy"
    if rows and cfg.trainer.phases and cfg.trainer.limit_val_batches:
        raise ValueError(
            f"data.path={phase.data.path} of a phase is not split, so it has no validation; set "
            "trainer.limit_val_batches=0, or name a source of another form"
        )


def sections(cfg: TrainingStageConfig, model: ModelConfig) -> dict[str, Any]:
    """Return the config entries that every NeMo model here has."""
    names = ("parallel", "data", "trainer", "optim", "megatron", "exp_manager")
    return {"gpt": asdict(model), **{name: asdict(getattr(cfg, name)) for name in names}}


def datasets(cfg: TrainingStageConfig, model: ModelConfig, folder: Path) -> list[tuple[Any, ...]]:
    """Return training and validation samples of each phase (the latter None without validation)."""
    from nemo_minitron.data.datasets import training_datasets
    from nemo_minitron.models.documents import check_shared

    found = []
    for phase in cfg.phases():
        trainer = replace(cfg.trainer, max_steps=phase.steps, phases=None)
        with phase.naming():
            samples = training_datasets(
                phase.data, trainer, model, folder, cfg.output_dir, splits(trainer)
            )
            check_shared(samples[0], phase.data, model, cfg.parallel)
        found.append(samples)
    return found


def train(
    cfg: TrainingStageConfig, stage: str, key: str, build: Callable[[ModelConfig, Path], Any]
) -> None:
    """Train and write the result; a killed run goes on from its last checkpoint.

    Args:
        cfg: config of the stage.
        stage: its name.
        key: config key that names the result folder of the model to train.
        build: makes the NeMo model and its datasets from sizes and ``checkpoint/`` folder.
    """
    from nemo_minitron.models.training import CHECKPOINTS
    from nemo_minitron.stages.recipe import training_entry

    source = Path(getattr(cfg, key)) / "checkpoint"
    config = ModelConfig.load(source)
    seed, temporary = cfg.trainer.seed, (CHECKPOINTS,)
    with on_ranks(cfg, stage, cfg.parallel, seed, resumable=True, temporary=temporary) as work:
        model, samples = build(config, source)
        model.load(source, key=key)
        metrics = _fit(cfg, config, model, samples, work)
        if rank() == 0:
            if (source / "tokenizer").is_dir():
                target = work / "checkpoint" / "tokenizer"
                shutil.copytree(source / "tokenizer", target, dirs_exist_ok=True)
            entry = training_entry(cfg, stage, config, metrics)
            record(source, work / "checkpoint", entry)
            (work / "metrics.json").write_text(json.dumps(metrics, indent=1))
    _show(stage, metrics)


def _fit(
    cfg: TrainingStageConfig,
    config: ModelConfig,
    model: "MinitronGPTModel",
    samples: "Sequence[Samples]",
    work: Path,
) -> dict[str, Any]:
    from nemo_minitron.families.registry import family_of
    from nemo_minitron.families.table import parameter_count
    from nemo_minitron.models.training import fit

    history = fit(model, samples, work, flops=flops_per_step(cfg, config))
    if rank() == 0:
        shutil.rmtree(work / "checkpoint", ignore_errors=True)  # a part, of a run that was killed
    model.save(work / "checkpoint")
    # The last step may be one that trainer.skip_loss_above left out, of which nothing is logged.
    losses = [record["loss"] for record in history if "loss" in record]
    return {
        "parameters": parameter_count(family_of(config), config),
        "steps": cfg.trainer.max_steps,
        "train_tokens": sum(record.get("tokens", 0.0) for record in history),
        "loss": losses[-1] if losses else None,
        "val_loss": history[-1].get("val_loss") if history else None,
        "history": history,
    }


def flops_per_step(cfg: TrainingStageConfig, model: ModelConfig) -> list[float]:
    """Return each phase's operations of a step on all ranks, as ``plan`` counts them."""
    teacher = None
    if isinstance(cfg, DistillConfig) and cfg.teacher is not None:
        teacher = built_teacher(cfg, model, ModelConfig.load(Path(cfg.teacher) / "checkpoint"))
    return [
        data.global_batch_size * data.seq_length * training_flops(model, teacher, data.seq_length)
        for data in (phase.data for phase in cfg.phases())
    ]


def _show(stage: str, metrics: dict[str, Any]) -> None:
    from nemo_minitron.runtime.console import show_table

    names = {"loss": "training loss", "val_loss": "validation LM loss"}
    rows = []
    for key, name in names.items():
        found = [record[key] for record in metrics["history"] if key in record]
        if found:
            rows.append((name, f"{found[0]:.4f}", f"{found[-1]:.4f}"))
    show_table(f"{stage}: {metrics['steps']} steps", ("", "first", "last"), rows)
