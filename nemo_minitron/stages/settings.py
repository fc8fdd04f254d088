"""Checks that stages share: the model they read, and the section ``megatron:``."""

from pathlib import Path
from typing import Any, Protocol

from nemo_minitron.checkpoint.artifact import open_result
from nemo_minitron.config.layout import check_recompute
from nemo_minitron.config.megatron import given_keys, merged_recompute, named_as_given
from nemo_minitron.config.model import MODEL_YAML, ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import TrainingStageConfig


def check_settings(
    cfg: Any, model: ModelConfig, parallel: ParallelConfig | None = None, precision: str = "32"
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
        check_recompute(merged_recompute(cfg.trainer, cfg.megatron), model, cfg.parallel)
    except ValueError as error:
        raise ValueError(named_as_given(str(error), cfg.megatron)) from error
    if not any(given_keys(cfg.megatron)):
        return
    from nemo_minitron.models.settings_check import check_training_with_megatron

    check_training_with_megatron(cfg.megatron, model, cfg.parallel, cfg.trainer, cfg.optim)


class _ReadsModel(Protocol):
    """Config of a stage that reads one model."""

    checkpoint: str
    workers: int


def open_checkpoint(cfg: _ReadsModel, verify: str) -> None:
    """Refuse a ``checkpoint`` that is no intact result with a model.

    Args:
        cfg: config of the stage.
        verify: ``full`` or ``size``, as ``verify_inputs``.

    Raises:
        ValueError: names the key and what is wrong with the folder.
    """
    needs = f"checkpoint/{MODEL_YAML}"
    open_result(cfg.checkpoint, verify, key="checkpoint", needs=needs, workers=cfg.workers)


def is_export(checkpoint: str) -> bool:
    """Whether a result folder holds a Hugging Face model instead of a ``checkpoint/``."""
    folder = Path(checkpoint)
    return (folder / "config.json").is_file() and not (folder / "checkpoint").exists()
