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
from nemo_minitron.config.recompute import check_recompute
from nemo_minitron.config.stages import DistillConfig
from nemo_minitron.data.checks import check_batches, check_data
from nemo_minitron.distillation.layer_map import check_intermediate
from nemo_minitron.distillation.logit_index import FOLDER, INDEX, PARTS, LogitIndex, check_stored
from nemo_minitron.runtime.ranks import launched_world_size

# What may differ when an unfinished training is started again: none of it changes what is learnt.
MAY_CHANGE = (
    "parallel.",
    "teacher_parallel.",
    "data.micro_batch_size",
    "trainer.log_every_n_steps",
    "trainer.recompute_",
    "trainer.save_",
)


def _splits(cfg: DistillConfig) -> tuple[str, ...]:
    return PARTS if cfg.trainer.limit_val_batches else PARTS[:1]


def check(cfg: DistillConfig) -> None:
    """Refuse bad input before any rank or weight exists.

    Raises:
        ValueError: names the value, the relation and the key to set.
    """
    check_output(cfg, "distill")
    _open_inputs(cfg, "size")
    student_dir = Path(cfg.student) / "checkpoint"
    student = ModelConfig.load(student_dir)
    cfg.distillation.check_vocabulary(student.vocab_size)
    try:
        check_layout(student, cfg.parallel)
    except ValueError as error:
        raise ValueError(f"student={cfg.student}: {error}") from error
    models = [student]
    if cfg.teacher is None:
        check_stored(cfg, student.vocab_size)
        teacher_tokenizer = Path(str(cfg.teacher_logits)) / "tokenizer"
    else:
        teacher_tokenizer = Path(cfg.teacher) / "checkpoint" / "tokenizer"
        models.append(ModelConfig.load(teacher_tokenizer.parent))
        _check_teacher(cfg, *models)
    check_recompute(cfg.trainer, student, cfg.parallel)
    check_same_tokens(student_dir / "tokenizer", teacher_tokenizer)
    check_batches(cfg.data, cfg.parallel, cfg.parallel.world_size(launched_world_size()))
    lengths = [model.max_seq_length for model in models if model.max_seq_length]
    check_data(
        cfg.data,
        splits=_splits(cfg),
        vocab_size=student.vocab_size,
        tokenizer_dir=student_dir / "tokenizer",
        max_seq_length=min(lengths, default=None),
    )
    # Whole-file hashes last: a typing mistake should not cost a pass over the weights.
    if cfg.verify_inputs != "size":
        _open_inputs(cfg, cfg.verify_inputs)


def _open_inputs(cfg: DistillConfig, verify: str) -> None:
    model, stored = f"checkpoint/{MODEL_YAML}", f"{FOLDER}/{INDEX}"
    for key, needs in {"student": model, "teacher": model, "teacher_logits": stored}.items():
        folder = getattr(cfg, key)
        if folder is not None:
            open_result(folder, verify, key=key, needs=needs, workers=cfg.workers)


def _check_teacher(cfg: DistillConfig, student: ModelConfig, teacher: ModelConfig) -> None:
    if student.vocab_size != teacher.vocab_size:
        raise ValueError(
            f"student has vocab_size={student.vocab_size} but teacher has "
            f"{teacher.vocab_size}; set student= and teacher= to models of one tokenizer"
        )
    try:
        check_layout(teacher, cfg.teacher_parallel.of(cfg.parallel))
    except ValueError as error:
        raise ValueError(
            f"teacher={cfg.teacher}: {error} (its layers are split by teacher_parallel.*)"
        ) from error
    check_intermediate(cfg.distillation.intermediate, teacher, student, cfg.parallel)


def model_config(cfg: DistillConfig, student: ModelConfig) -> dict[str, Any]:
    """What the configs of both distillation models have in common."""
    return {
        "gpt": asdict(student),
        "parallel": asdict(cfg.parallel),
        "teacher_parallel": asdict(cfg.teacher_parallel),
        "data": asdict(cfg.data),
        "trainer": asdict(cfg.trainer),
        "optim": asdict(cfg.optim),
        "exp_manager": asdict(cfg.exp_manager),
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
        folder = output_folder(cfg, "distill", resumable=True, may_change=MAY_CHANGE, ranks=ranks)
        with folder as work:
            metrics = _train(cfg, work)
            if ranks.rank == 0:
                source = Path(cfg.student) / "checkpoint" / "tokenizer"
                if source.is_dir():
                    shutil.copytree(source, work / "checkpoint" / "tokenizer", dirs_exist_ok=True)
                (work / "metrics.json").write_text(json.dumps(metrics, indent=1))
                shutil.rmtree(work / CHECKPOINTS, ignore_errors=True)
    _show(metrics)


def _train(cfg: DistillConfig, work: Path) -> dict[str, Any]:
    from nemo_minitron.families.registry import family_of
    from nemo_minitron.families.table import parameter_count
    from nemo_minitron.models.stage_data import training_datasets
    from nemo_minitron.models.training import fit

    student_dir = Path(cfg.student) / "checkpoint"
    student = ModelConfig.load(student_dir)
    datasets = training_datasets(
        cfg.data, cfg.trainer, student, student_dir, cfg.output_dir, _splits(cfg)
    )
    config = model_config(cfg, replace(student))
    if cfg.teacher is None:
        model, datasets = _with_stored_teacher(cfg, config, datasets)
    else:
        model = _with_teacher(Path(cfg.teacher) / "checkpoint", config)
    model.load(student_dir, key="student")
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


def _with_teacher(teacher_dir: Path, config: dict[str, Any]) -> Any:
    """The model with a teacher on the same ranks."""
    from omegaconf import OmegaConf

    from nemo_minitron.models.distill import DistillationGPTModel

    teacher = asdict(ModelConfig.load(teacher_dir))
    model = DistillationGPTModel(OmegaConf.create({**config, "teacher": teacher}))
    model.load_teacher(teacher_dir)
    return model


def _with_stored_teacher(
    cfg: DistillConfig, config: dict[str, Any], datasets: tuple[Any, Any]
) -> tuple[Any, tuple[Any, ...]]:
    """The model without a teacher, and samples that bring the teacher's outputs."""
    from omegaconf import OmegaConf

    from nemo_minitron.distillation.logit_shards import StoredTeacher
    from nemo_minitron.models.offline import OfflineDistillationGPTModel
    from nemo_minitron.runtime.groups import ParallelGroups

    folder = Path(str(cfg.teacher_logits)) / FOLDER
    keys: dict[str, Any] = {"top_k": cfg.distillation.top_k, "data_path": cfg.data.path}
    joined = tuple(
        None if dataset is None else StoredTeacher(dataset, folder, part, **keys)
        for part, dataset in zip(PARTS, datasets, strict=True)
    )
    if not ParallelGroups.current().is_last_stage:
        joined = datasets  # every rank has compared the tokens; the last stage has the loss
    stored = {"stored_temperature": LogitIndex.load(folder).temperature}
    return OfflineDistillationGPTModel(OmegaConf.create({**config, **stored})), joined


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
