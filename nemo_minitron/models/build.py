"""ModelConfig + layout -> Megatron-Core model on this rank."""

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from nemo_minitron.config.layout import check_layout, check_prediction, padded_vocab_size
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.families.registry import family_of
from nemo_minitron.families.rope import attention_fields
from nemo_minitron.families.table import Family
from nemo_minitron.families.windows import megatron_fields
from nemo_minitron.models.attention import capped
from nemo_minitron.models.build_fields import (
    activation_fields,
    latent_fields,
    linear_fields,
    mamba_fields,
    router_fields,
)
from nemo_minitron.models.documents import SharedSamples, rotary_of_positions
from nemo_minitron.models.hidden import HiddenModel
from nemo_minitron.models.prediction import predicted_beside, prediction_spec
from nemo_minitron.models.rotary import set_frequencies
from nemo_minitron.models.settings import transformer_defaults
from nemo_minitron.models.spec import HAVE_GROUPED_GEMM, HAVE_TE
from nemo_minitron.runtime.groups import ParallelGroups
from nemo_minitron.runtime.megatron import HAVE_DELTA_NET, HAVE_HYBRID

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISION_DTYPES = {"32": torch.float32, "bf16-mixed": torch.bfloat16}
"""Dtype of the weights in memory, by ``precision``."""
_NOT_MEGATRONS = (
    "multipliers",
    "apply_embedding_scaling",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "rotary_base_local",
)
"""Settings that are no fields of Megatron's, and that this package's modules look up."""


class HiddenGPTModel(HiddenModel, GPTModel):
    """Megatron-Core's GPTModel as ``HiddenModel``."""

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, *args: Any, **more: Any) -> Any:
        """Do Megatron's preprocessing; each document of a shared sample has its own positions."""
        out = super()._preprocess(input_ids, position_ids, *args, **more)
        shared = more.get("packed_seq_params")
        if isinstance(shared, SharedSamples) and out[1] is not None:
            whole = self.rotary_pos_emb(shared.max_seqlen_q, packed_seq=True)
            out = (out[0], rotary_of_positions(whole, position_ids), *out[2:])
        return out

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.return_hidden and self.post_process:
            return predicted_beside(self, hidden_states, kwargs)
        out: Tensor = super()._postprocess(hidden_states, *args, **kwargs)
        return capped(out, self.logit_cap) if self.post_process else out


_LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "sequence_parallel",
)
"""Keys of ``parallel`` that Megatron's configuration has under the same names."""


def transformer_config(
    config: ModelConfig,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    settings: Mapping[str, Any] | None = None,
) -> TransformerConfig:
    """Return Megatron's configuration of this model and layout; ``settings`` as in ``build_gpt``.

    What is set by name here is what ``config/megatron_owned.py`` lists as set elsewhere.

    Raises:
        ValueError: ``settings`` holds a field that the family sets.
    """
    family, given = family_of(config), settings or {}
    check_prediction(config, parallel)
    _refuse(family, config, parallel, given)
    on_gpu = torch.cuda.is_available()
    defaults = transformer_defaults(
        config,
        on_gpu=on_gpu,
        have_te=HAVE_TE,
        have_grouped_gemm=HAVE_GROUPED_GEMM,
        overlap_p2p=bool(given.get("overlap_p2p_comm")),
    )
    mcore = (MLATransformerConfig if config.multi_latent else TransformerConfig)(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
        normalization=config.normalization,
        layernorm_epsilon=config.layernorm_epsilon,
        layernorm_zero_centered_gamma=config.layernorm_zero_centered_gamma,
        **activation_fields(config),
        num_moe_experts=config.num_moe_experts,
        moe_layer_freq=config.moe_layer_freq or 1,
        moe_ffn_hidden_size=config.moe_ffn_hidden_size,
        moe_router_topk=config.moe_router_topk,
        moe_router_pre_softmax=config.moe_router_pre_softmax,
        moe_shared_expert_intermediate_size=config.moe_shared_expert_intermediate_size,
        moe_shared_expert_gate=config.moe_shared_expert_gate,
        # Distillation follows the teacher's logits, the router included: no balancing loss.
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        # With experts Megatron-Core refuses it beside tensor parallelism (models.gpt_oss_spec).
        add_bias_linear=config.add_bias_linear and config.num_moe_experts is None,
        add_qkv_bias=config.add_qkv_bias,
        # Megatron sums the gradients of norms of queries over the ranks that share out heads. In
        # multi-latent attention that norm is of a latent, which every rank holds whole.
        qk_layernorm=config.qk_layernorm and not config.multi_latent,
        no_rope_freq=config.no_rope_freq,
        **megatron_fields(config),
        **router_fields(config),
        **mamba_fields(config),
        **latent_fields(config),
        **linear_fields(config),
        mtp_num_layers=config.mtp_num_layers,
        softmax_scale=(config.multipliers or {}).get("attention"),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **{name: getattr(parallel, name) for name in _LAYOUT},
        **_split_fields(config, parallel),
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Weights always come from a checkpoint.
        perform_initialization=False,
        use_cpu_initialization=not on_gpu,
        # The loss is a sum over tokens; Megatron divides gradients by the global token count.
        calculate_per_token_loss=True,
        masked_softmax_fusion=False,
        **{**defaults, **given, **family.megatron},
    )
    mcore.add_bias_linear = config.add_bias_linear
    for name, value in attention_fields(config.rope_scaling).items():
        setattr(mcore, name, value)  # no fields; Megatron's attention looks for the attributes
    for name in _NOT_MEGATRONS:
        setattr(mcore, name, getattr(config, name))
    return mcore


