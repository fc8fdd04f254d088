"""``minitron distill``: the pruned model learns from the original one."""

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from nemo_minitron.checkpoint.artifact import check_output
from nemo_minitron.checkpoint.tokenizer import check_same_tokens
from nemo_minitron.config.layout import check_layout
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.stages import DistillConfig
from nemo_minitron.config.training_stages import refuse_packed
from nemo_minitron.data.sft import packs
from nemo_minitron.distillation.layer_map import check_intermediate
from nemo_minitron.distillation.logit_index import FOLDER, PARTS, LogitIndex, check_stored
from nemo_minitron.runtime.ranks import launched_world_size, runs_teacher_alone
from nemo_minitron.stages.finetune import check_training, datasets, sections, train
from nemo_minitron.stages.settings import check_settings, opened_inputs

_RELATION = "attention_relation"


def check(cfg: DistillConfig) -> None:
    """Refuse bad input before any rank or weight exists.

    Raises:
        ValueError: names the value, the relation and the key to set.
    """
    check_output(cfg, "distill")
    with opened_inputs(cfg):
        student_dir = Path(cfg.student) / "checkpoint"
        student = ModelConfig.load(student_dir)
        cfg.distillation.check_vocabulary(student.vocab_size)
        teachers = []
        if cfg.teacher is None:
            check_stored(cfg, student.vocab_size)
            teacher_tokenizer = Path(str(cfg.teacher_logits)) / "tokenizer"
        else:
            teacher_tokenizer = Path(cfg.teacher) / "checkpoint" / "tokenizer"
            teachers.append(ModelConfig.load(teacher_tokenizer.parent))
            _check_teacher(cfg, student, *teachers)
        check_same_tokens(student_dir / "tokenizer", teacher_tokenizer)
        check_training(cfg, "student", student, *teachers)
        relation = _RELATION in cfg.distillation.intermediate.losses
        for phase in cfg.phases() if cfg.teacher_parallel.own_ranks or relation else ():
            with phase.naming():
                if packs(phase.data):
                    _refuse_shared(cfg.teacher_parallel.own_ranks)


def _refuse_shared(own_ranks: int) -> NoReturn:
    if own_ranks:
        refuse_packed(own_ranks)
    raise ValueError(
        f"distillation.intermediate.losses holds {_RELATION}, which would compare positions of "
        "the SFT records that share a sample; set data.pack=false, or leave the loss out"
    )


def _check_teacher(cfg: DistillConfig, student: ModelConfig, teacher: ModelConfig) -> None:
    if student.vocab_size != teacher.vocab_size:
        raise ValueError(
            f"student has vocab_size={student.vocab_size} but teacher has "
            f"{teacher.vocab_size}; set student= and teacher= to models of one tokenizer; if they "
            "are, and one is padded to more rows, import that one again with vocab_size="
            f"{min(student.vocab_size, teacher.vocab_size)}"
        )
    try:
        check_layout(teacher, cfg.teacher_parallel.of(cfg.parallel))
    except ValueError as error:
        raise ValueError(
            f"teacher={cfg.teacher}: {error} (its layers are split by teacher_parallel.*)"
        ) from error
    split = cfg.teacher_parallel.of(cfg.parallel)
    check_settings(cfg, teacher, split, cfg.trainer.precision)
    check_intermediate(cfg.distillation.intermediate, teacher, student, cfg.parallel)


def model_config(cfg: DistillConfig, student: ModelConfig) -> dict[str, Any]:
    """Return the keys that the configs of both distillation models share."""
    return {
        **sections(cfg, student),
        "teacher_parallel": asdict(cfg.teacher_parallel),
        "distillation": asdict(cfg.distillation),
        "chunk_size": cfg.distillation.chunk_size,
    }


def run(cfg: DistillConfig) -> None:
    """Train and write the result; a killed run goes on from its last checkpoint."""
    if runs_teacher_alone():
        return _serve(cfg)
    with ExitStack() as after:

        def build(student: ModelConfig, folder: Path) -> tuple[Any, list[tuple[Any, ...]]]:
            config, samples = model_config(cfg, student), datasets(cfg, student, folder)
            if cfg.teacher is None:  # then there is one phase
                model, joined = _with_stored_teacher(cfg, config, *samples)
                return model, [joined]
            return _with_teacher(Path(cfg.teacher) / "checkpoint", config, after), samples

        train(cfg, "distill", "student", build)


def _with_teacher(teacher_dir: Path, config: dict[str, Any], after: ExitStack) -> Any:
    """Return the model with a teacher on the same ranks, or connected to one on others.

    Args:
        teacher_dir: ``checkpoint/`` of the teacher.
        config: of the model, but for the sizes of the teacher.
        after: what to do when training is over, whatever the reason.
    """
    from omegaconf import OmegaConf

    from nemo_minitron.models.distill import DistillationGPTModel, RemoteDistillationGPTModel

    teacher = asdict(ModelConfig.load(teacher_dir))
    own_ranks = config["teacher_parallel"]["own_ranks"]
    model: DistillationGPTModel | RemoteDistillationGPTModel
    if own_ranks:
        model = RemoteDistillationGPTModel(OmegaConf.create({**config, "teacher": teacher}))
        after.callback(model.remote.close, own_ranks)
    else:
        model = DistillationGPTModel(OmegaConf.create({**config, "teacher": teacher}))
    model.load_teacher(teacher_dir)
    return model


def _serve(cfg: DistillConfig) -> None:
    """Run the teacher for the ranks that train; this rank belongs to it alone."""
    from nemo_minitron.models.build import PRECISION_DTYPES
    from nemo_minitron.models.remote_teacher import Sides
    from nemo_minitron.models.serve_teacher import TeacherServer
    from nemo_minitron.models.weights import load_frozen
    from nemo_minitron.runtime.groups import ParallelGroups
    from nemo_minitron.runtime.launch import distributed

    layout, student = cfg.teacher_parallel.of(cfg.parallel), cfg.parallel
    replicas = student.world_size(launched_world_size()) // student.model_parallel_size
    with distributed(layout, cfg.trainer.seed):
        groups = ParallelGroups.current()
        sides = Sides(replicas, student.context_parallel_size, groups.dp.size())
        dtype = PRECISION_DTYPES[cfg.trainer.precision]
        folder = Path(str(cfg.teacher)) / "checkpoint"
        chunks = load_frozen(folder, layout, groups, dtype=dtype, megatron=cfg.megatron)
        TeacherServer(chunks, groups, sides).serve()


def _with_stored_teacher(
    cfg: DistillConfig, config: dict[str, Any], samples: tuple[Any, ...]
) -> tuple[Any, tuple[Any, ...]]:
    """Return the model without a teacher, and samples that bring the teacher's outputs."""
    from omegaconf import OmegaConf

    from nemo_minitron.distillation.logit_shards import StoredTeacher
    from nemo_minitron.models.distill import OfflineDistillationGPTModel
    from nemo_minitron.runtime.groups import ParallelGroups

    folder = Path(str(cfg.teacher_logits)) / FOLDER
    keys: dict[str, Any] = {
        "top_k": cfg.distillation.top_k,
        "data_path": cfg.data.path or "(data.blend)",
    }
    joined = tuple(
        None if dataset is None else StoredTeacher(dataset, folder, part, **keys)
        for part, dataset in zip(PARTS, samples, strict=True)
    )
    if not ParallelGroups.current().is_last_stage:
        joined = samples  # every rank has compared the tokens; the last stage has the loss
    stored = {"stored_temperature": LogitIndex.load(folder).temperature}
    return OfflineDistillationGPTModel(OmegaConf.create({**config, **stored})), joined
