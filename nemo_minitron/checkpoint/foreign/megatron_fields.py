"""Translate the config of a Megatron or NeMo checkpoint to a ModelConfig and its family.

Values that change the network in a way that Minitron's models do not have are refused. The family
is the first one whose config can say the same, so a new family needs nothing here.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from nemo_minitron.checkpoint.foreign.megatron_layers import (
    experts_fields,
    hybrid_fields,
    latent_fields,
    latent_yarn,
    linear_fields,
    stated_latent,
    stated_pattern,
)
from nemo_minitron.checkpoint.foreign.megatron_stated import Stated
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.model_checks import LINEAR_VARIANT
from nemo_minitron.documents import JsonObject
from nemo_minitron.families.letters import is_hybrid, takes_letters, without_letters
from nemo_minitron.families.registry import FAMILIES, family_of
from nemo_minitron.families.rope import BETA, LLAMA3_SCALING, concentration
from nemo_minitron.families.table import COMMON_SPEC, Family

_Allowed = Callable[[object], bool]


def _one_of(*values: object) -> _Allowed:
    return lambda value: any(value is other or value == other for other in values)


# Fields that change the network, and the values that leave it as it is here.
_ONLY: dict[str, tuple[_Allowed, str]] = {
    "multi_latent_attention": (_one_of(None, False), "false"),
    "apply_residual_connection_post_layernorm": (_one_of(None, False), "false"),
    "rotary_interleaved": (_one_of(None, False), "false"),
    "qk_l2_norm": (_one_of(None, False), "false"),
    "experimental_attention_variant": (_one_of(None, LINEAR_VARIANT), f"null or {LINEAR_VARIANT}"),
    "softmax_type": (_one_of(None, "vanilla", "learnable"), "vanilla or learnable"),
    "heterogeneous_block_specs": (_one_of(None, False), "false"),
    "is_hybrid_model": (_one_of(None, False), "false"),
    "use_mup": (_one_of(None, False), "false"),
    # One name, or a list of them.
    "moe_router_load_balancing_type": (
        lambda value: "sinkhorn" not in str(value),
        "all but sinkhorn",
    ),
    "moe_router_topk_limited_devices": (_one_of(None), "null"),
    "moe_apply_probs_on_input": (_one_of(None, False), "false"),
    "moe_latent_size": (_one_of(None), "null"),
    "moe_mlp_glu_interleave_size": (_one_of(None), "null"),
    "moe_shared_expert_glu_interleave_size": (_one_of(None), "null"),
}
_POSITIONS = ("rope", "yarn", "learned_absolute")
# Last part of a function's name -> ModelConfig.activation.
_ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "openai_gelu": "gelu_tanh",
    "gelu_impl": "gelu_tanh",
    "fast_gelu": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "squared_relu": "squared_relu",
}


def _activation(stated: Stated) -> str:
    value = stated.need("activation_func")
    tanh = isinstance(value, Mapping) and value.get("approximate") == "tanh"
    named = value.get("_target_") if isinstance(value, Mapping) else value
    dotted = getattr(named, "dotted", None) or str(named)
    known = _ACTIVATIONS.get(dotted.rpartition(".")[2])
    if known is None:
        only = ", ".join(sorted(set(_ACTIVATIONS) - {"gelu_tanh", "gelu_impl"}))
        label = stated.name("activation_func")
        raise ValueError(f"{stated.where}: {label}={dotted} is not supported; only {only}")
    # Megatron's fused kernel of bias and GELU computes the tanh approximation.
    fused = stated.get("bias_activation_fusion", False) and stated.get("add_bias_linear", True)
    gated = stated.get("gated_linear_unit", False)
    return "gelu_tanh" if known == "gelu" and (tanh or (fused and not gated)) else known


def _scaling(stated: Stated) -> JsonObject | None:
    """Return the scaling of the rotary frequencies in Hugging Face's words."""
    if stated_latent(stated):
        return latent_yarn(stated)
    if stated.get("position_embedding_type", "rope") == "yarn":
        return _yarn(stated)
    if stated.values.get("longrope"):  # of this package's own checkpoints
        return dict(stated.values["longrope"])
    factor = stated.get("rope_scaling_factor", 8.0) if stated.get("rope_scaling", False) else None
    if stated.values.get("old_context_len"):  # of NeMo's and Bridge's configs of Llama 3.1
        factor = stated.get("scale_factor", 8.0)
        theirs = {"original_max_position_embeddings": "old_context_len"}
        for key, value in LLAMA3_SCALING.items():
            own = theirs.get(key, key)
            if stated.get(own, value) != value:
                raise stated.refuse(own, f"{value}, which Megatron-Core fixes")
    stretched = float(stated.get("seq_len_interpolation_factor", 1))
    if stretched != 1:
        if factor is not None:
            raise stated.refuse("seq_len_interpolation_factor", "null beside Llama 3's scaling")
        return {"rope_type": "linear", "factor": stretched}
    if factor is None:
        return None
    return {"rope_type": "llama3", "factor": float(factor), **LLAMA3_SCALING}


