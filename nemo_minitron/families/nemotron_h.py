"""Nemotron-H, Nemotron Nano 2 and Nemotron 3 Nano: hybrids of Mamba-2, attention, MLP and experts.

A layer is one of these and has one norm. Attention does not rotate queries and keys: the Mamba
layers know the order of tokens. The MLP is an ungated squared ReLU. The router takes sigmoids and
picks experts by them and a bias that is not part of their weights.
"""

from typing import Any

from nemo_minitron.config.layers import ATTENTION, EXPERTS, MAMBA, MLP
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.config_json import check_keys, words
from nemo_minitron.families.experts import sigmoid_router, written_router
from nemo_minitron.families.llama import untied
from nemo_minitron.families.table import Family, Row

_LAYER, _HF_LAYER = "decoder.layers.{layer}.", "backbone.layers.{layer}."
_MIXER, _HF_MIXER = _LAYER + "mixer.", _HF_LAYER + "mixer."
_EXPERT, _HF_EXPERT = "experts.local_experts.{expert}.", "experts.{expert}."
_CONV = ("x", "B", "C")


def _norm(kind: str, name: str, te_name: str | None) -> Row:
    te = None if te_name is None else _LAYER + te_name
    hf = (_HF_LAYER + "norm.weight",)
    return Row(_LAYER + name, ("hidden",), None, hf, te_name=te, kind=kind)


def _mamba(name: str, dims: tuple[str, ...], tp_dim: int | None = 0, **more: Any) -> Row:
    """Return a row of a Mamba layer; Hugging Face has the convolution in a module of its own."""
    hf = name.replace("conv1d_", "conv1d.")
    te_name = _MIXER + hf if hf != name else None
    return Row(_MIXER + name, dims, tp_dim, (_HF_MIXER + hf,), te_name=te_name, kind=MAMBA, **more)


def _mlp(kind: str, where: str, hf_where: str, width: str) -> tuple[Row, Row]:
    """The two matrices of an MLP without a gate: of a layer, an expert or the shared expert."""
    ours, theirs = _LAYER + "mlp." + where, _HF_MIXER + hf_where
    up, down = (theirs + "up_proj.weight",), (theirs + "down_proj.weight",)
    return (
        Row(ours + "linear_fc1.weight", (width, "hidden"), 0, up, kind=kind),
        Row(ours + "linear_fc2.weight", ("hidden", width), 1, down, kind=kind),
    )


