"""A GPT that learns from a frozen teacher inside Megatron's schedule."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from nemo_minitron.config.distillation import DistillationConfig
from nemo_minitron.config.load import read_section
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import TeacherParallelConfig
from nemo_minitron.distillation.loss_config import LogitLossConfig
from nemo_minitron.models.build import build_gpt
from nemo_minitron.models.gpt import MinitronGPTModel
from nemo_minitron.models.intermediate import IntermediateLosses
from nemo_minitron.models.intermediate_step import IntermediateStep
from nemo_minitron.models.schedule import Batch, gathered_hidden, run_schedule
from nemo_minitron.models.settings import frozen_settings
from nemo_minitron.models.teacher import Teacher
from nemo_minitron.models.weights import load_weights
from nemo_minitron.runtime.launch import device


class DistillationGPTModel(MinitronGPTModel):
    """Student (trained) and teacher (frozen) on the same ranks, each with its own layer split.

    More config entries: ``teacher`` (ModelConfig of the teacher), ``teacher_parallel`` (its split
    over the pipeline) and ``distillation``.
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer | None = None) -> None:
        super().__init__(cfg=cfg, trainer=trainer)
        self.distillation = read_section(DistillationConfig, cfg.distillation)
        self.teacher_gpt = ModelConfig(**OmegaConf.to_container(cfg.teacher))  # type: ignore[arg-type]
        parallel = TeacherParallelConfig(**cfg.teacher_parallel).of(self.parallel)
        settings = frozen_settings(self.megatron_cfg)
        chunks = build_gpt(
            self.teacher_gpt, parallel, self.groups, dtype=self.dtype_, settings=settings
        )
        # Not a registered submodule: the teacher has no place in checkpoints or optimizers.
        offload = self.distillation.offload_teacher
        self._teacher = [Teacher([chunk.to(device()) for chunk in chunks], offload=offload)]
        self.intermediate = self._build_intermediate()

    def _build_intermediate(self) -> IntermediateStep | None:
        config = self.distillation.intermediate
        if not config.losses:
            return None
        student, teacher = (self.gpt, self.chunks), (self.teacher_gpt, self.teacher.chunks)
        losses = IntermediateLosses(config, student, teacher, self.parallel, self.groups)
        return IntermediateStep(losses, self.distillation.kd_weight)

    @property
    def teacher(self) -> Teacher:
        """The frozen model."""
        return self._teacher[0]

    @classmethod
    def restore_from(cls, restore_path: str, *args: Any, **kwargs: Any) -> Any:
        """Refuse: what ``save_to`` writes is the student, which is a MinitronGPTModel.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{restore_path} holds a student without its teacher; use MinitronGPTModel.restore_from"
        )

    def load_teacher(self, folder: Path) -> None:
        """Fill the teacher from a ``torch_dist`` checkpoint of any layout."""
        load_weights(self.teacher.chunks, self.groups, folder, key="teacher")
        self.teacher.release()

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
        inner = self.intermediate
        with inner.captured(micro_batches) if inner else nullcontext():
            states = self.teacher.hidden_states(micro_batches)
        if inner and inner.measures_first:
            with inner.measured(self.chunks, micro_batches):
                inner.follow(self._evaluate(micro_batches, states))

        def loss_func(index: int, batch: Batch, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            total, sums = self.loss(batch, hidden, config, **self._teacher_inputs(states, index))
            states[index] = None  # type: ignore[call-overload]
            return total, batch["loss_mask"].sum().int(), sums

        with inner.trained(self.chunks, micro_batches) if inner else nullcontext():
            outputs = run_schedule(list(self.model), micro_batches, loss_func, forward_only=False)
        sums = self._reduced(outputs)
        if inner:
            inner.follow(sums)
        return sums

    @torch.no_grad()
    def evaluate_batch(self, micro_batches: list[Batch]) -> Tensor:
        """``[KD, CE, tokens]`` sums of one global batch, forward only."""
        return self._evaluate(micro_batches, self.teacher.hidden_states(micro_batches))

    @torch.no_grad()
    def _evaluate(self, micro_batches: list[Batch], states: list[Tensor]) -> Tensor:
        config = self.loss_config()

        def loss_func(index: int, batch: Batch, hidden: Tensor) -> Tensor:
            return self.loss(batch, hidden, config, **self._teacher_inputs(states, index))[1]

        return self._reduced(
            run_schedule(
                list(self.model), micro_batches, loss_func, forward_only=True, collect_outputs=True
            )
        )

    # ---- intermediate losses

    def configure_optimizers(self) -> list[Any]:
        """As the base; gradients of the projection's copies are added up with the others."""
        optimizers: list[Any] = super().configure_optimizers()
        if self.intermediate:
            self.intermediate.finalize_with(self.last_chunk.config)
        return optimizers

    def step_losses(self, kd: float, ce: float, tokens: float) -> dict[str, float]:
        """The weighted intermediate losses are part of ``loss``; all parts are logged too."""
        losses = super().step_losses(kd, ce, tokens)
        return self.intermediate.add_to(losses, kd, tokens) if self.intermediate else losses

    def training_state(self, *, is_loading: bool) -> dict[str, Any]:
        """Also what the weight of the intermediate losses follows."""
        state = super().training_state(is_loading=is_loading)
        if self.intermediate and not is_loading:
            state["intermediate"] = self.intermediate.state_dict()
        return state

    def check_training_checkpoint(self, folder: Path) -> None:
        """Refuse a checkpoint without the projection that the intermediate losses train."""
        if self.intermediate:
            self.intermediate.check_checkpoint(folder)

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Also what the weight of the intermediate losses follows."""
        super().load_training_state(state)
        if self.intermediate:
            self.intermediate.load_state_dict(state.get("intermediate"))
