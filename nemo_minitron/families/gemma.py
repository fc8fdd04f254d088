"""Gemma 2 and 3 (text): norms before and after attention and MLP, GELU gates, scaled embeddings.

Norms multiply by 1 + weight. Embeddings are multiplied by the square root of the hidden size: of
the model's own, so a pruned model has a smaller factor, which transformers computes from its
config.json too. What is kept of every tensor stays as it was; the embeddings' share of the residual
stream shrinks by sqrt(pruned / original hidden size), to which distillation adapts the norms after
attention and MLP. Gemma 2 caps the scores of attention and the logits. Gemma 3 normalises queries
and keys, and its layers with windows rotate with a base of their own. Their modules are in
``models/gemma_spec.py``.
"""

import sys
from dataclasses import replace
from functools import partial
from typing import Any

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families import llama, qwen, windows
from nemo_minitron.families.config_json import check_keys, words
from nemo_minitron.families.rope import Rope, read_rope
from nemo_minitron.families.table import Family, Row

_LAYER, _HF_LAYER = "decoder.layers.{layer}.", "model.layers.{layer}."
_FULL, _SLIDING = "full_attention", "sliding_attention"


def _pre_mlp(row: Row) -> Row:
    """Hugging Face's name of the norm before the MLP in models with four norms a layer."""
    if not row.name.endswith("pre_mlp_layernorm.weight"):
        return row
    return replace(row, hf=(_HF_LAYER + "pre_feedforward_layernorm.weight",))


def _post_norm(linear: str, hf: str) -> Row:
    name = f"{_LAYER}{linear}.post_layernorm.weight"
    return Row(name, ("hidden",), None, (f"{_HF_LAYER}{hf}.weight",))


GEMMA2_ROWS = (
    *map(_pre_mlp, llama.ROWS),
    _post_norm("self_attention.linear_proj", "post_attention_layernorm"),
    _post_norm("mlp.linear_fc2", "post_feedforward_layernorm"),
)
GEMMA3_ROWS = (*GEMMA2_ROWS, *qwen.QK_NORMS)