ROWS = (
    Row(
        "embedding.word_embeddings.weight",
        ("vocab", "hidden"),
        0,
        ("backbone.embeddings.weight",),
    ),
    Row("decoder.final_norm.weight", ("hidden",), None, ("backbone.norm_f.weight",)),
    Row("output_layer.weight", ("vocab", "hidden"), 0, ("lm_head.weight",), when=untied),
    _norm(MAMBA, "norm.weight", "mixer.in_proj.layer_norm_weight"),
    _mamba("in_proj.weight", ("mamba_in", "hidden"), parts_on_disk=("z", *_CONV, "dt")),
    _mamba("conv1d_weight", ("mamba_conv", "one", "mamba_conv_width"), parts_on_disk=_CONV),
    _mamba("conv1d_bias", ("mamba_conv",), parts_on_disk=_CONV),
    _mamba("A_log", ("mamba_head",)),
    _mamba("D", ("mamba_head",)),
    _mamba("dt_bias", ("mamba_head",)),
    _mamba("norm.weight", ("mamba_inner",)),
    _mamba("out_proj.weight", ("hidden", "mamba_inner"), tp_dim=1),
    _norm(ATTENTION, "input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
    Row(
        _LAYER + "self_attention.linear_qkv.weight",
        ("qkv", "hidden"),
        0,
        tuple(_HF_MIXER + f"{x}_proj.weight" for x in "qkv"),
        kind=ATTENTION,
    ),
    Row(
        _LAYER + "self_attention.linear_proj.weight",
        ("hidden", "head"),
        1,
        (_HF_MIXER + "o_proj.weight",),
        kind=ATTENTION,
    ),
    _norm(MLP, "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    *_mlp(MLP, "", "", "ffn"),
    _norm(EXPERTS, "pre_mlp_layernorm.weight", None),
    Row(
        _LAYER + "mlp.router.weight",
        ("expert", "hidden"),
        None,
        (_HF_MIXER + "gate.weight",),
        kind=EXPERTS,
    ),
    Row(
        _LAYER + "mlp.router.expert_bias",
        ("expert",),
        None,
        (_HF_MIXER + "gate.e_score_correction_bias",),
        kind=EXPERTS,
    ),
    *_mlp(EXPERTS, _EXPERT, _HF_EXPERT, "expert_ffn"),
    *_mlp(EXPERTS, "shared_experts.", "shared_experts.", "shared_expert_ffn"),
)

# Letters of Megatron-Core's hybrid models -> what transformers calls such a layer now and before.
_WORDS = {
    MAMBA: ("linear_attention", "mamba"),
    ATTENTION: ("full_attention", "attention"),
    MLP: ("mlp",),
    EXPERTS: ("moe",),
}
_LETTERS = {word: letter for letter, names in _WORDS.items() for word in names}
# What transformers' NemotronHConfig takes where config.json says nothing.
_DEFAULTS = {
    "vocab_size": 131072,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "intermediate_size": 21504,
    "ssm_state_size": 128,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "n_routed_experts": 8,
    "moe_intermediate_size": 7688,
    "moe_shared_expert_intermediate_size": 7688,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "layer_norm_epsilon": 1e-5,
}
# The only values at which the network is the one of this table.
_ONLY: dict[str, tuple[Any, ...]] = {
    "layer_norm_epsilon": (1e-5,),  # which Megatron-Core's gated norm has whatever the others have
    "mlp_hidden_act": ("relu2",),
    "mamba_hidden_act": ("silu",),
    "use_conv_bias": (True,),
    "conv_kernel": (4,),
    "mamba_proj_bias": (False,),
    "use_bias": (False,),
    "mlp_bias": (False,),
    "attention_bias": (False,),
    "residual_in_fp32": (False,),
    "norm_topk_prob": (True,),
    "sliding_window": (None,),
    "moe_latent_size": (None,),
    "num_nextn_predict_layers": (0, None),
    "time_step_limit": ([0.0, float("inf")], [0.0, {"__float__": "Infinity"}]),
}
# How it is computed and was initialised.
_NO_MATTER = words(
    "chunk_size expand num_logits_to_keep use_mamba_kernels mamba_ssm_cache_dtype "
    "moe_shared_expert_overlap n_shared_experts rescale_prenorm_residual time_step_floor "
    "time_step_max time_step_min mtp_layers_block_type mtp_hybrid_override_pattern rms_norm_eps "
    "rope_theta partial_rotary_factor norm_eps"
)
# What transformers calls n_routed_experts, too; where both are there it takes this one.
_RENAMED = "num_local_experts"
_LISTS = ("layers_block_type", "layer_types")
READS = (
    frozenset(_DEFAULTS)
    | frozenset(_ONLY)
    | _NO_MATTER
    | words(
        "num_hidden_layers layers_block_type layer_types hybrid_override_pattern "
        "attention_head_dim tie_word_embeddings num_local_experts"
    )
)


def pattern_of(hf: dict[str, Any]) -> str:
    """Return letters of the layers, as transformers reads them.

    Raises:
        ValueError: two keys disagree, or a layer is of no known kind.
    """
    listed = next(filter(None, (hf.get(key) for key in _LISTS)), None)
    written = hf.get("hybrid_override_pattern")
    if listed is None and written is None:
        raise ValueError(
            "config.json does not list the layers; it needs hybrid_override_pattern or "
            "layers_block_type"
        )
    strange = [word for word in listed or () if word not in _LETTERS]
    if strange:
        raise ValueError(
            f"config.json layers_block_type holds {strange[0]}; supported: {', '.join(_LETTERS)}"
        )
    pattern = "".join(_LETTERS[word] for word in listed) if listed else str(written)
    if written not in (None, pattern):
        raise ValueError(
            f"config.json hybrid_override_pattern={written} and layers_block_type ({pattern}) "
            "disagree; leave one out in a copy of config.json"
        )
    layers = hf.get("num_hidden_layers")
    if layers not in (None, len(pattern)):
        raise ValueError(
            f"config.json num_hidden_layers={layers}, but {pattern} has {len(pattern)} layers; "
            "correct it in a copy of config.json"
        )
    return pattern


def _refuse(hf: dict[str, Any]) -> None:
    for key, values in _ONLY.items():
        if key in hf and hf[key] not in values:
            raise ValueError(
                f"config.json {key}={hf[key]} is not supported for family 'nemotron_h'; only "
                f"{' or '.join(map(str, values))}"
            )
    stated = hf.get("attention_head_dim")
    if stated is not None and stated != hf.get("head_dim", _DEFAULTS["head_dim"]):
        raise ValueError(
            f"config.json attention_head_dim={stated} is not a key of transformers, which takes "
            f"head_dim={hf.get('head_dim', _DEFAULTS['head_dim'])}; set head_dim in a copy of it"
        )


def _known(hf: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json with what transformers takes for what it leaves out.

    Raises:
        ValueError: the two names of the number of experts disagree.
    """
    experts, renamed = hf.get("n_routed_experts"), hf.get(_RENAMED)
    if None not in (experts, renamed) and experts != renamed:
        raise ValueError(
            f"config.json n_routed_experts={experts} and {_RENAMED}={renamed} disagree; leave one "
            "out in a copy of config.json"
        )
    return {**_DEFAULTS, **hf, **({} if renamed is None else {"n_routed_experts": renamed})}


def _experts(hf: dict[str, Any]) -> dict[str, Any]:
    """Return fields of ModelConfig that describe layers of experts."""
    return {
        **sigmoid_router(hf),
        "moe_ffn_hidden_size": hf["moe_intermediate_size"],
        "moe_shared_expert_intermediate_size": hf["moe_shared_expert_intermediate_size"],
    }


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the Megatron sizes of a Hugging Face NemotronH config.

    Raises:
        ValueError: the config asks for something this table does not hold.
    """
    check_keys("nemotron_h", hf, READS)
    _refuse(hf)
    known, pattern = _known(hf), pattern_of(hf)
    return ModelConfig(
        family="nemotron_h",
        num_layers=len(pattern),
        hidden_size=known["hidden_size"],
        ffn_hidden_size=known["intermediate_size"],
        num_attention_heads=known["num_attention_heads"],
        num_query_groups=known["num_key_value_heads"] or known["num_attention_heads"],
        kv_channels=known["head_dim"],
        vocab_size=known["vocab_size"],
        max_position_embeddings=known["max_position_embeddings"],
        layernorm_epsilon=known["layer_norm_epsilon"],
        gated_linear_unit=False,
        activation="squared_relu",
        position_embedding_type="none",
        share_embeddings_and_output_weights=hf.get("tie_word_embeddings", False),
        hybrid_layer_pattern=pattern,
        mamba_num_heads=known["mamba_num_heads"],
        mamba_head_dim=known["mamba_head_dim"],
        mamba_num_groups=known["n_groups"],
        mamba_state_dim=known["ssm_state_size"],
        dtype=hf.get("dtype") or hf.get("torch_dtype") or "float32",
        hf=dict(hf),
        **(_experts(known) if EXPERTS in pattern else {}),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a (pruned) model."""
    pattern = config.hybrid_layer_pattern or ""
    written = {
        **{key: value for key, value in config.hf.items() if key not in READS - _NO_MATTER},
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "num_hidden_layers": config.num_layers,
        "hybrid_override_pattern": pattern,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.kv_channels,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "layer_norm_epsilon": config.layernorm_epsilon,
        "mlp_hidden_act": "relu2",
        "mamba_num_heads": config.mamba_num_heads,
        "mamba_head_dim": config.mamba_head_dim,
        "n_groups": config.mamba_num_groups,
        "ssm_state_size": config.mamba_state_dim,
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
        "torch_dtype": config.dtype,
    }
    for key in (key for key in _LISTS if config.hf.get(key)):
        if "hybrid_override_pattern" not in config.hf:  # else all, which have to agree
            written.pop("hybrid_override_pattern", None)
        own = {_LETTERS[word]: word for word in config.hf[key]}  # older releases know these alone
        written[key] = [own.get(letter, _WORDS[letter][0]) for letter in pattern]
    if config.num_moe_experts is not None:
        written |= {
            **written_router(config),
            "moe_intermediate_size": config.moe_ffn_hidden_size,
            "moe_shared_expert_intermediate_size": config.moe_shared_expert_intermediate_size,
            **({_RENAMED: config.num_moe_experts} if _RENAMED in config.hf else {}),
        }
    return written


NEMOTRON_H = Family(
    "nemotron_h",
    {"NemotronHForCausalLM": "nemotron_h"},
    ROWS,
    from_hf,
    to_hf,
    READS,
    models="Nemotron-H, Nemotron Nano 2, Nemotron 3 Nano",
    refuses=(
        "multi-token prediction (`num_nextn_predict_layers`) and `moe_latent_size`",
        "biases of projections, `conv_kernel` other than 4, `time_step_limit`",
        "one expert per token, or groups of experts that Megatron-Core ranks otherwise",
        "Megatron-Core before 0.18, which has no `HybridModel`",
    ),
    hf_prefix="backbone.",
    layer_spec="nemo_minitron.models.hybrid_spec:stack_spec",
    megatron={"is_hybrid_model": True, "moe_router_dtype": "fp32"},
)
