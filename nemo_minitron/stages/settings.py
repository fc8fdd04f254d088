"""Code that stages share: inputs, ranks, working folders, and checks of the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from nemo_minitron.checkpoint.artifact import Manifest, Ranks, open_result, output_folder
from nemo_minitron.checkpoint.foreign.megatron_sources import is_megatron
from nemo_minitron.checkpoint.manifest import MANIFEST
from nemo_minitron.checkpoint.output_checks import is_export
from nemo_minitron.config.inference import EvaluateConfig
from nemo_minitron.config.layout import check_layout, check_prediction, check_recompute
from nemo_minitron.config.megatron import (
    GROUP,
    ForwardMegatronConfig,
    given_keys,
    merged_recompute,
    named_as_given,
)
from nemo_minitron.config.model import MODEL_YAML, ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import ImportanceConfig, PruneConfig, StageConfig
from nemo_minitron.config.training import DataConfig, TrainerConfig
from nemo_minitron.config.training_stages import TeacherPassConfig, TrainingStageConfig
from nemo_minitron.data.checks import check_batches, check_data
from nemo_minitron.data.sft import check_packing
from nemo_minitron.distillation.logit_index import FOLDER, INDEX, PARTS
from nemo_minitron.families.registry import longest_sequence
from nemo_minitron.pruning.scores import META_FILE
from nemo_minitron.runtime.ranks import launched_world_size, rank

_MODEL = f"checkpoint/{MODEL_YAML}"
_NEEDED = {
    "student": _MODEL,
    "teacher": _MODEL,
    "teacher_logits": f"{FOLDER}/{INDEX}",
    "checkpoint": _MODEL,
    "importance": META_FILE,
}
"""Keys that name results, and the file by which a result is known to be of the kind they want."""


def open_inputs(cfg: StageConfig, verify: str, *, exports: bool = False) -> dict[str, Manifest]:
    """Refuse inputs of a stage that are no intact results of the right kind.

    Args:
        cfg: config of the stage.
        verify: ``full`` or ``size``, as ``verify_inputs``.
        exports: whether ``checkpoint`` may name an exported model, too.

    Returns:
        The manifest of the result that each key names.

    Raises:
        ValueError: names the key and what is wrong with the folder.
    """
    opened = {}
    for key, needed in _NEEDED.items():
        named = getattr(cfg, key, None)
        for path in [named] if isinstance(named, str) else named or ():
            needs = None if exports and is_export(path) else needed
            if needed == _MODEL:
                _refuse_unimported(key, path)
            opened[key] = open_result(path, verify, key=key, needs=needs, workers=cfg.workers)
    return opened


def _refuse_unimported(key: str, path: str) -> None:
    """Say what makes a result of a model as other programs store it.

    Raises:
        ValueError: names the command.
    """
    folder = Path(path)
    if any((place / MANIFEST).is_file() for place in (folder, folder.parent)):
        return
    if (folder / "config.json").is_file() or folder.suffix == ".gguf" or is_megatron(folder):
        raise ValueError(
            f"{key}={path} is not a complete result but a model as other programs store it; "
            f"minitron import source={path} output_dir=... makes one of it"
        )


@contextmanager
def opened_inputs(cfg: StageConfig, *, exports: bool = False) -> Iterator[dict[str, Manifest]]:
    """Open the inputs of a stage around its other checks.

    Sizes are compared before, and whole files hashed after them if ``verify_inputs`` asks for it: a
    typing mistake should not cost a pass over the weights. Arguments are those of ``open_inputs``.
    """
    yield open_inputs(cfg, "size", exports=exports)
    if cfg.verify_inputs != "size":
        open_inputs(cfg, cfg.verify_inputs, exports=exports)


@contextmanager
def on_ranks(
    cfg: StageConfig,
    stage: str,
    parallel: ParallelConfig,
    seed: int,
    *,
    resumable: bool = False,
    temporary: tuple[str, ...] = (),
) -> Iterator[Path]:
    """Start the ranks' process groups, and give them the working folder of one result.

    Args:
        cfg: config of the stage.
        stage: its name.
        parallel: layout of the ranks.
        seed: see ``runtime.launch.distributed``.
        resumable: see ``checkpoint.artifact.output_folder``.
        temporary: see ``checkpoint.artifact.output_folder``.
    """
    from nemo_minitron.runtime.launch import distributed
    from nemo_minitron.runtime.worlds import barrier

    ranks = Ranks(rank(), barrier)
    with (
        distributed(parallel, seed),
        output_folder(cfg, stage, resumable=resumable, temporary=temporary, ranks=ranks) as work,
    ):
        yield work


class _RunsModel(Protocol):
    """Config of a stage that runs a model."""

    @property
    def parallel(self) -> ParallelConfig: ...
    @property
    def megatron(self) -> ForwardMegatronConfig: ...


def check_forward(
    cfg: ImportanceConfig | PruneConfig | EvaluateConfig,
    model: ModelConfig,
    data: DataConfig | None,
) -> None:
    """Refuse a layout, settings or data that do not suit a model which is only run.

    Args:
        cfg: config of the stage.
        model: sizes of the model that ``checkpoint`` names.
        data: the samples, or None if the stage reads none.

    Raises:
        ValueError: names the value, the relation and the key to set.
    """
    check_layout(model, cfg.parallel)
    check_settings(cfg, model)
    world_size = cfg.parallel.world_size(launched_world_size())
    if data is None:
        return
    check_batches(data, cfg.parallel, world_size, cfg.megatron.transformer.get(GROUP))
    check_data(
        data,
        vocab_size=model.vocab_size,
        tokenizer_dir=Path(cfg.checkpoint) / "checkpoint" / "tokenizer",
        max_seq_length=longest_sequence(model),
    )
    check_packing(data, model.without_prediction(), padded=isinstance(cfg, EvaluateConfig))


def check_settings(
    cfg: _RunsModel,
    model: ModelConfig,
    parallel: ParallelConfig | None = None,
    precision: str = "32",
) -> None:
    """Refuse settings that a model which is only run cannot take here.

    Args:
        cfg: config of a stage with the section.
        model: sizes of the model.
        parallel: its layout, or None for that of the stage.
        precision: of its forward pass.

    Raises:
        ValueError: names the key and what it needs.
    """
    if not any(given_keys(cfg.megatron)):
        return
    from nemo_minitron.models.settings_check import check_with_megatron

    check_with_megatron(cfg.megatron, model, parallel or cfg.parallel, precision)


def check_training_settings(cfg: TrainingStageConfig, model: ModelConfig) -> None:
    """Refuse settings that the trained model cannot take here.

    Raises:
        ValueError: names the key and what it needs.
    """
    try:
        trainer = merged_recompute(cfg.trainer, cfg.megatron)
        check_recompute(trainer, model, cfg.parallel)
        check_prediction(model, cfg.parallel, trainer)
    except ValueError as error:
        raise ValueError(named_as_given(str(error), cfg.megatron)) from error
    if not any(given_keys(cfg.megatron)):
        return
    from nemo_minitron.models.settings_check import check_training_with_megatron

    check_training_with_megatron(cfg.megatron, model, cfg.parallel, cfg.trainer, cfg.optim)


def splits(trainer: TrainerConfig | TeacherPassConfig) -> tuple[str, ...]:
    """Return the splits that training reads."""
    return PARTS if trainer.limit_val_batches else PARTS[:1]
