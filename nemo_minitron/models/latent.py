"""Multi-latent attention (MLA, 2405.04434): keys and values of all heads from one small latent.

Megatron-Core's own module, with linear layers that work without Transformer Engine. Its local
layers split the projections to the latents over the tensor-parallel ranks and gather what they put
out; the backward pass of that takes from each rank the gradient of its own heads alone, although
all heads read the rotated key. Here every rank holds these projections whole, as Transformer
Engine's layers do, and the gradients are summed.
Shape letters: s local sequence, b micro-batch, h hidden, l latent.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import (
    MLASelfAttention,
    MLASelfAttentionSubmodules,
    MultiLatentAttention,
)
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor

from nemo_minitron.families.latent import LATENT_EPSILON


class Down(torch.nn.Module):
    """A projection to a latent, which every tensor-parallel rank holds whole."""

    def __init__(
        self,
        config: MLATransformerConfig,
        size: int,
        group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        """Make the weight, uninitialised.

        Args:
            config: Megatron configuration (global sizes).
            size: rows.
            group: the ranks that share out the heads, where all of these read the last
                ``qk_pos_emb_head_dim`` rows.
        """
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(size, config.hidden_size))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron's mark on a parameter
        self.rotated = config.qk_pos_emb_head_dim
        # With sequence parallelism Megatron gathers the rotated key, and its gradients are summed.
        self.group = None if config.sequence_parallel else group

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """``[s, b, h]`` -> ``[s, b, l]``, and no bias."""
        out = F.linear(x, self.weight)
        if self.group is None:
            return out, None
        latent, rotated = out.split([out.size(-1) - self.rotated, self.rotated], dim=-1)
        shared = copy_to_tensor_model_parallel_region(rotated, group=self.group)
        if shared.requires_grad:
            # Megatron-Core 0.16 sums a copy of a gradient that is not contiguous, and drops it.
            shared.register_hook(Tensor.contiguous)
        return torch.cat([latent, shared], dim=-1), None


class LatentAttention(MLASelfAttention):
    """Megatron-Core's multi-latent attention, with the names that its checkpoints have."""

    def __init__(
        self,
        config: MLATransformerConfig,
        submodules: MLASelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        **more: Any,
    ) -> None:
        """Build the module as Megatron's spec system asks.

        Args:
            config: Megatron configuration (global sizes).
            submodules: norms, core attention and the output projection are taken from it.
            layer_number: from 1.
            attn_mask_type: what queries see.
            **more: process groups, and what else the installed version gives.
        """
        # Megatron-Core's fused variant leaves out the constructor of its parent likewise.
        MultiLatentAttention.__init__(
            self,
            config=config,
            submodules=submodules,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type="self",
            **more,
        )
        heads, latent = config.num_attention_heads, config.kv_lora_rank
        queries, norm = heads * self.q_head_dim, submodules.kv_layernorm
        if config.q_lora_rank is None:
            self.linear_q_proj = self._up(config.hidden_size, queries)
        else:
            self.linear_q_down_proj = Down(config, config.q_lora_rank)
            self.q_layernorm = norm(
                config=config, hidden_size=config.q_lora_rank, eps=LATENT_EPSILON
            )
            self.linear_q_up_proj = self._up(config.q_lora_rank, queries)
        group = self.pg_collection.tp
        self.linear_kv_down_proj = Down(config, latent + config.qk_pos_emb_head_dim, group)
        self.kv_layernorm = norm(config=config, hidden_size=latent, eps=LATENT_EPSILON)
        self.linear_kv_up_proj = self._up(latent, heads * (config.qk_head_dim + config.v_head_dim))

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        packed_seq_params: Any = None,
        **more: Any,
    ) -> tuple[Any, ...]:
        """Replace Megatron's method, which expects packed samples of Transformer Engine only.

        Where documents share samples in the ordinary layout, their mask parts them. Positions count
        from the beginning of the sample: scores depend on distances alone.
        """
        if packed_seq_params is not None and packed_seq_params.qkv_format == "sbhd":
            packed_seq_params = None
        out: tuple[Any, ...] = super().get_query_key_value_tensors(
            hidden_states, key_value_states, position_ids, packed_seq_params, **more
        )
        return out

    def _up(self, inputs: int, outputs: int) -> ColumnParallelLinear:
        """Make a projection whose output rows belong to heads."""
        return ColumnParallelLinear(
            inputs,
            outputs,
            config=self.config,
            init_method=self.config.init_method,
            bias=False,
            gather_output=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.pg_collection.tp,
        )
