"""Checks of the section ``megatron:`` before a stage runs; Megatron is imported if it holds any."""

from typing import Any

from nemo_minitron.config.megatron import given_keys, merged_recompute, named_as_given
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.recompute import check_recompute
from nemo_minitron.config.stages import TrainingStageConfig


def check_settings(
    cfg: Any, model: ModelConfig, parallel: ParallelConfig | None = None, precision: str = "32"
) -> None:
    """Refuse settings that a model which is only run cannot take here.

    Args:
        cfg: config of a stage with the section.
        model: sizes of the model.
        parallel: its layout; None: that of the stage.
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
