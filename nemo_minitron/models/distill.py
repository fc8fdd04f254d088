"""GPT models that learn from a teacher inside Megatron's schedule."""

from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import Trainer
from omegaconf import DictConfig
from torch import Tensor

from nemo_minitron.config.distillation import DistillationConfig
from nemo_minitron.config.load import read_section
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import TeacherParallelConfig
from nemo_minitron.models.build import build_gpt
from nemo_minitron.models.gpt import MinitronGPTModel
from nemo_minitron.models.intermediate import START_AGAIN, IntermediateLosses
from nemo_minitron.models.objective import AlphaSchedule, ResidentTeacher, StepSums, StoredOutputs
from nemo_minitron.models.optim import MegatronOptimizerAdapter
from nemo_minitron.models.remote_teacher import RemoteTeacher, Sides
from nemo_minitron.models.schedule import Batch
from nemo_minitron.models.settings import frozen_settings
from nemo_minitron.models.teacher import Teacher
from nemo_minitron.models.weights import load_weights
from nemo_minitron.runtime.launch import device


class DistillationGPTModel(MinitronGPTModel):
    """Student (trained) and teacher (frozen) on the same ranks, each with its own layer split.

    More config entries: ``teacher`` (ModelConfig of the teacher), ``teacher_parallel`` (its split
    over the pipeline) and ``distillation``.

    Attributes:
        teacher: the frozen model. It is no submodule, so it has no place in checkpoints or in the
            optimizer.
        intermediate: losses between inner states, if any are asked for.
        alpha: weight of those losses.
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer | None = None) -> None:
        super().__init__(cfg=cfg, trainer=trainer)
        self.distillation = read_section(DistillationConfig, cfg.distillation)
        self.teacher_gpt = read_section(ModelConfig, cfg.teacher)
        if self.gpt.mtp_num_layers is None:
            self.teacher_gpt = self.teacher_gpt.without_prediction()
        parallel = read_section(TeacherParallelConfig, cfg.teacher_parallel).of(self.parallel)
        settings = frozen_settings(self.megatron_cfg)
        chunks = build_gpt(
            self.teacher_gpt, parallel, self.groups, dtype=self.dtype_, settings=settings
        )
        offload = self.distillation.offload_teacher
        self.teacher = Teacher([chunk.to(device()) for chunk in chunks], offload=offload)
        config = self.distillation.intermediate
        self.intermediate: IntermediateLosses | None = None
        if config.losses:
            student, teacher = (self.gpt, self.chunks), (self.teacher_gpt, self.teacher.chunks)
            self.intermediate = IntermediateLosses(
                config, student, teacher, self.parallel, self.groups
            )
        self.alpha = AlphaSchedule(config, self.distillation.kd_weight, device())
        self.objective = ResidentTeacher(self.teacher, self.intermediate)

    @classmethod
    def restore_from(cls, restore_path: str, *args: object, **kwargs: object) -> NoReturn:
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

    # ---- intermediate losses

    def student_pass(
        self, micro_batches: list[Batch], *, train: bool, keep: bool = False
    ) -> StepSums[Tensor]:
        """Run the student as the base does; in training the intermediate losses join in."""
        if self.intermediate is None or not train:
            return super().student_pass(micro_batches, train=train, keep=keep)
        measure = partial(self._pass_with, self.intermediate, micro_batches, None)
        weight, scale = self.alpha.begin_step(measure), self.last_chunk.config.grad_scale_func
        if scale is not None:
            weight = scale(weight).reshape(())
        return self._pass_with(self.intermediate, micro_batches, weight)

    def _pass_with(
        self, losses: IntermediateLosses, micro_batches: list[Batch], weight: Tensor | None
    ) -> StepSums[Tensor]:
        """Run one pass with intermediate losses of this weight; None only measures them."""
        train = weight is not None
        with losses.attached(self.chunks, micro_batches, weight):
            sums = super().student_pass(micro_batches, train=train, keep=not train)
        self.alpha.update_alpha(sums, losses.reduced())
        return sums

    def configure_optimizers(self) -> list[MegatronOptimizerAdapter]:
        """Configure the optimizer; gradients of the projection's copies are summed up."""
        optimizers = super().configure_optimizers()
        if self.intermediate:
            self.intermediate.finalize_with(self.last_chunk.config)
        return optimizers

    def leave_out(self) -> None:
        """Put the weight of the intermediate losses back: the batch taught nothing."""
        self.alpha.put_back()

    def step_losses(self, sums: StepSums[float]) -> dict[str, float]:
        """Return what is logged: ``loss``, intermediate losses included, and all its parts."""
        losses = super().step_losses(sums)
        if self.intermediate is None:
            return losses
        tokens, alpha = max(sums.tokens, 1.0), self.alpha.used.item()
        parts = self.intermediate.per_token(tokens)
        loss = losses["loss"] + alpha * sum(parts.values())
        return {**losses, "loss": loss, "kd_loss": sums.kd / tokens, "alpha": alpha, **parts}

    def training_state(self, *, is_loading: bool) -> dict[str, Any]:
        """Extend the state of the base class by the weight of the intermediate losses."""
        state = super().training_state(is_loading=is_loading)
        if self.intermediate and not is_loading:
            state["intermediate"] = self.alpha.state_dict()
        return state

    def check_training_checkpoint(self, folder: Path) -> None:
        """Refuse a checkpoint without the projection that the intermediate losses train."""
        if self.intermediate:
            self.intermediate.check_checkpoint(folder)

    def load_learned(self, state: dict[str, Any]) -> None:
        """Load what the base class does, and the weight of the intermediate losses.

        Raises:
            ValueError: the checkpoint was written without intermediate losses.
        """
        super().load_learned(state)
        if self.intermediate is None:
            return
        if "intermediate" not in state:
            raise ValueError(
                f"the training checkpoint was written without {self.intermediate.keys}; "
                f"{START_AGAIN}"
            )
        self.alpha.load_state_dict(state["intermediate"])


class OfflineDistillationGPTModel(MinitronGPTModel):
    """A student that learns from stored teacher outputs; no teacher is built.

    Two more config entries: ``distillation``, and ``stored_temperature``, the softmax temperature
    of the stored normalisers.
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer | None = None) -> None:
        super().__init__(cfg=cfg, trainer=trainer)
        self.distillation = read_section(DistillationConfig, cfg.distillation)
        self.objective = StoredOutputs(cfg.stored_temperature)


class RemoteDistillationGPTModel(MinitronGPTModel):
    """A student whose teacher runs on ranks of its own; both sides connect when it is built.

    More config entries are those of ``DistillationGPTModel``.
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer | None = None) -> None:
        super().__init__(cfg=cfg, trainer=trainer)
        self.distillation = read_section(DistillationConfig, cfg.distillation)
        self.teacher_gpt = read_section(ModelConfig, cfg.teacher)
        teacher = read_section(TeacherParallelConfig, cfg.teacher_parallel).of(self.parallel)
        sides = Sides(self.groups.dp.size(), self.groups.cp.size(), teacher.data_parallel_size or 1)
        self.remote = RemoteTeacher(sides, self.groups, self.teacher_gpt)
        self.objective = self.remote

    def load_teacher(self, folder: Path) -> None:
        """Read the teacher's output layer, all of the teacher that these ranks hold."""
        rows = self.shard.rows if self.groups.is_last_stage else 0
        self.remote.load_output(folder, rows, self.dtype_)
