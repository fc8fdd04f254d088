"""Granite 3: Llama's network with four numbers that multiply what passes through it.

They are those of muP (2203.03466): of the embeddings, of the scores of attention, of what every
attention and MLP adds to the residual stream, and of the logits. ``models/granite_spec.py`` and
``models.build`` apply them.
"""

from dataclasses import replace
from typing import Any

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families import llama
from nemo_minitron.families.config_json import check_keys
from nemo_minitron.families.rope import REFUSED_SCALINGS
from nemo_minitron.families.table import Family

# ModelConfig.multipliers -> the key of config.json; 1 where config.json says nothing.
_KEYS = {
    "embedding": "embedding_multiplier",
    "attention": "attention_multiplier",
    "residual": "residual_multiplier",
    "logits": "logits_scaling",
}
READS = (llama.READS - {"sliding_window"}) | set(_KEYS.values())


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the Megatron sizes of a Hugging Face Granite config.

    Raises:
        ValueError: the config asks for something this table does not hold.
    """
    check_keys("granite", hf, READS)
    numbers = {name: float(hf.get(key, 1)) for name, key in _KEYS.items()}
    return replace(llama.dense(hf), family="granite", multipliers=numbers, hf=dict(hf))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a (pruned) model."""
    numbers = config.multipliers or {}
    carried = {key: value for key, value in config.hf.items() if key not in READS}
    return {
        **llama.to_hf(replace(config, hf=carried)),
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        **{key: numbers.get(name, 1.0) for name, key in _KEYS.items()},
    }


GRANITE = Family(
    "granite",
    {"GraniteForCausalLM": "granite"},
    llama.ROWS,
    from_hf,
    to_hf,
    READS,
    models="Granite 3.0 to 3.3",
    refuses=(
        *REFUSED_SCALINGS,
        "`attention_bias=true` or `mlp_bias=true`: the table has no biases",
    ),
    layer_spec="nemo_minitron.models.granite_spec:block_spec",
)
