"""Layer specs: Transformer Engine where it is installed, Megatron's local layers elsewhere."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import HAVE_TE as MEGATRON_HAS_TE
from megatron.core.extensions.transformer_engine import TEColumnParallelGroupedLinear
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from nemo_minitron.config.layers import EXPERTS, kinds_of
from nemo_minitron.models.attention import LocalAttention
from nemo_minitron.models.latent import LatentAttention

HAVE_TE = MEGATRON_HAS_TE and torch.cuda.is_available()
HAVE_GROUPED_GEMM = HAVE_TE and TEColumnParallelGroupedLinear is not None
"""Whether the matrices of all experts of a rank can be multiplied in one kernel."""


class LayerNorm1P(torch.nn.LayerNorm):
    """LayerNorm whose weight is stored as its distance from 1, as Transformer Engine has it."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., h]`` -> ``[..., h]``."""
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class RMSNorm1P(torch.nn.RMSNorm):
    """RMSNorm whose weight is stored as its distance from 1."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., h]`` -> ``[..., h]``, in fp32: bf16 has not the digits of 1 + weight."""
        weight = self.weight.float() + 1
        return F.rms_norm(x.float(), self.normalized_shape, weight, self.eps).to(x.dtype)


class LocalNorm:
    """Torch LayerNorm or RMSNorm that also works under sequence parallelism.

    Megatron's ``WrappedTorchNorm`` refuses it; all it takes is the mark that makes Megatron sum
    the gradients of the weight over the tensor-parallel ranks.
    """

    def __new__(  # type: ignore[misc]  # it makes a norm of torch, as Megatron's wrapper does
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any
    ) -> torch.nn.Module:
        """Build the norm the way Megatron's spec system asks for one."""
        module = _NORMS[config.normalization, config.layernorm_zero_centered_gamma](
            hidden_size, eps=eps
        )
        for parameter in module.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron's mark on a parameter
        return module


_NORMS: dict[tuple[str, bool], type[torch.nn.RMSNorm | torch.nn.LayerNorm]] = {
    ("RMSNorm", False): torch.nn.RMSNorm,
    ("RMSNorm", True): RMSNorm1P,
    ("LayerNorm", False): torch.nn.LayerNorm,
    ("LayerNorm", True): LayerNorm1P,
}
"""Classes of norms, by kind and whether the weight is the distance from 1."""


def local_layer(config: TransformerConfig, num_experts: int | None) -> ModuleSpec:
    """Return the spec of a GPT layer of Megatron's local modules.

    Args:
        config: Megatron configuration (global sizes).
        num_experts: experts of the layer; None makes an MLP.
    """
    spec = get_gpt_layer_local_spec(
        num_experts=num_experts,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        normalization=config.normalization,
    )
    layer = spec.submodules
    if config.multi_latent_attention:
        _use_latent_attention(layer)
        layer.sharded_state_dict_keys_map |= _DENSE_KEYS
    if num_experts is not None:
        # Megatron's local spec stores this norm as if it were fused; Transformer Engine's spec for
        # experts does not fuse it. One name on disk for both.
        names = dict(layer.sharded_state_dict_keys_map)
        del names["pre_mlp_layernorm."]
        layer.sharded_state_dict_keys_map = names
    attention = layer.self_attention.submodules
    attention.core_attention = LocalAttention
    for holder in (layer, attention):
        for name in ("input_layernorm", "pre_mlp_layernorm", "q_layernorm", "k_layernorm"):
            value = getattr(holder, name, None)
            if isinstance(value, type) and "Norm" in value.__name__:
                setattr(holder, name, LocalNorm)
    return spec


# Transformer Engine keeps these norms in the linear layers that read them; one name on disk.
_LATENT_KEYS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}
_DENSE_KEYS = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def _use_latent_attention(layer: Any) -> None:
    """Put the attention of ``models.latent`` into a layer that Megatron made for its own."""
    layer.self_attention.module = LatentAttention
    layer.self_attention.submodules.kv_layernorm = LocalNorm
    layer.sharded_state_dict_keys_map = {
        **layer.sharded_state_dict_keys_map,
        **_LATENT_KEYS,
    }


def _te_spec(config: TransformerConfig, vp_stage: int | None, pp_rank: int) -> Any:
    """Return spec of a stage's layers under Transformer Engine: one for all, or one for each."""
    if isinstance(config.moe_layer_freq, list):
        spec = get_gpt_decoder_block_spec(
            config, use_transformer_engine=True, vp_stage=vp_stage, pp_rank=pp_rank
        )
    else:
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=config.multi_latent_attention,
        )
    if config.multi_latent_attention:
        for layer in getattr(spec, "layer_specs", [spec]):
            _use_latent_attention(layer.submodules)
    return spec


def local_block(config: TransformerConfig, vp_stage: int | None, pp_rank: int) -> Any:
    """Return the spec of this stage's transformer block of local modules, whatever is installed.

    Args:
        config: Megatron configuration (global sizes).
        vp_stage: virtual pipeline stage, None without interleaving.
        pp_rank: pipeline rank.
    """
    count = get_num_layers_to_build(config, vp_stage, pp_rank)
    first = get_transformer_layer_offset(config, vp_stage, pp_rank)
    return TransformerBlockSubmodules(
        layer_specs=[
            local_layer(config, config.num_moe_experts if EXPERTS in kinds else None)
            for kinds in kinds_of(config)[first : first + count]
        ],
        layer_norm=LocalNorm,
    )


def block_spec(config: TransformerConfig, vp_stage: int | None, pp_rank: int) -> Any:
    """Return the spec of this stage's transformer block.

    Args:
        config: Megatron configuration (global sizes).
        vp_stage: virtual pipeline stage, None without interleaving.
        pp_rank: pipeline rank.
    """
    make = _te_spec if HAVE_TE else local_block
    return make(config, vp_stage, pp_rank)
