"""The activation of an MLP or expert in the words of Megatron's configuration."""

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from megatron.core.activations import quick_gelu, squared_relu
from torch import Tensor

from nemo_minitron.config.model import ModelConfig

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "squared_relu": squared_relu,
}


def activation_fields(config: ModelConfig) -> dict[str, Any]:
    """Fields of ``TransformerConfig``: the function, and what is done around a gate."""
    return {
        "gated_linear_unit": config.gated_linear_unit,
        "activation_func": _ACTIVATIONS[config.activation],
        "activation_func_clamp_value": config.activation_func_clamp_value,
        "glu_linear_offset": config.glu_linear_offset,
    }