def _refuse(
    family: Family, config: ModelConfig, parallel: ParallelConfig, given: Mapping[str, Any]
) -> None:
    """Refuse settings that change the model, and layouts without windows in Transformer Engine."""
    for name in sorted(family.megatron.keys() & given.keys()):
        raise ValueError(
            f"megatron.transformer.{name}={given[name]} is not supported for family "
            f"'{family.name}', which needs {name}={family.megatron[name]}; leave it out"
        )
    if config.activation == "gelu" and given.get("bias_activation_fusion"):
        raise ValueError(
            "megatron.transformer.bias_activation_fusion=true is not supported for a model with "
            "the exact GELU, of which Megatron's fused kernel is the tanh approximation; leave it "
            "out"
        )
    if config.linear_attention_freq is not None and not HAVE_DELTA_NET:
        raise ValueError(
            f"gated delta nets (family '{family.name}') need megatron-core 0.19 or later; install "
            "it with Python 3.12"
        )
    if HAVE_TE and config.window_size is not None and parallel.context_parallel_size > 1:
        raise ValueError(
            f"parallel.context_parallel_size={parallel.context_parallel_size} is not supported for "
            "a model with sliding windows (window_size) under Transformer Engine; set it to 1"
        )


def _split_fields(config: ModelConfig, parallel: ParallelConfig) -> dict[str, Any]:
    """Return how layers are split over the pipeline; a hybrid model is told by its pattern."""
    names = (
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
        "pipeline_model_parallel_layout",
    )
    told = config.hybrid_layer_pattern is not None
    return {name: None if told else getattr(parallel, name) for name in names}


def layer_spec(family: Family) -> Callable[..., Any]:
    """Return the function that makes the layers of a family (``Family.layer_spec``)."""
    module, _, name = family.layer_spec.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def _build_chunk(
    config: ModelConfig,
    mcore: TransformerConfig,
    groups: ParallelGroups,
    vp_stage: int | None,
    max_sequence_length: int,
) -> HiddenGPTModel:
    chunks = mcore.virtual_pipeline_model_parallel_size or 1
    stage = vp_stage or 0
    scaling = config.rope_scaling or {}
    layers = layer_spec(family_of(config))(mcore, vp_stage, groups.pp.rank())
    model = HiddenGPTModel(
        config=mcore,
        transformer_layer_spec=layers,
        mtp_block_spec=prediction_spec(mcore, layers, vp_stage, groups.pp.rank()),
        vocab_size=padded_vocab_size(config.vocab_size, mcore.tensor_model_parallel_size),
        max_sequence_length=max_sequence_length,
        pre_process=groups.is_first_stage and stage == 0,
        post_process=groups.is_last_stage and stage == chunks - 1,
        share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
        position_embedding_type=config.position_embedding_type,
        rotary_percent=config.rotary_percent,
        rotary_base=int(config.rotary_base),
        rope_scaling=scaling.get("rope_type") == "llama3",
        rope_scaling_factor=scaling.get("factor", 8.0),
        pg_collection=groups,
        vp_stage=vp_stage,
    )
    if not config.multi_latent:  # where every layer has its own
        set_frequencies(model, config)
    embedding = getattr(model, "embedding", None)  # of the first stage
    factor = embedding_factor(mcore)
    if factor != 1 and embedding is not None:
        embedding.register_forward_hook(lambda module, inputs, out: out * factor)
    return model


