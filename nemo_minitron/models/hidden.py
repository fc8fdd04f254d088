"""Additions of this package to Megatron-Core's GPT and hybrid models."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from nemo_minitron.config.model import ModelConfig
    from nemo_minitron.config.parallel import ParallelConfig


class HiddenModel:
    """Additions of this package to a model of Megatron-Core.

    Its last stage can stop before the output layer: the losses and the calibration of this package
    start from the final hidden state, so that the full ``[s, b, v]`` logits never exist.
    """

    return_hidden: bool = False
    settings: Mapping[str, Any] = MappingProxyType({})
    """What ``build_gpt`` was given, for a smaller model of the same kind."""
    built_from: "tuple[ModelConfig, ParallelConfig] | None" = None
    """Sizes and layout that ``build_gpt`` was given."""

    @property
    def logit_cap(self: Any) -> float | None:
        """Return the soft cap of the logits (``final_logit_softcapping``), or None."""
        return logit_cap(self)

    def output_weight(self: Any) -> Tensor:
        """Return the local ``[v / tp, h]`` weight of the output layer (last stage only)."""
        return output_weight(self)


def output_weight(chunk: Any) -> Tensor:
    """Return a Megatron model's local ``[v / tp, h]`` weight of the output layer (last stage)."""
    weight: Tensor
    if chunk.share_embeddings_and_output_weights:
        weight = chunk.shared_embedding_or_output_weight()
    else:
        weight = chunk.output_layer.weight
    return weight


def logit_cap(chunk: Any) -> float | None:
    """Return the soft cap of the logits; None without one and for models of other programs."""
    cap: float | None = getattr(chunk.config, "final_logit_softcapping", None)
    return cap


@contextmanager
def stopping_early(chunk: Any) -> Iterator[None]:
    """Provide a context in which forward passes with ``return_hidden`` skip the output layer.

    A model of Megatron-Core returns the hidden state wherever it is told to have no output layer.
    """
    plain = getattr(chunk, "return_hidden", False) and not isinstance(chunk, HiddenModel)
    before = chunk.post_process
    chunk.post_process = before and not plain
    try:
        yield
    finally:
        chunk.post_process = before
