"""A GPT that learns from a frozen teacher inside Megatron's schedule."""

from pathlib import Path

import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from nemo_minitron.config.distillation import DistillationConfig
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.distillation.loss_config import LogitLossConfig
from nemo_minitron.distillation.teacher import Teacher
from nemo_minitron.models.build import build_gpt
from nemo_minitron.models.gpt import MinitronGPTModel
from nemo_minitron.models.schedule import Batch, gathered_hidden, run_schedule
from nemo_minitron.models.weights import load_weights
from nemo_minitron.runtime.launch import device


class DistillationGPTModel(MinitronGPTModel):
    """Student (trained) and teacher (frozen) on the same ranks, each with its own layer split.

    Two more config entries: ``teacher`` (ModelConfig of the teacher) and ``distillation``.
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer | None = None) -> None:
        super().__init__(cfg=cfg, trainer=trainer)
        self.distillation = DistillationConfig(**cfg.distillation)
        self.teacher_gpt = ModelConfig(**OmegaConf.to_container(cfg.teacher))  # type: ignore[arg-type]
        chunks = build_gpt(self.teacher_gpt, self.parallel, self.groups, dtype=self.dtype_)
        # Not a registered submodule: the teacher has no place in checkpoints or optimizers.
        self._teacher = [Teacher([chunk.to(device()) for chunk in chunks])]

    @property
    def teacher(self) -> Teacher:
        """The frozen model."""
        return self._teacher[0]

    def load_teacher(self, folder: Path) -> None:
        """Fill the teacher from a ``torch_dist`` checkpoint of any layout."""
        load_weights(self.teacher.chunks, self.groups, folder, key="teacher")

    def loss_config(self) -> LogitLossConfig:
        """Weights of the distillation and the language-model loss."""
        reduce_grad = not self.parallel.sequence_parallel
        return LogitLossConfig.of(self.distillation, reduce_grad=reduce_grad)

    def _teacher_inputs(self, states: list[Tensor], index: int) -> dict[str, Tensor]:
        hidden = gathered_hidden(states[index], self.teacher.chunks[-1])
        return {"teacher_hidden": hidden, "teacher_weight": self.teacher.output_weight}

    def forward_backward(self, micro_batches: list[Batch]) -> Tensor:
        """Teacher pass over the global batch, then the student's ordinary schedule."""
        config = self.loss_config()
        states = self.teacher.hidden_states(micro_batches)

        def loss_func(index: int, batch: Batch, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            total, sums = self.loss(batch, hidden, config, **self._teacher_inputs(states, index))
            states[index] = None  # type: ignore[call-overload]
            return total, batch["loss_mask"].sum().int(), sums

        return self._reduced(
            run_schedule(list(self.model), micro_batches, loss_func, forward_only=False)
        )

    @torch.no_grad()
    def evaluate_batch(self, micro_batches: list[Batch]) -> Tensor:
        """``[KD, CE, tokens]`` sums of one global batch, forward only."""
        config = self.loss_config()
        states = self.teacher.hidden_states(micro_batches)

        def loss_func(index: int, batch: Batch, hidden: Tensor) -> Tensor:
            return self.loss(batch, hidden, config, **self._teacher_inputs(states, index))[1]

        return self._reduced(
            run_schedule(
                list(self.model), micro_batches, loss_func, forward_only=True, collect_outputs=True
            )
        )