def embedding_factor(mcore: Any) -> float:
    """Return the factor on the embeddings by Megatron's configuration (``transformer_config``)."""
    if mcore.apply_embedding_scaling:
        return torch.tensor(mcore.hidden_size**0.5).to(mcore.params_dtype).item()
    return float((mcore.multipliers or {}).get("embedding", 1.0))


def mark_tensor_parallel(model: torch.nn.Module) -> None:
    """Say which weights are split over the tensor-parallel ranks.

    Megatron does so only where it initialises weights. Without the mark the gradient norm, and so
    clipping, would count the shards of the first rank alone.
    """
    for module in model.modules():
        split = isinstance(
            module, VocabParallelEmbedding | ColumnParallelLinear | RowParallelLinear
        )
        weight = module.weight if split else None
        if weight is not None and not hasattr(weight, "tensor_model_parallel"):
            dim = 1 if isinstance(module, RowParallelLinear) else 0
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)


def build_gpt(
    config: ModelConfig,
    parallel: ParallelConfig,
    groups: ParallelGroups,
    *,
    dtype: torch.dtype = torch.float32,
    max_sequence_length: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[HiddenGPTModel]:
    """Build this rank's part of the model, weights uninitialised.

    Args:
        config: global sizes.
        parallel: layout; must be the initialised one.
        groups: this rank's process groups.
        dtype: parameter dtype.
        max_sequence_length: longest sequence; None takes the model's.
        settings: fields of Megatron's ``TransformerConfig`` beside those of the model and the
            layout (``models.settings``); None takes the defaults.

    Returns:
        One model chunk per virtual pipeline stage (one without interleaving).
    """
    check_layout(config, parallel)
    mcore = transformer_config(config, parallel, dtype, settings)
    length = max_sequence_length or config.max_position_embeddings
    build_chunk = _build_chunk if config.hybrid_layer_pattern is None else hybrid_builder(parallel)
    stages: list[int | None] = [None]
    if parallel.virtual_pipeline_model_parallel_size:
        stages = list(range(parallel.virtual_pipeline_model_parallel_size))
    chunks = [build_chunk(config, mcore, groups, stage, length) for stage in stages]
    for chunk in chunks:
        chunk.settings = dict(settings or {})
        chunk.built_from = config, parallel
        # Local norms and learned positions are made in fp32. Megatron converts what it trains; a
        # model that only runs, such as a teacher, has to be of one dtype too.
        chunk.to(mcore.params_dtype)
        mark_tensor_parallel(chunk)
    return chunks


def hybrid_builder(parallel: ParallelConfig) -> Callable[..., Any]:
    """Builds the chunks of hybrid models at a layout.

    Raises:
        ValueError: the installed Megatron-Core has no hybrid model, or no kernels for its layers.
    """
    if not HAVE_HYBRID:
        raise ValueError(
            "hybrid models (Mamba layers) need megatron-core 0.18 or later, which has HybridModel; "
            "install it with Python 3.12"
        )
    from nemo_minitron.models.hybrid_spec import build_hybrid_chunk

    return functools.partial(build_hybrid_chunk, parallel)


def unwrap(module: torch.nn.Module) -> HiddenGPTModel:
    """Return the GPT model inside Megatron's DDP and Float16Module wrappers."""
    from megatron.core.distributed import DistributedDataParallel

    while isinstance(module, DistributedDataParallel | Float16Module):
        module = module.module
    if not hasattr(module, "decoder"):
        raise ValueError(f"{type(module).__name__} is no GPTModel or HybridModel of Megatron-Core")
    return module  # type: ignore[return-value]  # all kinds are used like a GPT model of ours
