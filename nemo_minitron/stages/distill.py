"""``minitron distill``: the pruned model learns from the original one."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoint.artifact import check_output, open_result
from nemo_minitron.checkpoint.tokenizer import check_same_tokens
from nemo_minitron.config.layout import check_layout
from nemo_minitron.config.model import MODEL_YAML, ModelConfig
from nemo_minitron.config.stages import DistillConfig
from nemo_minitron.data.checks import check_batches, check_data
from nemo_minitron.distillation.layer_map import check_intermediate
from nemo_minitron.runtime.ranks import launched_world_size

_SPLITS = ("train", "validation")


def _splits(cfg: DistillConfig) -> tuple[str, ...]:
    return _SPLITS if cfg.trainer.limit_val_batches else _SPLITS[:1]


def check(cfg: DistillConfig) -> None:
    """Refuse bad input before any rank or weight exists.

    Raises:
        ValueError: names the value, the relation and the key to set.
    """
    check_output(cfg, "distill")
    _open_models(cfg, "size")
    student_dir, teacher_dir = (Path(path) / "checkpoint" for path in (cfg.student, cfg.teacher))
    student, teacher = ModelConfig.load(student_dir), ModelConfig.load(teacher_dir)
    if student.vocab_size != teacher.vocab_size:
        raise ValueError(
            f"student has vocab_size={student.vocab_size} but teacher has "
            f"{teacher.vocab_size}; set student= and teacher= to models of one tokenizer"
        )
    cfg.distillation.check_vocabulary(student.vocab_size)
    check_same_tokens(student_dir / "tokenizer", teacher_dir / "tokenizer")
    for key, model in (("student", student), ("teacher", teacher)):
        try:
            check_layout(model, cfg.parallel)
        except ValueError as error:
            raise ValueError(f"{key}={getattr(cfg, key)}: {error}") from error
    check_intermediate(cfg.distillation.intermediate, teacher, student, cfg.parallel)
    check_batches(cfg.data, cfg.parallel, cfg.parallel.world_size(launched_world_size()))
    check_data(
        cfg.data,
        splits=_splits(cfg),
        vocab_size=student.vocab_size,
        tokenizer_dir=student_dir / "tokenizer",
    )
    # Whole-file hashes last: a typing mistake should not cost a pass over the weights.
    if cfg.verify_inputs != "size":
        _open_models(cfg, cfg.verify_inputs)


def _open_models(cfg: DistillConfig, verify: str) -> None:
    needs = f"checkpoint/{MODEL_YAML}"
    for key in ("student", "teacher"):
        open_result(getattr(cfg, key), verify, key=key, needs=needs, workers=cfg.workers)


def model_config(cfg: DistillConfig, student: ModelConfig, teacher: ModelConfig) -> dict[str, Any]:
    """Config of ``DistillationGPTModel``."""
    return {
        "gpt": asdict(student),
        "teacher": asdict(teacher),
        "parallel": asdict(cfg.parallel),
        "data": asdict(cfg.data),
        "trainer": asdict(cfg.trainer),
        "optim": asdict(cfg.optim),
        "distillation": asdict(cfg.distillation),
        "chunk_size": cfg.distillation.chunk_size,
    }


def run(cfg: DistillConfig) -> None:
    """Train and write the result; a killed run goes on from its last checkpoint."""
    from nemo_minitron.checkpoint.artifact import Ranks, output_folder
    from nemo_minitron.models.training import CHECKPOINTS
    from nemo_minitron.runtime.launch import barrier, distributed
    from nemo_minitron.runtime.ranks import rank

    with distributed(cfg.parallel, cfg.trainer.seed):
        ranks = Ranks(rank(), barrier)
        with output_folder(cfg, "distill", resumable=True, ranks=ranks) as work:
            metrics = _train(cfg, work)
            if ranks.rank == 0:
                source = Path(cfg.student) / "checkpoint" / "tokenizer"
                if source.is_dir():
                    shutil.copytree(source, work / "checkpoint" / "tokenizer", dirs_exist_ok=True)
                (work / "metrics.json").write_text(json.dumps(metrics, indent=1))
                shutil.rmtree(work / CHECKPOINTS, ignore_errors=True)
    _show(metrics)


def _train(cfg: DistillConfig, work: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    from nemo_minitron.families.registry import family_of
    from nemo_minitron.families.table import parameter_count
    from nemo_minitron.models.distill import DistillationGPTModel
    from nemo_minitron.models.stage_data import training_datasets
    from nemo_minitron.models.training import fit

    student_dir, teacher_dir = (Path(path) / "checkpoint" for path in (cfg.student, cfg.teacher))
    student, teacher = ModelConfig.load(student_dir), ModelConfig.load(teacher_dir)
    datasets = training_datasets(
        cfg.data, cfg.trainer, student, student_dir, cfg.output_dir, _splits(cfg)
    )
    config = OmegaConf.create(model_config(cfg, replace(student), teacher))
    model = DistillationGPTModel(config)
    model.load(student_dir, key="student")
    model.load_teacher(teacher_dir)
    history = fit(model, datasets, work)
    model.save(work / "checkpoint")
    last = history[-1]
    return {
        "parameters": parameter_count(family_of(student), student),
        "steps": cfg.trainer.max_steps,
        "train_tokens": sum(record.get("tokens", 0.0) for record in history),
        "loss": last.get("loss"),
        "val_loss": last.get("val_loss"),
        "history": history,
    }


def _show(metrics: dict[str, Any]) -> None:
    from nemo_minitron.reporting.console import show_table

    trained = [record for record in metrics["history"] if "loss" in record]
    validated = [record for record in metrics["history"] if "val_loss" in record]
    rows = [("training loss", f"{trained[0]['loss']:.4f}", f"{trained[-1]['loss']:.4f}")]
    if validated:
        rows.append(
            (
                "validation LM loss",
                f"{validated[0]['val_loss']:.4f}",
                f"{validated[-1]['val_loss']:.4f}",
            )
        )
    show_table(f"distilled {metrics['steps']} steps", ("", "first", "last"), rows)
