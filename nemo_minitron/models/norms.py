"""Norms that Transformer Engine fuses into the linear layer that reads them."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor


def normed_input(linear: Any, x: Tensor) -> Tensor:
    """What Transformer Engine's fused norm + linear layer feeds its matrix.

    Args:
        linear: a module with ``layer_norm_weight`` (and ``layer_norm_bias``) and Megatron's config.
        x: ``[s, b, h]`` input of the module.

    Returns:
        ``[s, b, h]``, dtype of ``x``.
    """
    config = linear.config
    weight, bias = linear.layer_norm_weight, getattr(linear, "layer_norm_bias", None)
    if config.layernorm_zero_centered_gamma:
        weight = weight + 1
    shape, eps = (x.size(-1),), config.layernorm_epsilon
    if config.normalization == "RMSNorm":
        return F.rms_norm(x, shape, weight, eps)
    return F.layer_norm(x, shape, weight, bias, eps)
