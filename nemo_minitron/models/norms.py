"""Norms that Transformer Engine fuses into the linear layer that reads them."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear


def normed_input(linear: "TELayerNormColumnParallelLinear", x: Tensor) -> Tensor:
    """Return the normed input of Transformer Engine's fused norm + linear layer.

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


def final_norm(chunk: Any) -> nn.Module | None:
    """Return the norm before the output layer, None on other stages than the last."""
    decoder = chunk.decoder
    found: nn.Module | None = getattr(decoder, "final_norm", None)  # of a hybrid model
    return getattr(decoder, "final_layernorm", None) if found is None else found


def norms_and_readers(block: Any) -> list[tuple[nn.Module, nn.Module | None]]:
    """Return the norms of a layer with the modules that read them, for GPT and hybrid layers.

    Returns:
        The module that makes it, and the linear layer that reads it or None if several do. The
        module is an identity where the norm is fused into the reader, and in a family without norms
        there (OLMo-2), whose layers read the residual stream itself.
    """
    if hasattr(block, "mixer"):
        return [(block.norm, block.mixer.in_proj)]
    found: list[tuple[nn.Module, nn.Module | None]] = []
    if not isinstance(block.self_attention, IdentityOp):
        # Multi-latent attention reads the norm with two linear layers.
        readers = (getattr(block.self_attention, n, None) for n in ("linear_qkv", "in_proj"))
        reader = next(filter(None, readers), None)
        found.append((block.input_layernorm, reader))
    if not isinstance(block.mlp, IdentityOp):
        found.append((block.pre_mlp_layernorm, getattr(block.mlp, "linear_fc1", None)))
    return found


def on_normed(
    norm: nn.Module,
    linear: "TELayerNormColumnParallelLinear | None",
    share: Callable[[Tensor], Tensor],
    observe: Callable[[Tensor], None],
) -> RemovableHandle:
    """Hook the output of a norm, whether a module of its own or fused into a linear layer.

    Args:
        norm: the module (an identity where it is fused).
        linear: what reads the norm; None where that is not one linear layer.
        share: applied to ``[s, b, h]`` states before they are observed.
        observe: called with the share of every output.
    """
    if linear is not None and getattr(linear, "layer_norm_weight", None) is not None:

        def on_fused(module: nn.Module, args: tuple[Any, ...]) -> None:
            observe(normed_input(module, share(args[0])))

        return linear.register_forward_pre_hook(on_fused)

    def on_output(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        observe(share(output))

    return norm.register_forward_hook(on_output)
