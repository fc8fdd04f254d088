"""Opening what the stages read."""

from pathlib import Path
from typing import Protocol

from nemo_minitron.checkpoint.artifact import open_result
from nemo_minitron.config.model import MODEL_YAML


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
