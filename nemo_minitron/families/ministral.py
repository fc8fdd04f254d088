"""Ministral and Ministral 3 (text): Llama's network with windows by layer, or with scaled queries.

Layers of Ministral may differ in whether they have a window. Ministral 3 stretches its positions
(YaRN), and multiplies every query, the more the further it is from the beginning of the text
(``models/ministral_spec.py``).
"""

from dataclasses import replace
from typing import Any

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families import llama, windows
from nemo_minitron.families.config_json import check_keys
from nemo_minitron.families.rope import BETA, REFUSED_SCALINGS, Rope, read_rope
from nemo_minitron.families.table import Family

_READS3 = llama.READS
_READS = _READS3 | {"layer_types"}
# What transformers' MinistralConfig and Ministral3Config take where config.json says nothing.
_DEFAULTS = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
_DEFAULTS3 = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5,
}
_ROPE3 = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    BETA: 0.1,
}
# Says once more what stands beside the dictionary.
_TWICE = "max_position_embeddings"


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the Megatron sizes of a Hugging Face Ministral config.

    Raises:
        ValueError: the config asks for something this table does not hold.
    """
    check_keys("ministral", hf, _READS)
    known = {**_DEFAULTS, **hf}
    seen = windows.by_layer({**known, "use_sliding_window": True}, lambda _: True)
    return replace(llama.dense(known), family="ministral", window_size=seen, hf=dict(hf))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a (pruned) model."""
    return {
        **llama.to_hf(config),
        "architectures": ["MinistralForCausalLM"],
        "model_type": "ministral",
        "sliding_window": windows.stated_width(config),
        "layer_types": windows.layer_types(config),
    }


def _rope3(hf: dict[str, Any]) -> Rope:
    """Positions of Ministral 3, with what scales queries among the values of YaRN."""
    keys = ("rope_scaling", "rope_parameters")
    if not any(hf.get(key) for key in keys):
        hf = {**hf, "rope_parameters": _ROPE3}
    given = {key: hf[key] for key in keys if isinstance(hf.get(key), dict)}
    plain = {
        key: {name: value for name, value in inner.items() if name not in (BETA, _TWICE)}
        for key, inner in given.items()
    }
    found = llama.whole(read_rope({**hf, **plain}))
    beta = next((inner.get(BETA) for inner in given.values() if inner), None)
    if found.scaling is None or found.scaling["rope_type"] != "yarn" or beta is None:
        kind = "default" if found.scaling is None else found.scaling["rope_type"]
        raise ValueError(
            f"config.json rope_parameters of type {kind} with {BETA}={beta} is not supported for "
            "family 'ministral3'; only yarn with a number"
        )
    return replace(found, scaling={**found.scaling, BETA: float(beta)})


def from_hf3(hf: dict[str, Any]) -> ModelConfig:
    """Return the Megatron sizes of a Hugging Face Ministral 3 config.

    Raises:
        ValueError: the config asks for something this table does not hold.
    """
    check_keys("ministral3", hf, _READS3)
    known = {**_DEFAULTS3, **hf}
    dense = llama.dense(known, _rope3(known))
    return replace(dense, family="ministral3", window_size=windows.everywhere(known), hf=dict(hf))


def to_hf3(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a (pruned) model."""
    return {
        **llama.to_hf(config),
        "architectures": ["Ministral3ForCausalLM"],
        "model_type": "ministral3",
        "sliding_window": windows.width_of(config),
    }


_NO_BIASES = "`attention_bias=true` or `mlp_bias=true`: the table has no biases"
MINISTRAL = Family(
    "ministral",
    {"MinistralForCausalLM": "ministral"},
    llama.ROWS,
    from_hf,
    to_hf,
    _READS,
    models="Ministral",
    refuses=(*REFUSED_SCALINGS, _NO_BIASES),
)
MINISTRAL3 = Family(
    "ministral3",
    {"Ministral3ForCausalLM": "ministral3"},
    llama.ROWS,
    from_hf3,
    to_hf3,
    _READS3,
    models="Ministral 3 (text)",
    refuses=(
        "`rope_parameters` other than `yarn` with `llama_4_scaling_beta`: transformers has none",
        _NO_BIASES,
        "images: only the text model opens",
    ),
    layer_spec="nemo_minitron.models.ministral_spec:block_spec",
)
