"""A GPT that learns from stored teacher outputs: no teacher is built."""

from typing import Any

from lightning.pytorch import Trainer
from omegaconf import DictConfig
from torch import Tensor

from nemo_minitron.config.distillation import DistillationConfig
from nemo_minitron.config.load import read_section
from nemo_minitron.distillation.logit_shards import stored_targets
from nemo_minitron.distillation.loss_config import LogitLossConfig
from nemo_minitron.models.gpt import MinitronGPTModel
from nemo_minitron.models.schedule import Batch


class OfflineDistillationGPTModel(MinitronGPTModel):
    """The student alone; its samples bring what a teacher said of them (``StoredTeacher``).

    Two more config entries: ``distillation``, and ``stored_temperature``, at which the stored
    normalisers were taken.
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer | None = None) -> None:
        super().__init__(cfg=cfg, trainer=trainer)
        self.distillation = read_section(DistillationConfig, cfg.distillation)

    def loss_config(self) -> LogitLossConfig:
        """Weights of the distillation and the language-model loss."""
        reduce_grad = not self.parallel.sequence_parallel
        return LogitLossConfig.of(self.distillation, reduce_grad=reduce_grad)

    def loss(
        self, batch: Batch, hidden: Tensor, config: LogitLossConfig, **teacher: Any
    ) -> tuple[Tensor, Tensor]:
        """Summed loss of a micro-batch and ``[KD, CE, tokens]`` sums (last stage)."""
        targets = stored_targets(batch, self.cfg.stored_temperature)
        return super().loss(batch, hidden, config, teacher_topk=targets)
