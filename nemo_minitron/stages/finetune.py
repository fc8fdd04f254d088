"""``minitron finetune``: language-model training of a model on its own.

Teacher correction (2408.11796, section 2.1) before pruning, and fine-tuning on text that the
teacher wrote.
"""

from pathlib import Path
from typing import Any

from nemo_minitron.checkpoint.artifact import check_output
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.stages import FinetuneConfig
from nemo_minitron.stages.settings import open_checkpoint
from nemo_minitron.stages.train import check_training, datasets, sections, train


def check(cfg: FinetuneConfig) -> None:
    """Refuse bad input before any rank or weight exists.

    Raises:
        ValueError: names the value, the relation and the key to set.
    """
    check_output(cfg, "finetune")
    open_checkpoint(cfg, "size")
    check_training(cfg, "checkpoint", ModelConfig.load(Path(cfg.checkpoint) / "checkpoint"))
    # Whole-file hashes last: a typing mistake should not cost a pass over the weights.
    if cfg.verify_inputs != "size":
        open_checkpoint(cfg, cfg.verify_inputs)


def run(cfg: FinetuneConfig) -> None:
    """Train and write the result; a killed run goes on from its last checkpoint."""

    def build(config: ModelConfig, folder: Path) -> tuple[Any, tuple[Any, ...]]:
        from omegaconf import OmegaConf

        from nemo_minitron.models.gpt import MinitronGPTModel

        keys = {**sections(cfg, config), "chunk_size": cfg.chunk_size}
        return MinitronGPTModel(OmegaConf.create(keys)), datasets(cfg, config, folder)

    train(cfg, "finetune", "checkpoint", build)