_CAPS = words("attn_logit_softcapping final_logit_softcapping")
_GEMMA2_READS = (llama.READS - {"mlp_bias"}) | _CAPS
_GEMMA2_READS |= words("hidden_activation query_pre_attn_scalar layer_types")
_GEMMA2_READS |= words("use_bidirectional_attention")
_GEMMA3_READS = _GEMMA2_READS | words(
    "rope_local_base_freq sliding_window_pattern _sliding_window_pattern"
)
# What transformers' config classes take where config.json says nothing.
_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
}
_GEMMA2_DEFAULTS = {
    **_DEFAULTS,
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA3_DEFAULTS = {**_DEFAULTS, "vocab_size": 262208, "max_position_embeddings": 131072}
_GELU = "gelu_pytorch_tanh"


def _number(hf: dict[str, Any], key: str) -> float | None:
    return None if hf.get(key) is None else float(hf[key])


def _sizes(family: str, hf: dict[str, Any], rope: Rope, every: int) -> ModelConfig:
    """Read what Gemma 2 and 3 share; by default every n-th layer attends to all tokens."""
    for key in ("hidden_activation", "hidden_act"):
        if (hf.get(key) or _GELU) != _GELU:
            raise ValueError(f"config.json {key}={hf[key]} is not supported; only {_GELU}")
    scalar = hf["query_pre_attn_scalar"]
    if isinstance(scalar, bool) or not isinstance(scalar, int | float) or scalar <= 0:
        raise ValueError(f"config.json query_pre_attn_scalar={scalar!r} must be a number above 0")
    if hf.get("use_bidirectional_attention"):
        raise ValueError("config.json use_bidirectional_attention=true is not supported")
    seen = windows.by_pattern(hf, lambda n: bool((n + 1) % every))
    return replace(
        llama.dense({**hf, "hidden_act": "silu"}, llama.whole(rope)),
        family=family,
        layernorm_zero_centered_gamma=True,
        activation="gelu_tanh",
        apply_embedding_scaling=True,
        multipliers={"attention": scalar**-0.5},
        window_size=seen,
        attn_logit_softcapping=_number(hf, "attn_logit_softcapping"),
        final_logit_softcapping=_number(hf, "final_logit_softcapping"),
    )


def gemma2_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the Megatron sizes of a Hugging Face Gemma 2 config.

    Raises:
        ValueError: the config asks for something this table does not hold.
    """
    check_keys("gemma2", hf, _GEMMA2_READS)
    known = {**_GEMMA2_DEFAULTS, **hf}
    return replace(_sizes("gemma2", known, read_rope(known), every=2), hf=dict(hf))


def gemma3_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the Megatron sizes of a Hugging Face config of Gemma 3's text model.

    Raises:
        ValueError: the config asks for something this table does not hold.
    """
    check_keys("gemma3", hf, _GEMMA3_READS)
    known = {**_GEMMA3_DEFAULTS, **hf}
    if known.get("attn_logit_softcapping") is not None:
        raise ValueError(
            f"config.json attn_logit_softcapping={known['attn_logit_softcapping']} of a Gemma 3 is "
            "not supported; only null, as transformers does not apply it"
        )
    whole, local = _rotations(known)
    # transformers writes _sliding_window_pattern, and does not read it.
    every = known.get("sliding_window_pattern") or 6
    # A layer with a window that no position leaves still rotates as layers with windows do.
    endless = {**known, "max_position_embeddings": sys.maxsize}
    return replace(
        _sizes("gemma3", endless, whole, every),
        max_position_embeddings=known["max_position_embeddings"],
        qk_layernorm=True,
        rotary_base_local=local.base,
        hf=dict(hf),
    )


def _rotations(hf: dict[str, Any]) -> tuple[Rope, Rope]:
    """Return rotations of the layers that see all tokens and of those with windows.

    transformers 5 writes ``rope_parameters`` with one dictionary for each kind of layer; releases
    before it write ``rope_theta`` and ``rope_scaling`` of the former and ``rope_local_base_freq``.

    Raises:
        ValueError: two places disagree, or a scaling is not supported.
    """
    given = hf.get("rope_parameters") or {}
    strange = sorted(set(given) - {_FULL, _SLIDING})
    if strange:
        raise ValueError(
            f"config.json rope_parameters holds {strange}, not supported; only {_FULL} and "
            f"{_SLIDING}"
        )
    full, scaling = given.get(_FULL), hf.get("rope_scaling")
    if isinstance(scaling, dict):
        # transformers puts it over what stands there, in this family alone.
        scaling = {**(full if isinstance(full, dict) else {}), **scaling}
        _refuse_old_name(scaling)
    whole = {"rope_parameters": full, "rope_scaling": scaling}
    local = {"rope_parameters": given.get(_SLIDING)}
    for said, key in ((whole, "rope_theta"), (local, "rope_local_base_freq")):
        if hf.get(key) is not None:
            said["rope_theta"] = hf[key]
    found = read_rope(whole, base=1e6), read_rope(local)
    for rope, kinds in zip(found, ((None, "linear"), (None,)), strict=True):
        kind = None if rope.scaling is None else rope.scaling["rope_type"]
        if kind not in kinds:
            raise ValueError(
                f"rope_scaling type '{kind}' is not supported; only linear for the layers that see "
                "all tokens, and none for those with windows"
            )
    return found


def _refuse_old_name(scaling: dict[str, Any]) -> None:
    """Refuse a scaling whose kind stands under its first name alone, which transformers 5 skips."""
    kind = scaling.get("type", "default")
    if kind != "default" and scaling.get("rope_type") is None:
        raise ValueError(
            f"config.json rope_scaling.type={kind} of a Gemma 3 is not supported, as transformers "
            "does not scale by it; only rope_type, which says the same in a copy of config.json"
        )


def to_hf(architecture: str, config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a (pruned) model.

    Raises:
        ValueError: transformers' config class does not take the sizes.
    """
    _check_sizes(config)
    scale = (config.multipliers or {}).get("attention", config.kv_channels**-0.5)
    said = {
        **llama.to_hf(config),
        "architectures": [architecture],
        "model_type": _MODEL_TYPES[architecture],
        "hidden_act": _GELU,
        "hidden_activation": _GELU,
        "query_pre_attn_scalar": round(scale**-2),
        "sliding_window": windows.stated_width(config),
        "layer_types": windows.layer_types(config),
        **{key: getattr(config, key) for key in sorted(_CAPS)},
    }
    if config.rotary_base_local is not None:
        said["rope_local_base_freq"] = config.rotary_base_local
    return said


def _check_sizes(config: ModelConfig) -> None:
    """Refuse sizes that transformers' config classes of Gemma refuse."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    if hidden % heads:
        raise ValueError(
            f"hidden_size={hidden} must be a multiple of num_attention_heads={heads} in family "
            f"'{config.family}', as transformers' config class demands; set pruning.target."
            f"hidden_size={max(heads, hidden // heads * heads)}"
        )


_MODEL_TYPES = {"Gemma2ForCausalLM": "gemma2", "Gemma3ForCausalLM": "gemma3_text"}
_SPEC = "nemo_minitron.models.gemma_spec:block_spec"
_REFUSES = (
    "`attention_bias=true`: the table has no biases",
    "`use_bidirectional_attention=true`: such a model does not predict the next token",
    "a hidden size that is no multiple of the heads: transformers' config class does not take it",
)
GEMMA2 = Family(
    "gemma2",
    {"Gemma2ForCausalLM": "gemma2"},
    GEMMA2_ROWS,
    gemma2_from_hf,
    partial(to_hf, "Gemma2ForCausalLM"),
    _GEMMA2_READS,
    models="Gemma 2",
    refuses=_REFUSES,
    layer_spec=_SPEC,
)
GEMMA3 = Family(
    "gemma3",
    {"Gemma3ForCausalLM": "gemma3_text"},
    GEMMA3_ROWS,
    gemma3_from_hf,
    partial(to_hf, "Gemma3ForCausalLM"),
    _GEMMA3_READS,
    models="Gemma 3 (text)",
    refuses=(*_REFUSES, "`rope_scaling` other than `linear`", "images: only the text model opens"),
    layer_spec=_SPEC,
)
