"""A Megatron-Core GPT as a NeMo model."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from megatron.core.distributed import DistributedDataParallel
from nemo.core.classes import ModelPT
from nemo.core.classes.common import PretrainedModelInfo
from omegaconf import DictConfig
from torch import Tensor

from nemo_minitron.config.distillation import DistillationConfig
from nemo_minitron.config.load import read_section
from nemo_minitron.config.loggers import ExpManagerConfig
from nemo_minitron.config.megatron import MegatronConfig
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.phases import phases_of, samples_before
from nemo_minitron.config.training import DataConfig, OptimConfig, TrainerConfig
from nemo_minitron.distillation.logit_loss import TeacherStates
from nemo_minitron.distillation.top_k import TopKTargets
from nemo_minitron.distillation.vocab import VocabShard
from nemo_minitron.models.build import PRECISION_DTYPES, HiddenGPTModel, build_gpt, unwrap
from nemo_minitron.models.nemo_file import NemoFileConnector
from nemo_minitron.models.objective import (
    LabelsAlone,
    Objective,
    StepSums,
    add_up,
    losses_per_token,
    micro_batch_loss,
    on_host,
    reduced,
)
from nemo_minitron.models.optim import (
    MegatronOptimizerAdapter,
    build_optimizer,
    diverged,
    free_training,
    wrap_ddp,
)
from nemo_minitron.models.optim_state import load_optimizer, optimizer_state
from nemo_minitron.models.overlap import gather_all
from nemo_minitron.models.schedule import (
    Batch,
    StepLoader,
    on_this_cp_rank,
    run_schedule,
)
from nemo_minitron.models.settings import trained_settings
from nemo_minitron.models.spikes import Spikes
from nemo_minitron.models.weights import (
    load_weights,
    model_sharded_state_dict,
    nonfinite_parameter,
    save_model,
)
from nemo_minitron.runtime.extensions import nemo_imported
from nemo_minitron.runtime.groups import ParallelGroups
from nemo_minitron.runtime.launch import device

nemo_imported()


class MinitronGPTModel(ModelPT):
    """Megatron-Core GPT trained through Megatron's schedule by Lightning's Trainer.

    The config has one entry per dataclass: ``gpt`` (ModelConfig), ``parallel``, ``data``,
    ``trainer``, ``optim``, ``exp_manager`` and ``megatron`` (both optional), ``chunk_size`` (tokens
    whose logits exist at one time) and ``tokenizer`` (optional; paths of its files, which go into
    ``.nemo`` archives).
    Megatron's groups must be initialised (``runtime.launch.distributed``).
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer | None = None) -> None:
        super().__init__(cfg=cfg, trainer=trainer)
        self.automatic_optimization = False
        self.gpt = read_section(ModelConfig, cfg.gpt)
        self.parallel = read_section(ParallelConfig, cfg.parallel)
        self.data_cfg = read_section(DataConfig, cfg.data)
        self.trainer_cfg = read_section(TrainerConfig, cfg.trainer)
        self.phases = phases_of(self.data_cfg, self.trainer_cfg)
        self.optim_cfg = read_section(OptimConfig, cfg.optim)
        self.exp_manager_cfg = read_section(ExpManagerConfig, cfg.get("exp_manager", {}))
        self.megatron_cfg = read_section(MegatronConfig, cfg.get("megatron", {}))
        # Subclasses have a teacher and weights of their own.
        self.objective: Objective = LabelsAlone()
        self.distillation = DistillationConfig(
            kd_weight=0.0, ce_weight=1.0, chunk_size=cfg.chunk_size
        )
        self.groups = ParallelGroups.current()
        self.dtype_ = PRECISION_DTYPES[self.trainer_cfg.precision]
        settings = trained_settings(self.trainer_cfg, self.megatron_cfg)
        chunks = build_gpt(
            self.gpt, self.parallel, self.groups, dtype=self.dtype_, settings=settings
        )
        self.model = torch.nn.ModuleList(chunk.to(device()) for chunk in chunks)
        for chunk in self.chunks:
            chunk.return_hidden = True
        self.consumed_samples = 0
        self.last_metrics: dict[str, float] = {}
        self.spikes = Spikes(self.trainer_cfg.skip_loss_above, self.trainer_cfg.rewind_steps > 0)
        # Target tokens since the last logged step; fp64 counts beyond 2**24 exactly.
        self.unlogged = torch.zeros((), dtype=torch.float64, device=device())
        self._validation_sums: list[StepSums[Tensor]] = []
        for key, path in dict(cfg.get("tokenizer") or {}).items():
            self.register_artifact(f"tokenizer.{key}", path)

    # ---- weights

    @property
    def chunks(self) -> list[HiddenGPTModel]:
        """This rank's GPT modules without wrappers, one per virtual stage."""
        return [unwrap(module) for module in self.model]

    @property
    def last_chunk(self) -> HiddenGPTModel:
        """The chunk that holds the output layer on the last stage."""
        return self.chunks[-1]

    @property
    def shard(self) -> VocabShard:
        """Vocabulary rows of this rank (last stage only)."""
        rows = self.last_chunk.output_weight().size(0)
        return VocabShard(self.groups.tp, self.gpt.vocab_size, rows)

    def load(self, folder: Path, key: str = "checkpoint") -> None:
        """Fill the model from a ``torch_dist`` checkpoint that config key ``key`` names."""
        load_weights(self.chunks, self.groups, folder, key=key)

    def save(self, folder: Path) -> None:
        """Write a ``torch_dist`` checkpoint and ``model.yaml`` (collective).

        Raises:
            ValueError: training ended with NaN or infinite weights.
        """
        if bad := nonfinite_parameter(self.chunks):
            raise diverged(f"{bad} is not finite", self.trainer_cfg.max_steps)
        save_model(self.chunks, self.groups, self.gpt, folder)

    def save_to(self, save_path: str) -> None:
        """Write a ``.nemo`` archive: weights, config and tokenizer files (a call of every rank).

        Raises:
            ValueError: the weights are not finite.
        """
        NemoFileConnector().save_to(self, str(Path(save_path).expanduser().resolve()))

    @classmethod
    def restore_from(cls, restore_path: str, *args: object, **kwargs: object) -> Any:
        """Rebuild a model from a ``.nemo`` archive of any layout (a call of every rank).

        Arguments are those of ``NemoFileConnector.restore_from``.
        """
        kwargs.setdefault("save_restore_connector", NemoFileConnector())
        return super().restore_from(restore_path, *args, **kwargs)

    # ---- data

    def setup_training_data(self, train_data_config: object) -> None:
        """Do nothing at construction: stages give loaders through ``set_loaders``."""

    def setup_validation_data(self, val_data_config: object) -> None:
        """Do nothing at construction: stages give loaders through ``set_loaders``."""

    def set_loaders(self, train: Iterable[Batch], validation: Iterable[Batch] | None) -> None:
        """Attach loaders of micro-batches (``data.sampler.build_dataloader``)."""
        data, replicas = self.data_cfg, self.groups.dp.size()
        count = data.global_batch_size // (data.micro_batch_size * replicas)
        held_out = None if validation is None else StepLoader(validation, count)
        self.set_step_loaders(StepLoader(train, count), held_out)

    def set_step_loaders(
        self, train: Iterable[list[Batch]], validation: Iterable[list[Batch]] | None
    ) -> None:
        """Attach loaders of this rank's part of global batches, of one phase or of several."""
        self._train_dl, self._validation_dl = train, validation

    # ---- optimisation

    def configure_optimizers(self) -> list[MegatronOptimizerAdapter]:
        """Wrap the chunks in Megatron's DDP and build its optimizer and schedule."""
        self.model = torch.nn.ModuleList(wrap_ddp(self.chunks, self.optim_cfg, self.megatron_cfg))
        self._megatron, self._lr_scheduler = build_optimizer(
            list(self.model), self.optim_cfg, self.trainer_cfg, self.megatron_cfg
        )
        self._optimizer = MegatronOptimizerAdapter(self._megatron)
        return [self._optimizer]

    def on_fit_end(self) -> None:
        """Free what training held: it is over."""
        super().on_fit_end()
        free_training(list(self.model))

    def training_state(self, *, is_loading: bool) -> dict[str, Any]:
        """Sharded weights, optimizer and scheduler state for ``dist_checkpointing``."""
        gather_all(list(self.model))
        model = model_sharded_state_dict(self.chunks, self.groups)
        flat = model["model0"] if len(model) == 1 else model
        optimizer = optimizer_state(self._megatron, flat, self.groups, is_loading=is_loading)
        state: dict[str, Any] = {**model, "optimizer": optimizer}
        if not is_loading:
            state["lr_scheduler"] = self._lr_scheduler.state_dict()
            state["consumed_samples"] = self.consumed_samples
            state["unlogged_tokens"] = self.unlogged.item()
            state["spikes"] = self.spikes.state_dict()
        return state

    def check_training_checkpoint(self, folder: Path) -> None:
        """Refuse a training checkpoint that lacks what this model trains; none does here."""

    def load_learned(self, state: dict[str, Any]) -> None:
        """Restore weights and optimizer of what ``training_state`` saved, not how far it was."""
        for index, chunk in enumerate(self.chunks):
            chunk.load_state_dict(state[f"model{index}"], strict=False)
        load_optimizer(self._megatron, state["optimizer"])

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Restore what ``training_state`` saved."""
        self.load_learned(state)
        self._lr_scheduler.load_state_dict(state["lr_scheduler"])
        self.consumed_samples = state["consumed_samples"]
        self.unlogged.fill_(state["unlogged_tokens"])
        self.spikes.load_state_dict(state.get("spikes", {}))

    # ---- steps

    def loss(
        self, batch: Batch, hidden: Tensor, teacher: TeacherStates | TopKTargets | None
    ) -> tuple[Tensor, StepSums[Tensor]]:
        """Return the summed loss of a micro-batch, and its parts (last stage)."""
        model: torch.nn.Module = self.model[-1]
        return micro_batch_loss(model, batch, hidden, teacher, self.distillation, self.shard)

    def forward_backward(self, micro_batches: list[Batch]) -> StepSums[Tensor]:
        """Run one global batch forward and backward; gradients stay in Megatron's buffers."""
        self.objective.prepare(micro_batches, train=True)
        return self.student_pass(micro_batches, train=True)

    def evaluate_batch(self, micro_batches: list[Batch]) -> StepSums[Tensor]:
        """Run one global batch forward only, and return its sums."""
        self.objective.prepare(micro_batches, train=False)
        return self.student_pass(micro_batches, train=False)

    def student_pass(
        self, micro_batches: list[Batch], *, train: bool, keep: bool = False
    ) -> StepSums[Tensor]:
        """Run the trained model over a global batch through Megatron's schedule.

        Args:
            micro_batches: this rank's part of the batch.
            train: whether to run the backward too.
            keep: whether the objective's targets are needed for another pass.
        """

        def loss_func(
            index: int, batch: Batch, hidden: Tensor
        ) -> tuple[Tensor, Tensor, StepSums[Tensor]] | StepSums[Tensor]:
            teacher = self.objective.targets(index, batch, keep=keep)
            total, sums = self.loss(batch, hidden, teacher)
            return (total, batch["loss_mask"].sum().int(), sums) if train else sums

        with torch.set_grad_enabled(train):
            parts = run_schedule(
                list(self.model),
                micro_batches,
                loss_func,
                forward_only=not train,
                collect_outputs=not train,
            )
        return reduced(parts, self.groups)

    def _on_this_rank(self, batch: list[Batch]) -> list[Batch]:
        return [on_this_cp_rank(micro_batch, self.groups) for micro_batch in batch]

    def training_step(self, batch: list[Batch], batch_idx: int) -> None:
        """Take an optimizer step over a global batch (this rank's micro-batches).

        A batch without a target token counts as a step with loss 0 that changes neither weights
        nor optimizer state; the learning-rate schedule goes on. A spike changes as little.
        """
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        for chunk in self.model:
            assert isinstance(chunk, DistributedDataParallel)
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        sums = self.forward_backward(self._on_this_rank(batch))
        self.unlogged += sums.tokens
        lr = next(g["lr"] for g in self._megatron.param_groups if g["params"] is not None)
        step = self.trainer.global_step + 1
        # Here the host waits for the device, once per global batch; Megatron's optimizer does so
        # once more for the gradient norm.
        values = on_host(sums)  # the same on every rank
        counts = all(map(math.isfinite, values))
        loss = losses_per_token(values, self.distillation)["loss"] if counts else math.nan
        # No target token: Adam's moments and the weight decay would still move the weights.
        self._optimizer.skip = values.tokens == 0 or self.spikes.is_one(loss, step)
        self._optimizer.careful = self.spikes.factor > 0
        optimizer.step()
        self._lr_scheduler.step(increment=1)
        self.consumed_samples = sum(samples_before(self.phases, step))
        grad_norm = self._optimizer.grad_norm
        if not self._optimizer.skip:
            self.spikes.look_at(grad_norm, step)
        if self._optimizer.skip or self.spikes.in_a_row:
            self.leave_out()
        due = step == self.trainer_cfg.max_steps or step % self.trainer_cfg.log_every_n_steps == 0
        if due and counts:  # of a step without a number there is nothing to log
            self._log_step(values, lr, grad_norm)

    def leave_out(self) -> None:
        """Put back what a left-out step changed; here there is nothing to put back."""

    def step_losses(self, sums: StepSums[float]) -> dict[str, float]:
        """Return losses per token of a step: ``loss`` is what was trained on, its parts follow."""
        return losses_per_token(sums, self.distillation)

    def _log_step(self, sums: StepSums[float], lr: float, grad_norm: float | None) -> None:
        """Log a step; ``tokens`` are those since the last logged one."""
        metrics = self.step_losses(sums) | self.spikes.figures()
        metrics |= {"lr": lr, "grad_norm": float(grad_norm or 0.0), "tokens": self.unlogged.item()}
        self.unlogged.zero_()
        self.last_metrics = metrics
        for name, value in metrics.items():
            self.log(f"train/{name}", value, prog_bar=name == "loss", batch_size=1)

    def validation_step(self, batch: list[Batch], batch_idx: int) -> None:
        """Collect the sums of one global batch."""
        self._validation_sums.append(self.evaluate_batch(self._on_this_rank(batch)))

    def on_validation_epoch_end(self) -> None:
        """Log the losses per token."""
        if not self._validation_sums:
            return
        kd, ce, tokens, _ = on_host(add_up(self._validation_sums))
        self._validation_sums.clear()
        self.log("val_loss", ce / max(tokens, 1.0), prog_bar=True, batch_size=1)
        if self.distillation.kd_weight:
            self.log("val_kd_loss", kd / max(tokens, 1.0), batch_size=1)

    @classmethod
    def list_available_models(cls) -> list[PretrainedModelInfo]:
        """Return nothing: models come from ``minitron import``."""
        return []
