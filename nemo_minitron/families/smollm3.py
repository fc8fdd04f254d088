"""SmolLM3: Llama's network, in which some layers do not rotate queries and keys (NoPE).

By default every fourth layer does not rotate. If there are sliding windows, those layers have them.
"""

from dataclasses import replace
from typing import Any

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families import llama, qwen, windows
from nemo_minitron.families.config_json import check_keys, words
from nemo_minitron.families.rope import REFUSED_SCALINGS, read_rope
from nemo_minitron.families.table import Family

READS = qwen.READS | words("no_rope_layers no_rope_layer_interval")
# What transformers' SmolLM3Config takes where config.json says nothing.
_DEFAULTS = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
_ROPE_THETA = 2000000.0


def _rotates(hf: dict[str, Any]) -> list[int]:
    """For each layer 1 if it rotates queries and keys, else 0, as transformers reads it.

    Raises:
        ValueError: there is not one entry for each layer.
    """
    layers, stated = hf["num_hidden_layers"], hf.get("no_rope_layers")
    if stated is None:
        interval = hf.get("no_rope_layer_interval", 4)
        return [int((layer + 1) % interval != 0) for layer in range(layers)]
    if len(stated) != layers:
        raise ValueError(
            f"config.json no_rope_layers is of {len(stated)} layers, but num_hidden_layers={layers}"
        )
    return [int(bool(rotates)) for rotates in stated]


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the Megatron sizes of a Hugging Face SmolLM3 config.

    Raises:
        ValueError: the config asks for something this table does not hold.
    """
    check_keys("smollm3", hf, READS)
    rope = llama.whole(read_rope(hf, base=_ROPE_THETA))
    known = {**_DEFAULTS, **hf}
    sizes = llama.dense(known, rope)
    skips = [1 - rotates for rotates in _rotates(hf)]
    seen = windows.by_layer(known, lambda layer: bool(skips[layer]))
    return replace(sizes, family="smollm3", no_rope_freq=skips, window_size=seen, hf=dict(hf))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a (pruned) model; every layer's rotation is written out."""
    skips = config.no_rope_freq or [0] * config.num_layers
    carried = {key: value for key, value in config.hf.items() if key not in READS}
    return {
        **llama.to_hf(replace(config, hf=carried)),
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "no_rope_layers": [1 - skip for skip in skips],
        **windows.written(config),
    }


SMOLLM3 = Family(
    "smollm3",
    {"SmolLM3ForCausalLM": "smollm3"},
    llama.ROWS,
    from_hf,
    to_hf,
    READS,
    models="SmolLM3",
    refuses=(
        *REFUSED_SCALINGS,
        "`attention_bias=true` or `mlp_bias=true`: the table has no biases",
    ),
)
