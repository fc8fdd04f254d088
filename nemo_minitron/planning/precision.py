"""Bytes of a parameter by what is stored of it: weight, gradient, Adam's state.

Where the section ``megatron:`` changes them: reduced-precision gradients and moments, and weights
in fp8 (Transformer Engine).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_minitron.config.megatron import ForwardMegatronConfig, MegatronConfig
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.planning.shares import Share

_BYTES = {"float16": 2, "fp16": 2, "bfloat16": 2, "bf16": 2, "fp8": 1}


def fp8(megatron: ForwardMegatronConfig) -> bool:
    """Whether matrix products are in fp8."""
    return megatron.transformer.get("fp8") is not None


def weight_bytes(
    model: ModelConfig,
    share: Share,
    megatron: ForwardMegatronConfig,
    element: int,
    *,
    trained: bool,
) -> float:
    """Return the bytes of the weights of a rank.

    In fp8 the matrices of the layers have copies in fp8, for the forward pass and transposed for
    the backward pass, beside the weights or (``fp8_param``) in their place.

    Args:
        model: whose weights they are.
        share: parameters of the rank.
        megatron: settings of the stage.
        element: bytes of a weight that is not in fp8.
        trained: whether there is a backward pass.
    """
    whole = float(share.total * element)
    if not fp8(megatron):
        return whole
    tied = model.share_embeddings_and_output_weights and share.embedding > 0
    outer = share.embedding + (0 if tied else share.output)
    copies = 2 if trained else 1
    matrices = share.total - outer
    if megatron.transformer.get("fp8_param"):
        return whole + matrices * (copies - element)
    # A forward pass alone makes a layer's copy when it comes to the layer.
    return whole + (matrices * copies if trained else 0)


@dataclass(frozen=True)
class TrainedBytes:
    """Bytes of a trained parameter beside its weight.

    Attributes:
        gradient: in Megatron's buffer, on every replica.
        optimizer: Adam's moments, the main weight and its gradient where those are copies; split
            over the replicas by the distributed optimizer.
    """

    gradient: int
    optimizer: int

    @classmethod
    def of(cls, megatron: MegatronConfig, *, bf16: bool) -> "TrainedBytes":
        """Return what Megatron's optimizer keeps for weights in bf16 or fp32."""
        if not bf16:
            return cls(gradient=4, optimizer=8)
        given: dict[str, Any] = megatron.optimizer
        gradient = 4 if megatron.ddp.get("grad_reduce_in_fp32", True) else 2
        if not given.get("use_precision_aware_optimizer"):
            copy = 0 if gradient == 4 else 4  # Adam wants it in fp32
            return cls(gradient, optimizer=4 + 8 + copy)
        moments = _bytes(given, "exp_avg_dtype") + _bytes(given, "exp_avg_sq_dtype")
        main = _bytes(given, "main_params_dtype")
        if main == 4 and given.get("store_param_remainders", True):
            main = 2  # what bf16 lacks of fp32
        return cls(gradient, optimizer=main + moments)


def _bytes(given: Mapping[str, Any], key: str) -> int:
    """Return the bytes of the dtype that ``key`` names; fp32 if the key is left out."""
    return _BYTES.get(str(given.get(key)), 4)
