"""Megatron's DDP, optimizer and learning-rate schedule for a list of model chunks."""

import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import (
    MegatronOptimizer,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from nemo_minitron.config.megatron import MegatronConfig
from nemo_minitron.config.training import OptimConfig, TrainerConfig
from nemo_minitron.models.build import HiddenGPTModel
from nemo_minitron.models.overlap import connect, disconnect
from nemo_minitron.models.settings import ddp_config, optimizer_config
from nemo_minitron.runtime.groups import ParallelGroups


def wrap_ddp(
    chunks: list[HiddenGPTModel], optim: OptimConfig, megatron: MegatronConfig | None = None
) -> list[DistributedDataParallel]:
    """Wrap trainable chunks in Megatron's DDP (and its half-precision module under bf16).

    Args:
        chunks: this rank's part of the model.
        optim: says whether the optimizer is distributed.
        megatron: Megatron's own settings, or None for the defaults.
    """
    replicas = ParallelGroups.current().dp_cp.size()
    config = ddp_config(optim, megatron or MegatronConfig(), replicas)
    wrapped = []
    for index, chunk in enumerate(chunks):
        module = _half_precision(chunk) if chunk.config.bf16 else chunk
        wrapped.append(
            DistributedDataParallel(chunk.config, config, module, disable_bucketing=index > 0)
        )
    return wrapped


def _half_precision(chunk: HiddenGPTModel) -> Float16Module:
    """Wrap a chunk in Megatron's half-precision module, which leaves fp32 buffers as they are.

    It would round the bias by which a router picks experts. Megatron computes with that in fp32 and
    casts it back, too late for a model whose weights are loaded already.
    """
    whole = {n: buffer.data for n, buffer in chunk.named_buffers() if buffer.dtype == torch.float32}
    wrapped = Float16Module(chunk.config, chunk)
    for name, buffer in chunk.named_buffers():
        if name in whole:
            buffer.data = whole[name]
    return wrapped


def free_training(chunks: list[DistributedDataParallel]) -> None:
    """Undo, after training, what keeps weights, gradients and optimizer in memory for good.

    Autograd's nodes hold the gradient hooks and those the DDP; the DDP holds the nodes, and through
    the functions in its config the optimizer, whose shards hold nodes too. Python's garbage
    collector sees no cycle that leads through autograd.
    """
    disconnect(chunks)
    for chunk in chunks:
        chunk.grad_accs.clear()
        chunk.config.finalize_model_grads_func = None
        chunk.config.grad_scale_func = None


def build_optimizer(
    chunks: list[DistributedDataParallel],
    optim: OptimConfig,
    trainer: TrainerConfig,
    megatron: MegatronConfig | None = None,
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Adam and its schedule; one scheduler step per optimizer step.

    Weight decay leaves out norms and biases (Megatron's rule). Megatron reads the hooks it needs
    (gradient finalisation, loss scale, overlap) from the model config, so they are set here.
    """
    like = chunks[0].ddp_config, chunks[0].config
    config = optimizer_config(optim, trainer, megatron or MegatronConfig(), like)
    overrides = get_standard_config_overrides(config)
    optimizer = get_megatron_optimizer(config, chunks, config_overrides=overrides)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=optim.lr_warmup_steps,
        lr_decay_steps=trainer.max_steps,
        lr_decay_style=optim.lr_decay_style,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=trainer.max_steps,
        wd_incr_style="constant",
    )
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = finalize_model_grads
        chunk.config.grad_scale_func = optimizer.scale_loss
    connect(chunks)
    return optimizer, scheduler


def diverged(what: str, step: int) -> ValueError:
    """Make the error for a training that cannot go on."""
    return ValueError(
        f"training diverged: {what} at step {step}; lower optim.lr, raise optim.lr_warmup_steps or "
        "check data.path, and set overwrite=true to start again"
    )


class MegatronOptimizerAdapter(torch.optim.Optimizer):
    """Shows Megatron's optimizer to Lightning as a torch optimizer."""

    def __init__(self, optimizer: MegatronOptimizer) -> None:
        self.megatron = optimizer
        self.defaults: dict[str, Any] = {}
        self.grad_norm: float | None = None
        self.skip = False
        """Whether the next step changes nothing."""
        self.careful = False
        """Whether steps whose gradient norm is no number change nothing either."""
        self._optimizer_step_pre_hooks = {}
        self._optimizer_step_post_hooks = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]  # an attribute there
        """Megatron's parameter groups."""
        return self.megatron.param_groups

    @property
    def state(self) -> dict[str, Any]:  # type: ignore[override]  # an attribute there
        """Kept by Megatron; Lightning asks only to move it to a device."""
        return {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients (Megatron's buffers are cleared by its DDP)."""
        self.megatron.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clip and update; keeps the gradient norm. Lightning counts a skipped step too."""
        result = closure() if closure is not None else None
        if self.skip:
            self.grad_norm = 0.0
            return result
        if self.careful and not self._is_finite():
            return result
        success, self.grad_norm, _ = self.megatron.step()
        if not success:
            raise RuntimeError("the optimizer step failed: gradients hold inf or NaN")
        return result

    def _is_finite(self) -> bool:
        """Look at the gradient norm before the step, which computes it once more."""
        self.megatron.prepare_grads()
        self.grad_norm = float(self.megatron.get_grad_norm())
        return math.isfinite(self.grad_norm)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: ``MegatronStrategy.save_checkpoint`` saves the state sharded."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore nothing: see ``state_dict``."""
