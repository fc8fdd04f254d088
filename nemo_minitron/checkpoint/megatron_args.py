"""Make the arguments and empty objects that Megatron-LM and Megatron-Bridge expect.

Megatron-LM's ``--use-checkpoint-args`` and Bridge's ``load_megatron_model`` build the model from
the arguments that a checkpoint holds. Names are those of megatron/training/arguments.py; values
that say nothing of the model are what a run with default arguments has.
"""

import io
import re
from argparse import Namespace
from collections.abc import Iterator
from itertools import count

import torch

from nemo_minitron.checkpoint.torch_dist_read import stack_axes, stacked_name
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.model_checks import LINEAR_SIZES, LINEAR_VARIANT
from nemo_minitron.documents import JsonObject
from nemo_minitron.families.registry import family_of
from nemo_minitron.families.rope import YARN_ARGUMENTS, latent_fields, yarn_fields
from nemo_minitron.families.table import COMMON_SPEC, Family, Row
from nemo_minitron.families.windows import megatron_fields

# Whole multiples of it can be split over any usual number of tensor-parallel ranks.
_VOCAB_STEP = 128

_NEUTRAL: JsonObject = {
    "multi_latent_attention": False,
    "heterogeneous_layers_config_path": None,
    "experimental_attention_variant": None,
    "mtp_num_layers": None,
    "is_hybrid_model": False,
    # False only with --no-position-embedding; the other is the old way to ask for rope.
    "add_position_embedding": True,
    "use_rotary_position_embeddings": False,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "qk_l2_norm": False,
    "quick_geglu": False,
    "moe_layer_freq": 1,
    "moe_router_score_function": "softmax",
    "moe_router_load_balancing_type": "none",
    "moe_aux_loss_coeff": 0.0,
    "moe_grouped_gemm": False,
    "moe_use_legacy_grouped_gemm": False,
    "use_legacy_models": False,
    "init_model_with_meta_device": False,
    "spec": None,
    "hybrid_layer_pattern": None,
    # Knows nothing but its size; the tokenizer's files are in the folder tokenizer/.
    "tokenizer_type": "NullTokenizer",
    "tokenizer_model": None,
    "transformer_impl": "transformer_engine",
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "apply_query_key_layer_scaling": False,
    "fp16_lm_cross_entropy": False,
    "no_persist_layer_norm": False,
    "bias_swiglu_fusion": True,
    "overlap_p2p_comm": False,
    "init_method_xavier_uniform": False,
    "fp8_param_gather": False,
    "config_logger_dir": "",
    "cp_comm_type": ["p2p"],
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "no_save_optim": True,
    "no_save_rng": True,
    "ckpt_format": "torch_dist",
}


def _vocab_multiple(vocab_size: int) -> int:
    """Return the number that the padded vocabulary must be a multiple of.

    Megatron-LM's NullTokenizer has one token more than ``args.vocab_size``, Bridge's has not: what
    Bridge pads has to hold all tokens too.
    """
    return next(step for step in count(_VOCAB_STEP, _VOCAB_STEP) if (vocab_size - 1) % step)


_ROUTER = (
    "moe_router_score_function",
    "moe_router_enable_expert_bias",
    "moe_router_topk_scaling_factor",
    "moe_router_num_groups",
    "moe_router_group_topk",
)


# No arguments of Megatron-LM: what is read by the modules that the argument spec names.
_OF_SPECS = (
    "multipliers",
    "apply_embedding_scaling",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "rotary_base_local",
)


_OF_QUICK_GEGLU = ("activation_func_clamp_value", "glu_linear_offset")


def _hybrid_args(config: ModelConfig) -> JsonObject:
    return {
        "is_hybrid_model": True,
        "hybrid_layer_pattern": config.hybrid_layer_pattern,
        "spec": None,  # Megatron-LM's own for hybrid models
        "mamba_num_heads": config.mamba_num_heads,
        "mamba_head_dim": config.mamba_head_dim,
        "mamba_num_groups": config.mamba_num_groups,
        "mamba_state_dim": config.mamba_state_dim,
    }


def _latent_args(config: ModelConfig) -> JsonObject:
    names = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim")
    return {
        "multi_latent_attention": True,
        **{name: getattr(config, name) for name in names},
        "v_head_dim": config.kv_channels,
        **latent_fields(config.rope_scaling),
    }


def _linear_args(config: ModelConfig) -> JsonObject:
    """Return the arguments of gated delta nets and gated attention; empty for other models."""
    found: JsonObject = {}
    if config.linear_attention_freq is not None:
        names = ("linear_attention_freq", *LINEAR_SIZES)
        found = {name: getattr(config, name) for name in names}
        found["experimental_attention_variant"] = LINEAR_VARIANT
    return found | ({"attention_output_gate": True} if config.attention_output_gate else {})


