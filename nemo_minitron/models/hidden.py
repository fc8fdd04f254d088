"""What a model of this package is beside a model of Megatron-Core, GPT or hybrid."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor


class HiddenModel:
    """What a model of this package is beside a model of Megatron-Core.

    Its last stage can stop before the output layer: the losses and the calibration of this package
    start from the final hidden state, so that the full ``[s, b, v]`` logits never exist.
    """

    return_hidden: bool = False
    settings: Mapping[str, Any] = MappingProxyType({})
    """What ``build_gpt`` was given, for a smaller model of the same kind."""

    def output_weight(self: Any) -> Tensor:
        """Local ``[v / tp, h]`` weight of the output layer (last stage only)."""
        weight: Tensor
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        else:
            weight = self.output_layer.weight
        return weight
