"""Layers of OLMo-2: norms after attention and MLP, queries and keys normalised as a whole.

Attention and MLP read the residual stream itself; what they write is normalised before it is added.
Those norms are held by the linear layers that write, under the names Megatron-Bridge has for them.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from nemo_minitron.models.spec import HAVE_TE, LocalNorm
from nemo_minitron.models.spec import block_spec as common_spec
from nemo_minitron.runtime.megatron import mlp_submodules

_Column: Any = TEColumnParallelLinear if HAVE_TE else ColumnParallelLinear
_Row: Any = TERowParallelLinear if HAVE_TE else RowParallelLinear
_Norm: Any = TENorm if HAVE_TE else LocalNorm


class NormedRowParallelLinear(_Row):
    """A row-parallel linear layer whose whole output is normalised."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: object
    ) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        eps = config.layernorm_epsilon
        self.post_layernorm = _Norm(config=config, hidden_size=output_size, eps=eps)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        """``[s, b, w / tp]`` -> ``[s, b, h]`` (s split under sequence parallelism)."""
        out, bias = super().forward(x, *args, **kwargs)
        return self.post_layernorm(out), bias


class ProjectionNorm(torch.nn.Module):
    """RMSNorm over all heads of a token, which tensor parallelism splits.

    Each rank has the weights of its own heads; the mean square is that of the heads of all ranks.
    """

    def __init__(self, heads: int, config: TransformerConfig, group: dist.ProcessGroup) -> None:
        """Prepare the norm.

        Args:
            heads: local ones.
            config: Megatron's configuration.
            group: the tensor-parallel group.
        """
        super().__init__()
        self.group, self.eps = group, config.layernorm_epsilon
        self.weight = torch.nn.Parameter(torch.ones(heads * int(config.kv_channels or 0)))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """``[s, b, n / tp, d]`` -> the same shape and dtype."""
        flat = x.flatten(2).float()
        squares = flat.square().sum(dim=-1, keepdim=True)
        # Every rank uses the sum for its own heads, so the gradient of it is summed over ranks too.
        squares = reduce_from_tensor_model_parallel_region(squares, group=self.group)
        squares = copy_to_tensor_model_parallel_region(squares, group=self.group)
        mean = squares / (flat.size(-1) * self.group.size())
        out = self.weight.float() * flat * torch.rsqrt(mean + self.eps)
        return out.to(x.dtype).view_as(x)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: Any = None,
    ) -> dict[str, Any]:
        """Return the weight as Megatron stores a tensor that is split along its first dim."""
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return state


class Olmo2Attention(SelfAttention):
    """Self-attention with ``ProjectionNorm`` on queries and on keys."""

    def __init__(self, config: TransformerConfig, *args: object, **kwargs: object) -> None:
        super().__init__(config, *args, **kwargs)
        group = self.pg_collection.tp
        self.q_layernorm = ProjectionNorm(self.num_attention_heads_per_partition, config, group)
        self.k_layernorm = ProjectionNorm(self.num_query_groups_per_partition, config, group)


def block_spec(config: TransformerConfig, vp_stage: int | None, pp_rank: int) -> Any:
    """Return the spec of this stage's transformer block; see ``models.spec.block_spec``."""
    spec = common_spec(config, vp_stage, pp_rank)
    for layer in getattr(spec, "layer_specs", [spec]):
        _rebuild(layer.submodules)
    return spec


def _rebuild(layer: TransformerLayerSubmodules) -> None:
    """Make an OLMo-2 layer of the submodules of a common one."""
    layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp
    layer.sharded_state_dict_keys_map = {}
    layer.self_attention.module = Olmo2Attention
    attention, mlp = layer.self_attention.submodules, mlp_submodules(layer.mlp)
    attention.q_layernorm = attention.k_layernorm = IdentityOp  # Olmo2Attention has its own
    attention.linear_qkv = mlp.linear_fc1 = _Column
    attention.linear_proj = mlp.linear_fc2 = NormedRowParallelLinear