def megatron_lm_args(config: ModelConfig) -> Namespace:
    """Return arguments with which Megatron-LM builds this model."""
    positions = config.max_position_embeddings
    multiple = _vocab_multiple(config.vocab_size)
    padded = -(-config.vocab_size // multiple) * multiple
    spec = family_of(config).layer_spec
    # What a model does not use is left as it is without it: the same model has the same bytes.
    used: JsonObject = {} if spec == COMMON_SPEC else {"spec": spec.split(":")}
    if config.no_rope_freq is not None:
        used["no_rope_freq"] = config.no_rope_freq
    if config.mtp_num_layers is not None:
        used["mtp_num_layers"] = config.mtp_num_layers
    if config.moe_layer_freq is not None:
        used["moe_layer_freq"] = config.moe_layer_freq
    scaling, yarn = config.rope_scaling or {}, yarn_fields(config.rope_scaling)
    if config.multi_latent:
        yarn, used = {}, used | _latent_args(config)
    used |= yarn | megatron_fields(config)
    used |= {name: yarn[f"yarn_{name}"] for name in YARN_ARGUMENTS if yarn}
    used |= {name: value for name in _OF_SPECS if (value := getattr(config, name))}
    if config.gated_linear_unit and config.activation == "gelu_tanh":
        used["geglu"] = True
    if config.gated_linear_unit and config.activation == "quick_gelu":
        used |= {name: getattr(config, name) for name in _OF_QUICK_GEGLU} | {"quick_geglu": True}
    if "softmax_type" in family_of(config).megatron:
        used["softmax_type"] = family_of(config).megatron["softmax_type"]
    if scaling.get("rope_type") == "linear":
        used["rotary_seq_len_interpolation_factor"] = scaling["factor"]
    if scaling.get("rope_type") == "longrope":
        used["longrope"] = scaling  # no argument of Megatron-LM, which has no such scaling
    if config.hybrid_layer_pattern is not None:
        used |= _hybrid_args(config)
    used |= _linear_args(config)
    if config.moe_router_score_function != "softmax" or config.moe_router_topk_scaling_factor:
        used |= {name: getattr(config, name) for name in _ROUTER} | {"moe_router_dtype": "fp32"}
    return Namespace(
        **{**_NEUTRAL, **used},
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        group_query_attention=config.num_query_groups != config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
        seq_length=positions,
        max_position_embeddings=positions,
        make_vocab_size_divisible_by=multiple,
        padded_vocab_size=padded,
        vocab_size=config.vocab_size - 1,  # NullTokenizer adds one
        position_embedding_type="yarn" if yarn else config.position_embedding_type,
        rotary_base=int(config.rotary_base),
        rotary_percent=config.rotary_percent,
        use_rope_scaling=scaling.get("rope_type") == "llama3",
        rope_scaling_factor=scaling["factor"] if scaling.get("rope_type") == "llama3" else 8.0,
        normalization=config.normalization,
        layernorm_epsilon=config.layernorm_epsilon,
        layernorm_zero_centered_gamma=config.layernorm_zero_centered_gamma,
        # Their names before core 0.16, which Bridge 0.3 reads.
        norm_epsilon=config.layernorm_epsilon,
        apply_layernorm_1p=config.layernorm_zero_centered_gamma,
        swiglu=config.swiglu,
        squared_relu=config.activation == "squared_relu",
        # Its fused kernel is the tanh approximation of GELU.
        bias_gelu_fusion=config.activation == "gelu_tanh",
        add_bias_linear=config.add_bias_linear,
        add_qkv_bias=config.add_qkv_bias,
        qk_layernorm=config.qk_layernorm,
        untie_embeddings_and_output_weights=not config.share_embeddings_and_output_weights,
        num_experts=config.num_moe_experts,
        moe_ffn_hidden_size=config.moe_ffn_hidden_size,
        moe_router_topk=config.moe_router_topk,
        moe_router_pre_softmax=config.moe_router_pre_softmax,
        moe_shared_expert_intermediate_size=config.moe_shared_expert_intermediate_size,
        moe_shared_expert_gate=config.moe_shared_expert_gate,
        fp16=config.dtype == "float16",
        bf16=config.dtype == "bfloat16",
        params_dtype=getattr(torch, config.dtype),
    )


def common_state(config: ModelConfig) -> JsonObject:
    """Return what is saved beside the weights; it is the same at any layout."""
    return {"args": megatron_lm_args(config), "checkpoint_version": 3.0, "iteration": 0}


Place = tuple[str, tuple[int, ...], tuple[int, ...]]
"""Key, and where in a grid of what shape the object lies: a layer, or a layer and an expert."""

# Modules of Transformer Engine that have a state. GPTModel takes its output layer's away itself.
_WITH_STATE = re.compile(
    r"linear_\w+|\w*layernorm|core_attention|in_proj|out_proj|final_norm|eh_proj|enorm|hnorm"
)
_QKV, _ATTENTION = ".self_attention.linear_qkv", ".self_attention.core_attention"


def _modules(row: Row, layer: int | None) -> list[str]:
    """Return modules that hold a row under Transformer Engine; attention has no parameter."""
    number = "" if layer is None else f"{layer}."
    name = stacked_name(row.te_name or row.name).replace("{layer}.", number)
    module = name.rpartition(".")[0]
    modules = [module, module.replace(_QKV, _ATTENTION)] if module.endswith(_QKV) else [module]
    return [name for name in modules if _WITH_STATE.fullmatch(name.rpartition(".")[2])]


def extra_states(family: Family, config: ModelConfig) -> Iterator[Place]:
    """Places of the objects that a model has under Transformer Engine, each once."""
    seen = set()
    if config.hybrid_layer_pattern is not None:  # HybridModel asks for it, GPTModel does not
        yield "output_layer._extra_state", (0,), (1,)
    for _, row, layer in family.parameters(config):
        axes = stack_axes(row, layer, config) or [(0, 1)]
        for module in _modules(row, None if config.stacked_layers else layer):
            place = (
                f"{module}._extra_state",
                tuple(index for index, _ in axes),
                tuple(count for _, count in axes),
            )
            if place not in seen:
                seen.add(place)
                yield place


def name_on_disk(key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """Return an object's name in Megatron's metadata: ``linear_qkv._extra_state/shard_3_16``."""
    return f"{key}/shard_{'.'.join(map(str, offset))}_{'.'.join(map(str, shape))}"


def stored(value: object) -> io.BytesIO:
    """Return an object as Megatron stores it: pickled, in a list of one."""
    stream = io.BytesIO()
    torch.save([value], stream)
    return stream
