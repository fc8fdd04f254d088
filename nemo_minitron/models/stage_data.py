"""Datasets of the stages that run a model, built by rank 0 and read by all."""

from pathlib import Path
from typing import Any

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.training import DataConfig, TrainerConfig
from nemo_minitron.config.training_stages import TeacherPassConfig
from nemo_minitron.data.cache import cache_folder
from nemo_minitron.data.datasets import TokenData, build_datasets, build_split, prepare_tokens


def _tokens(
    data: DataConfig,
    model: ModelConfig,
    checkpoint: Path,
    output_dir: str,
    splits: tuple[str, ...] | None,
) -> TokenData:
    tokenizer = checkpoint / "tokenizer"
    return prepare_tokens(
        data,
        vocab_size=model.vocab_size,
        cache=cache_folder(data, output_dir),
        tokenizer_dir=tokenizer if tokenizer.is_dir() else None,
        splits=splits,
    )


def training_datasets(
    data: DataConfig,
    trainer: TrainerConfig | TeacherPassConfig,
    model: ModelConfig,
    checkpoint: Path,
    output_dir: str,
    splits: tuple[str, ...],
) -> tuple[Any, Any]:
    """Train samples for every step and the validation samples (None without validation)."""
    tokens = _tokens(data, model, checkpoint, output_dir, splits)
    sizes = (
        trainer.max_steps * data.global_batch_size,
        trainer.limit_val_batches * data.global_batch_size,
        0,
    )
    train, validation, _ = build_datasets(data, tokens, sizes)
    return train, validation


def stage_dataset(data: DataConfig, model: ModelConfig, checkpoint: Path, output_dir: str) -> Any:
    """The samples of ``data.split_name`` that calibration and evaluation read."""
    return build_split(data, _tokens(data, model, checkpoint, output_dir, None))
