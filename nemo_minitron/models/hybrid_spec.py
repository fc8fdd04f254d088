"""Layers of hybrid models: one of Mamba-2, attention, MLP or experts, each with its own norm.

Transformer Engine's where it is installed, as Megatron-Core has them; elsewhere the same of
Megatron's local modules, under the names that Transformer Engine's have in checkpoints.
"""

import copy
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.ssm import mamba_mixer
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor

from nemo_minitron.config.layers import MAMBA
from nemo_minitron.config.layout import layers_on_stages, padded_vocab_size
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.models.hidden import HiddenModel
from nemo_minitron.models.rotary import set_frequencies
from nemo_minitron.models.spec import HAVE_TE, LocalNorm, local_layer
from nemo_minitron.runtime import cpu
from nemo_minitron.runtime.groups import ParallelGroups


class HiddenHybridModel(HiddenModel, HybridModel):
    """Megatron-Core's HybridModel as ``HiddenModel``."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run HybridModel's forward pass; a stage without output layer returns hidden states."""
        last: bool = self.post_process  # type: ignore[has-type]  # Megatron sets it
        self.post_process = last and not self.return_hidden
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.post_process = last


class LocalHybridStack(HybridStack):
    """Megatron's stack with a final norm that needs no Transformer Engine."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Any,
        *,
        post_layer_norm: bool = True,
        **more: Any,
    ) -> None:
        super().__init__(config, submodules, post_layer_norm=False, **more)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = LocalNorm(config, config.hidden_size, config.layernorm_epsilon)


class BatchMixer(MambaMixer):
    """Megatron's mixer, which decodes several sequences at once, too, and keeps states in fp32.

    Megatron-Core 0.19 takes the sequences of a static batch for positions of one. It keeps states
    in the dtype of the weights, of which bf16 loses what a token adds to a state that lasts;
    transformers keeps fp32 (``mamba_ssm_cache_dtype``).
    """

    def _get_states_from_cache(
        self, inference_context: Any, batch_size: int, **more: Any
    ) -> tuple[Tensor, Tensor]:
        conv, states = super()._get_states_from_cache(inference_context, batch_size, **more)
        if states.dtype != torch.float32:
            states = states.float()
            inference_context.key_value_memory_dict[self.layer_number] = conv, states
        return conv, states

    def _decode(
        self,
        hidden_states: Tensor,
        conv_state: Tensor,
        ssm_state: Tensor,
        batch_indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if batch_indices is not None:
            return super()._decode(hidden_states, conv_state, ssm_state, batch_indices)
        projected, _ = self.in_proj(hidden_states)  # [1, b, ...]
        y = self._ssm_decode(projected.transpose(0, 1), conv_state=conv_state, ssm_state=ssm_state)
        out: tuple[Tensor, Tensor | None] = self.out_proj(y.transpose(0, 1))
        return out


def staged_pattern(config: ModelConfig, parallel: ParallelConfig) -> str:
    """The letters of a model with ``|`` where a stage of the pipeline ends, as Megatron reads them.

    Stages follow one another along the pipeline, the first virtual stage of every rank first.
    """
    pattern, stages = config.hybrid_layer_pattern or "", layers_on_stages(config, parallel)
    chunks = [rank[chunk] for chunk in range(len(stages[0])) for rank in stages]
    return "|".join("".join(pattern[layer] for layer in layers) for layers in chunks)


def build_hybrid_chunk(
    parallel: ParallelConfig,
    config: ModelConfig,
    mcore: TransformerConfig,
    groups: ParallelGroups,
    vp_stage: int | None,
    max_sequence_length: int,
) -> HiddenHybridModel:
    """Return one chunk of a hybrid model, weights uninitialised; see ``models.build.build_gpt``.

    Raises:
        ValueError: there is a GPU, but no kernels for Mamba layers.
    """
    cpu.install_mamba()
    if MAMBA in (config.hybrid_layer_pattern or "") and not mamba_mixer.HAVE_MAMBA_SSM:
        raise ValueError(
            "Mamba layers on a GPU need the package mamba_ssm, which NVIDIA's NeMo container has; "
            "pip install mamba-ssm causal-conv1d"
        )
    stage, chunks = vp_stage or 0, mcore.virtual_pipeline_model_parallel_size or 1
    model = HiddenHybridModel(
        mcore,
        stack_spec(mcore),
        vocab_size=padded_vocab_size(config.vocab_size, mcore.tensor_model_parallel_size),
        max_sequence_length=max_sequence_length,
        hybrid_layer_pattern=staged_pattern(config, parallel),
        pre_process=groups.is_first_stage and stage == 0,
        post_process=groups.is_last_stage and stage == chunks - 1,
        share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
        position_embedding_type=config.position_embedding_type,
        rotary_percent=config.rotary_percent,
        rotary_base=int(config.rotary_base),
        pg_collection=groups,
        vp_stage=vp_stage,
    )
    set_frequencies(model, config)
    return model


def stack_spec(config: TransformerConfig) -> ModuleSpec:
    """Return the spec of a hybrid model's layers, whatever their order."""
    if HAVE_TE:
        from megatron.core.extensions.transformer_engine import TENorm
        from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec

        spec = copy.deepcopy(hybrid_stack_spec)
        spec.submodules.mamba_layer.submodules.mixer.module = BatchMixer
        if config.qk_layernorm:  # of a GPT family in letters; Megatron's hybrids have no such norms
            attention = spec.submodules.attention_layer.submodules.self_attention.submodules
            attention.q_layernorm = attention.k_layernorm = TENorm
        return spec
    layers = HybridStackSubmodules(
        mamba_layer=ModuleSpec(module=MambaLayer, submodules=_mamba()),
        attention_layer=ModuleSpec(module=TransformerLayer, submodules=_attention(config)),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=_mlp(config, None)),
    )
    if config.num_moe_experts is not None:
        experts = _mlp(config, config.num_moe_experts)
        layers.moe_layer = ModuleSpec(module=MoETransformerLayer, submodules=experts)
    return ModuleSpec(module=LocalHybridStack, submodules=layers)


def _mamba() -> MambaLayerSubmodules:
    mixer = MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    return MambaLayerSubmodules(
        norm=LocalNorm,
        mixer=ModuleSpec(module=BatchMixer, submodules=mixer),
        mamba_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"},
    )


def _attention(config: TransformerConfig) -> TransformerLayerSubmodules:
    layer = local_layer(config, None).submodules
    return TransformerLayerSubmodules(
        input_layernorm=layer.input_layernorm,
        self_attention=layer.self_attention,
        self_attn_bda=layer.self_attn_bda,
        sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
    )


def _mlp(config: TransformerConfig, num_experts: int | None) -> TransformerLayerSubmodules:
    layer = local_layer(config, num_experts).submodules
    names = {} if num_experts else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    return TransformerLayerSubmodules(
        pre_mlp_layernorm=layer.pre_mlp_layernorm,
        mlp=layer.mlp,
        mlp_bda=layer.mlp_bda,
        sharded_state_dict_keys_map=names,
    )
