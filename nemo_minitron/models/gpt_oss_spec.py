"""Layers of gpt-oss: the biases of experts at every tensor parallel size.

The modules are the local ones, also where Transformer Engine is installed: its grouped products
have no place for the biases of experts that several ranks share.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_minitron.models.spec import local_block
from nemo_minitron.runtime.megatron import mlp_submodules


class _Share(torch.autograd.Function):
    """One of equal shares that are added up later; the gradient is that of the whole.

    Every rank sees the gradient of the sum of all shares, so what reaches its own share is already
    the gradient of the bias, and the same on every rank.
    """

    @staticmethod
    def forward(ctx: Any, whole: Tensor, shares: int) -> Tensor:
        return whole / shares

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class ExpertRowParallelLinear(RowParallelLinear):
    """The second linear layer of an expert, whose bias the ranks that share the expert add once.

    Their outputs are partial sums that Megatron adds up after the weights of the router, and to
    each of which its MLP adds the bias. So Megatron refuses such biases on more than one rank.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.bias is not None:
            # Megatron would sum these gradients over the ranks under sequence parallelism.
            self.bias.sequence_parallel = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``[tokens, w / tp]`` -> ``[tokens, h]``, a partial sum, and this rank's share of bias."""
        out, bias = super().forward(x)
        if bias is None:
            return out, None
        if not self.explicit_expert_comm:
            out = out.clone()  # autograd lets nobody add to what Megatron's function passed on
        return out, _Share.apply(bias, self.tp_group.size())


def block_spec(config: TransformerConfig, vp_stage: int | None, pp_rank: int) -> Any:
    """Return the spec of this stage's transformer block; see ``models.spec.local_block``."""
    spec = local_block(config, vp_stage, pp_rank)
    for layer in spec.layer_specs:
        experts = mlp_submodules(layer.submodules.mlp).experts
        mlp_submodules(experts).linear_fc2 = ExpertRowParallelLinear
    return spec
