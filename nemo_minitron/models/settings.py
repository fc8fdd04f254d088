"""Megatron's settings for a model: what this package decides, good defaults, and the user's own.

The user's win over the defaults; what this package decides cannot be given (``config/megatron``).
"""

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.tensor_parallel import layers as megatron_layers
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_minitron.config.layout import recompute_settings
from nemo_minitron.config.megatron import ForwardMegatronConfig, MegatronConfig, merged_recompute
from nemo_minitron.config.megatron_owned import TRAINING_ONLY
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.training import OptimConfig, TrainerConfig
from nemo_minitron.runtime.megatron_fields import resolved

Settings = dict[str, Any]


def trained_settings(trainer: TrainerConfig, megatron: MegatronConfig) -> Settings:
    """Return fields of ``TransformerConfig`` for a model that is trained.

    Args:
        trainer: may ask for recomputation too.
        megatron: the section of the stage.
    """
    fused = {"gradient_accumulation_fusion": _gradient_kernel()}
    recompute = recompute_settings(merged_recompute(trainer, megatron))
    return {**fused, **resolved("transformer", megatron.transformer), **recompute}


def frozen_settings(megatron: ForwardMegatronConfig) -> Settings:
    """Fields of ``TransformerConfig`` for a model that only runs: precision, kernels, layers.

    A teacher gets those of its student, less what is about the backward pass.
    """
    given = {k: v for k, v in megatron.transformer.items() if k not in TRAINING_ONLY}
    return resolved("transformer", given)


def _gradient_kernel() -> bool:
    """Whether the kernel that adds weight gradients to Megatron's buffer is installed."""
    return torch.cuda.is_available() and bool(megatron_layers._grad_accum_fusion_available)


def transformer_defaults(
    config: ModelConfig,
    *,
    on_gpu: bool,
    have_te: bool,
    have_grouped_gemm: bool = False,
    overlap_p2p: bool = False,
) -> Settings:
    """Return fields of ``TransformerConfig`` that are chosen here unless the user says otherwise.

    Args:
        config: global sizes.
        on_gpu: whether ranks have GPUs.
        have_te: whether layers are Transformer Engine's, which choose their attention kernel
            themselves (``attention_backend``).
        have_grouped_gemm: whether one kernel can multiply the matrices of all experts of a rank.
        overlap_p2p: whether stages exchange beside computation, for which Megatron takes messages
            one by one.
    """
    return {
        "moe_grouped_gemm": have_grouped_gemm and config.num_moe_experts is not None,
        # The other dispatchers need CUDA: alltoall passes what gloo does not take.
        "moe_token_dispatcher_type": "alltoall" if on_gpu else "allgather",
        "apply_rope_fusion": have_te,
        # Megatron has no such kernel for the other activations, and a tanh one for "gelu".
        "bias_activation_fusion": config.swiglu,
        "bias_dropout_fusion": on_gpu,
        "persist_layer_norm": have_te,
        "batch_p2p_comm": on_gpu and not overlap_p2p,
        # Megatron would wait for the device at every exchange between stages, for the sake of
        # versions of torch that are older than any this package takes.
        "batch_p2p_sync": False,
    }


def ddp_defaults(*, on_gpu: bool, replicas: int, distributed_optimizer: bool) -> Settings:
    """Return fields of ``DistributedDataParallelConfig`` that are chosen here unless the user does.

    Args:
        on_gpu: where communication runs beside computation.
        replicas: ranks that a parameter's gradient is summed over.
        distributed_optimizer: whether weights are gathered after a step.
    """
    overlap = on_gpu and replicas > 1
    return {
        "grad_reduce_in_fp32": True,
        "overlap_grad_reduce": overlap,
        "overlap_param_gather": overlap and distributed_optimizer,
    }


def ddp_config(
    optim: OptimConfig, megatron: MegatronConfig, replicas: int
) -> DistributedDataParallelConfig:
    """Return Megatron's settings of the gradient buffers.

    Args:
        optim: says whether the optimizer is distributed.
        megatron: the section of the stage.
        replicas: ranks that a parameter's gradient is summed over.
    """
    sharded = optim.use_distributed_optimizer
    on_gpu = torch.cuda.is_available()
    defaults = ddp_defaults(on_gpu=on_gpu, replicas=replicas, distributed_optimizer=sharded)
    given = resolved("ddp", megatron.ddp)
    if given.get("overlap_grad_reduce") is False:
        defaults["overlap_param_gather"] = False
    if given.get("overlap_param_gather"):
        defaults["overlap_grad_reduce"] = True
    weights = {
        f"{kind}_param_gather": megatron.transformer[f"{kind}_param"]
        for kind in ("fp8", "fp4")
        if megatron.transformer.get(f"{kind}_param")
    }
    return DistributedDataParallelConfig(
        use_distributed_optimizer=sharded,
        **weights,
        **{"check_for_nan_in_grad": False, **defaults, **given},
    )


def optimizer_config(
    optim: OptimConfig,
    trainer: TrainerConfig,
    megatron: MegatronConfig,
    like: tuple[DistributedDataParallelConfig, TransformerConfig],
) -> OptimizerConfig:
    """Return Megatron's settings of Adam.

    Args:
        optim: learning rate and its relatives.
        trainer: precision and clipping.
        megatron: the section of the stage.
        like: Megatron's configuration of the model's gradient buffers and of the model, whose
            dtype, overlap and recipe the optimizer shares: ``(ddp, transformer)``.
    """
    ddp, transformer = like
    recipe = {"fp8_recipe": transformer.fp8_recipe} if transformer.fp8 else {}
    return OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_eps=optim.adam_eps,
        bf16=trainer.precision == "bf16-mixed",
        params_dtype=transformer.params_dtype,
        clip_grad=trainer.gradient_clip_val,
        use_distributed_optimizer=optim.use_distributed_optimizer,
        overlap_param_gather=ddp.overlap_param_gather,
        **recipe,
        **resolved("optimizer", megatron.optimizer),
    )
