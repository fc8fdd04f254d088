"""Whether the section ``megatron:`` works with this model, layout and machine.

Megatron's dataclasses check how their fields depend on each other when they are made. They are made
here once, before any process group exists, for nothing but their messages.
"""

from collections.abc import Callable
from typing import Any

import torch

from nemo_minitron.config.megatron import (
    GROUP,
    ForwardMegatronConfig,
    MegatronConfig,
    given_keys,
)
from nemo_minitron.config.megatron_owned import NEEDS_TE, NEEDS_TE_PREFIXES
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.training import OptimConfig, TrainerConfig
from nemo_minitron.models.build import PRECISION_DTYPES, transformer_config
from nemo_minitron.models.settings import (
    ddp_config,
    frozen_settings,
    optimizer_config,
    trained_settings,
)
from nemo_minitron.models.spec import HAVE_TE


def check_machine(megatron: ForwardMegatronConfig, parallel: ParallelConfig) -> None:
    """Refuse settings that nothing on this machine, or in this layout, would read.

    Raises:
        ValueError: names the key and what it needs.
    """
    given = megatron.transformer
    for name, value in given.items():
        if not HAVE_TE and (name in NEEDS_TE or name.startswith(NEEDS_TE_PREFIXES)) and value:
            raise ValueError(
                f"megatron.transformer.{name}={value} needs Transformer Engine, which is not "
                "installed here or has no GPU; leave it out, or run where it is"
            )
    dispatcher = given.get("moe_token_dispatcher_type", "allgather")
    if dispatcher != "allgather" and not torch.cuda.is_available():
        raise ValueError(
            f"megatron.transformer.moe_token_dispatcher_type={dispatcher} needs a GPU; use "
            "allgather, or leave it out"
        )
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    for name in ("overlap_p2p_comm", GROUP):
        if given.get(name) and not interleaved:
            raise ValueError(
                f"megatron.transformer.{name}={given[name]} is for the interleaved schedule; set "
                "parallel.virtual_pipeline_model_parallel_size, or leave it out"
            )
    if given.get("overlap_p2p_comm") and given.get("batch_p2p_comm"):
        raise ValueError(
            "megatron.transformer.overlap_p2p_comm=true and batch_p2p_comm=true exclude each "
            "other; leave batch_p2p_comm out"
        )
    if isinstance(megatron, MegatronConfig):
        _check_adam(megatron)


def _check_adam(megatron: MegatronConfig) -> None:
    if megatron.optimizer.get("use_precision_aware_optimizer") and not HAVE_TE:
        raise ValueError(
            "megatron.optimizer.use_precision_aware_optimizer=true needs Transformer Engine's "
            "Adam, which is not installed here or has no GPU; leave it out, or run where it is"
        )


def check_with_megatron(
    megatron: ForwardMegatronConfig,
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: str,
) -> None:
    """Let Megatron check the settings of a model that is only run.

    Raises:
        ValueError: Megatron's own message, and the keys that are given.
    """
    check_machine(megatron, parallel)
    dtype = PRECISION_DTYPES[precision]
    settings = frozen_settings(megatron)
    _made(megatron, transformer_config, model, parallel, dtype, settings)


def check_training_with_megatron(
    megatron: MegatronConfig,
    model: ModelConfig,
    parallel: ParallelConfig,
    trainer: TrainerConfig,
    optim: OptimConfig,
) -> None:
    """Let Megatron check the settings of a model that is trained.

    Raises:
        ValueError: Megatron's own message, and the keys that are given.
    """
    check_machine(megatron, parallel)
    dtype = PRECISION_DTYPES[trainer.precision]
    settings = trained_settings(trainer, megatron)
    made = _made(megatron, transformer_config, model, parallel, dtype, settings)
    ddp = _made(megatron, ddp_config, optim, megatron, 1)
    _made(megatron, optimizer_config, optim, trainer, megatron, (ddp, made))


def _made(megatron: ForwardMegatronConfig, make: Callable[..., Any], *args: object) -> Any:
    """Call ``make``; turn an error of Megatron into a ``ValueError`` that names the keys."""
    try:
        return make(*args)
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:
        keys = " ".join(f"{key}={value}" for key, value in given_keys(megatron))
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"Megatron refuses {keys}: {reason}") from error
