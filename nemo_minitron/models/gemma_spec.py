"""Layers of Gemma 2 and 3: norms before and after attention and MLP, caps, two rotary bases.

What attention and MLP write is normalised by the linear layer that writes it, as in OLMo-2. Caps on
the scores of attention are computed by this package's attention, also under Transformer Engine,
whose kernels have none.
"""

from typing import Any

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from nemo_minitron.models.attention import LocalAttention
from nemo_minitron.models.olmo2_spec import NormedRowParallelLinear
from nemo_minitron.models.spec import block_spec as common_spec
from nemo_minitron.runtime.megatron import mlp_submodules


def rotation_of(both: Tensor, kind: int) -> Tensor:
    """One of two rotations that lie in the same tensor.

    Args:
        both: ``[s, 1, 1, 2 d]``: half of the first, half of the second, and both once more.
        kind: 0 or 1.

    Returns:
        ``[s, 1, 1, d]``.
    """
    return both.unflatten(-1, (2, 2, -1))[..., kind, :].flatten(-2)


class TwoBaseAttention(SelfAttention):
    """Self-attention that rotates with the base of its kind of layer.

    Megatron's model makes one rotation for all layers. ``models.rotary`` gives it the frequencies
    of both kinds, and every layer takes its own.
    """

    def forward(
        self, *args: Any, rotary_pos_emb: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Run Megatron's forward pass."""
        if rotary_pos_emb is not None:
            size, layers = self.config.window_size, self.config.window_attn_skip_freq
            windowed = is_layer_window_attention(size, layers, self.layer_number)
            rotary_pos_emb = rotation_of(rotary_pos_emb, int(windowed))
        out: tuple[Tensor, Tensor | None] = super().forward(
            *args, rotary_pos_emb=rotary_pos_emb, **kwargs
        )
        return out


def block_spec(config: TransformerConfig, vp_stage: int | None, pp_rank: int) -> Any:
    """Return the spec of this stage's transformer block; see ``models.spec.block_spec``."""
    spec = common_spec(config, vp_stage, pp_rank)
    for layer in getattr(spec, "layer_specs", [spec]):
        _rebuild(layer.submodules, config)
    return spec


def _rebuild(layer: TransformerLayerSubmodules, config: Any) -> None:
    """Make a Gemma layer of the submodules of a common one."""
    attention = layer.self_attention.submodules
    attention.linear_proj = NormedRowParallelLinear
    mlp_submodules(layer.mlp).linear_fc2 = NormedRowParallelLinear
    if config.attn_logit_softcapping is not None:
        attention.core_attention = LocalAttention
    if config.rotary_base_local is not None:
        layer.self_attention.module = TwoBaseAttention
