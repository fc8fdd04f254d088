"""Megatron's DDP, optimizer and learning-rate schedule for a list of model chunks."""

from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from nemo_minitron.config.training import OptimConfig, TrainerConfig
from nemo_minitron.models.build import HiddenGPTModel


def wrap_ddp(chunks: list[HiddenGPTModel], optim: OptimConfig) -> list[DistributedDataParallel]:
    """Wrap trainable chunks in Megatron's DDP (and its half-precision module under bf16)."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=optim.use_distributed_optimizer,
        check_for_nan_in_grad=False,
    )
    wrapped = []
    for index, chunk in enumerate(chunks):
        module = Float16Module(chunk.config, chunk) if chunk.config.bf16 else chunk
        wrapped.append(
            DistributedDataParallel(chunk.config, config, module, disable_bucketing=index > 0)
        )
    return wrapped


def build_optimizer(
    chunks: list[DistributedDataParallel], optim: OptimConfig, trainer: TrainerConfig
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Adam and its schedule; one scheduler step per optimizer step.

    Weight decay leaves out norms and biases (Megatron's rule). Megatron reads the hooks it needs
    (gradient finalisation, loss scale) from the model config, so they are set here.
    """
    bf16 = trainer.precision == "bf16-mixed"
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_eps=optim.adam_eps,
        bf16=bf16,
        params_dtype=chunks[0].config.params_dtype,
        clip_grad=trainer.gradient_clip_val,
        use_distributed_optimizer=optim.use_distributed_optimizer,
    )
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
    return optimizer, scheduler


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _torch_adam(part: Any) -> Any | None:
    """The inner torch Adam of an optimizer, None where Apex or Transformer Engine gives one."""
    inner = part.optimizer
    return inner if isinstance(inner, torch.optim.Adam | torch.optim.AdamW) else None


def allocate_state(optimizer: MegatronOptimizer) -> None:
    """Give every parameter zero Adam moments, so that a checkpoint has somewhere to go.

    Megatron's distributed optimizer does this itself for the Apex and Transformer Engine Adams;
    with torch's Adam it asserts that a step was taken.
    """
    for part in _parts(optimizer):
        inner: Any = _torch_adam(part)
        for group in inner.param_groups if inner is not None else []:
            for parameter in group["params"]:
                if not inner.state[parameter]:
                    inner.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


def load_optimizer(optimizer: MegatronOptimizer, state: dict[Any, Any]) -> None:
    """Restore what ``optimizer.sharded_state_dict`` saved.

    With torch's Adam, Megatron's ``fully_reshardable`` loader expects the step count among the
    sharded tensors although its own writer leaves it out; the count is set aside meanwhile.
    """
    parts = _parts(optimizer)
    states = [state] if len(parts) == 1 else [state[index] for index in range(len(parts))]
    for part, part_state in zip(parts, states, strict=True):
        inner = _torch_adam(part)
        sharded = part_state.get("param_state") if inner is not None else None
        if not isinstance(part, DistributedOptimizer) or inner is None or sharded is None:
            part.load_state_dict(part_state)
            continue
        part.load_state_dict({k: v for k, v in part_state.items() if k != "param_state"})
        steps = {parameter: values.pop("step") for parameter, values in inner.state.items()}
        part.load_parameter_state_from_fully_reshardable(sharded)
        for parameter, step in steps.items():
            # One tensor each: Megatron hands all of them the same one, which torch's Adam would
            # then count up once per parameter.
            inner.state[parameter]["step"] = step.clone()