def _yarn(stated: Stated) -> JsonObject:
    """YaRN; a factor of sines and cosines comes from two numbers, or from the factor."""
    if stated.get("rotary_percent", 1.0) != 1:
        raise stated.refuse("rotary_percent", "1 with position_embedding_type=yarn")
    factor = float(stated.need("yarn_rotary_scaling_factor"))
    own, base = (stated.values.get(f"yarn_{name}") for name in ("mscale", "mscale_all_dim"))
    attention = concentration(factor)
    if own is not None and base is not None:
        attention = concentration(factor, own) / concentration(factor, base)
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": stated.need("yarn_original_max_position_embeddings"),
        "beta_fast": stated.get("yarn_beta_fast", 32),
        "beta_slow": stated.get("yarn_beta_slow", 1),
        "truncate": stated.get("yarn_correction_range_round_to_int", True),
        "attention_factor": attention,
        **({BETA: stated.values[BETA]} if stated.values.get(BETA) else {}),
    }


def _positions(stated: Stated) -> JsonObject:
    kind = stated.need("position_embedding_type")
    if kind not in _POSITIONS and not (kind == "none" and stated_pattern(stated)):
        raise stated.refuse("position_embedding_type", " or ".join(_POSITIONS))
    found: JsonObject = {
        "position_embedding_type": "rope" if kind == "yarn" else kind,
        "max_position_embeddings": stated.need("seq_length"),
    }
    if kind in ("rope", "yarn"):
        base = stated.get("rotary_base", 10000)
        if not isinstance(base, int | float) or base % 1:  # GPTModel of Megatron-Core takes an int
            raise stated.refuse("rotary_base", "one whole number")
        found["rotary_base"] = float(base)
        found["rotary_percent"] = float(stated.get("rotary_percent", 1.0))
        found["rope_scaling"] = scaling = _scaling(stated)
        if stated_pattern(stated) and (scaling or {}).get("rope_type") == "llama3":
            raise stated.refuse("rope_scaling", "false in a HybridModel, which has no such scaling")
        found["no_rope_freq"] = _without_rotation(stated)
    return found


def _without_rotation(stated: Stated) -> list[int] | None:
    """Return for each layer whether it is not rotated; a number n means every n-th layer."""
    value, layers = stated.get("no_rope_freq", None), stated.need("num_layers")
    if not isinstance(value, int):
        return None if value is None else [int(bool(entry)) for entry in value]
    if value and (value < 0 or layers % value):
        raise stated.refuse("no_rope_freq", f"a divisor of num_layers={layers}")
    every = [0] * (value - 1) + [1]
    return every * (layers // value) if value else None


def _windows(stated: Stated) -> list[int] | None:
    """The window of every layer; Megatron says how far it reaches, and which layers have it."""
    size, layers = stated.get("window_size", None), stated.need("num_layers")
    if size is not None and (isinstance(size, str) or not isinstance(size, Sequence)):
        raise stated.refuse("window_size", "two numbers, how far a token sees to either side")
    if size is None or size[0] < 0:
        return None
    if size[1] != 0:
        raise stated.refuse("window_size", "a window whose second number is 0")
    skips = stated.get("window_attn_skip_freq", [1] * layers)
    if isinstance(skips, int):  # every n-th layer sees all
        skips = [(layer + 1) % skips for layer in range(layers)]
    return [size[0] + 1 if has else 0 for has in skips]


def _refuse_others(stated: Stated, head_dim: int) -> None:
    experts = stated.get("num_moe_experts", None) is not None
    hybrid = stated_pattern(stated) is not None
    for key, (allowed, only) in _ONLY.items():
        if (key.startswith("moe_") and not experts) or (hybrid and key == "is_hybrid_model"):
            continue
        if key == "multi_latent_attention" and stated_latent(stated):
            continue
        if not allowed(stated.values.get(key)):
            raise stated.refuse(key, only)
    if hybrid and stated.get("softmax_type", "vanilla") != "vanilla":
        raise stated.refuse("softmax_type", "vanilla in a HybridModel")
    scale = stated.get("softmax_scale", None)
    if scale is not None and not math.isclose(scale, head_dim**-0.5):
        raise stated.refuse("softmax_scale", "null")


_SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "seq_length",
    "num_moe_experts",
    "moe_ffn_hidden_size",
    "moe_router_topk",
)
_REALS = ("layernorm_epsilon", "rotary_percent", "seq_len_interpolation_factor")


def _check_numbers(stated: Stated) -> None:
    """Refuse what is no number where one belongs; YAML reads 1e-5 as a text."""
    for key in (*_SIZES, *_REALS):
        value = stated.get(key, 1)
        try:
            number = float(value)
        except (OverflowError, TypeError, ValueError):
            number = math.nan
        whole = number >= 1 and number % 1 == 0 and not isinstance(value, bool | str)
        if key in _SIZES and not whole:
            raise stated.refuse(key, "a whole number above 0")
        if not math.isfinite(number):
            raise stated.refuse(key, "a number")


def model_fields(stated: Stated, vocab_size: int) -> JsonObject:
    """Return fields of ModelConfig, without those of the family, the dtype and what is kept.

    Args:
        stated: from ``of_args``, ``of_nemo1`` or ``of_core``.
        vocab_size: true vocabulary.

    Raises:
        ValueError: names the field that is missing or whose value is not supported.
    """
    _check_numbers(stated)
    hidden, heads = stated.need("hidden_size"), stated.need("num_attention_heads")
    head_dim = stated.get("kv_channels", hidden // heads)
    _refuse_others(stated, head_dim)
    bias = bool(stated.get("add_bias_linear", True))
    ffn = stated.get("ffn_hidden_size", 4 * hidden)
    return {
        "num_layers": stated.need("num_layers"),
        "hidden_size": hidden,
        **experts_fields(stated, ffn),
        **hybrid_fields(stated, ffn),
        "num_attention_heads": heads,
        "num_query_groups": stated.get("num_query_groups", heads),
        "kv_channels": head_dim,
        **latent_fields(stated, heads),
        **linear_fields(stated),
        "vocab_size": vocab_size,
        "mtp_num_layers": stated.get("mtp_num_layers", None) or None,
        **_positions(stated),
        "window_size": _windows(stated),
        "multipliers": stated.get("multipliers", None),
        "apply_embedding_scaling": bool(stated.get("apply_embedding_scaling", False)),
        "attn_logit_softcapping": stated.get("attn_logit_softcapping", None),
        "final_logit_softcapping": stated.get("final_logit_softcapping", None),
        "rotary_base_local": stated.get("rotary_base_local", None),
        "normalization": stated.need("normalization"),
        "layernorm_epsilon": float(stated.get("layernorm_epsilon", 1e-5)),
        "layernorm_zero_centered_gamma": bool(stated.get("layernorm_zero_centered_gamma", False)),
        "gated_linear_unit": bool(stated.need("gated_linear_unit")),
        "activation": _activation(stated),
        "activation_func_clamp_value": stated.get("activation_func_clamp_value", None),
        "glu_linear_offset": float(stated.get("glu_linear_offset", 0)),
        "add_bias_linear": bias,
        # Megatron-Core gives linear_qkv a bias for either.
        "add_qkv_bias": bias or bool(stated.get("add_qkv_bias", False)),
        "qk_layernorm": bool(stated.get("qk_layernorm", False)),
        "share_embeddings_and_output_weights": bool(
            stated.need("share_embeddings_and_output_weights")
        ),
    }


def _differences(family: Family, fields: JsonObject) -> JsonObject:
    """Field -> the value a family's config would have instead; empty when the family fits."""
    config = ModelConfig(family=family.name, **fields)
    again = family.from_hf(family.to_hf(config))
    return {name: getattr(again, name) for name in fields if getattr(again, name) != fields[name]}


def _with_the_spec(stated: Stated) -> list[Family]:
    """Families whose layers are built by the spec that is stated, else those with Megatron's."""
    spec = ":".join(stated.get("spec", None) or ())
    said = {
        "multi_latent_attention": stated_latent(stated),
        "softmax_type": stated.get("softmax_type", "vanilla") == "learnable",
    }
    families = [
        family
        for family in FAMILIES.values()
        if all((key in family.megatron) == has for key, has in said.items())
    ]
    if (pattern := stated_pattern(stated)) is not None:
        hybrids = [family for family in FAMILIES.values() if is_hybrid(family)]
        return hybrids + [f for f in families if not is_hybrid(f) and takes_letters(f, pattern)]
    own = [family for family in families if family.layer_spec == spec]
    # Modules of a family with sinks compute what Megatron's own do.
    return own or [f for f in families if f.layer_spec == COMMON_SPEC] or families


def match_family(stated: Stated, fields: JsonObject) -> tuple[Family, ModelConfig]:
    """Return the first family that can express these fields, and the config.

    Raises:
        ValueError: none can; names what keeps the nearest one from it.
    """
    try:
        ModelConfig(family="any", **fields)
    except ValueError as error:
        raise ValueError(f"{stated.where}: {error}") from error
    nearest: tuple[Family, JsonObject] | None = None
    refusals: list[str] = []
    for family in _with_the_spec(stated):
        known = without_letters(family, fields)
        try:
            differ = _differences(family, known)
        except (KeyError, TypeError, ValueError) as error:  # as it has no experts, for instance
            refusals.append(f"{family.name}: {error}")
            continue
        if not differ:
            known["hybrid_layer_pattern"] = fields.get("hybrid_layer_pattern")
            config = ModelConfig(family=family.name, **known)
            return family_of(config), config
        if nearest is None or len(differ) < len(nearest[1]):
            nearest = family, differ
    if nearest is None:
        raise ValueError(
            f"{stated.where}: no supported family can express this model ({refusals[0]}). "
            "Families: docs/families.md"
        )
    family, differ = nearest
    said = ", ".join(f"{stated.name(name)} ({name}={fields[name]})" for name in differ)
    would = ", ".join(f"{name}={value}" for name, value in differ.items())
    raise ValueError(
        f"{stated.where}: no supported family has this {said}; the nearest, {family.name}, has "
        f"{would}. Families: docs/families.md"
    )
