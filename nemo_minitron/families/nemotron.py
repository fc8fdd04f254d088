"""Nemotron-4 and Minitron: LayerNorm1P, an ungated squared-ReLU MLP, partly rotated heads.

Norm weights are stored as their distance from 1 by both sides
(``layernorm_zero_centered_gamma``). Linear layers have no biases, norms do.
"""

from dataclasses import replace
from typing import Any

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families import llama
from nemo_minitron.families.config_json import check_keys
from nemo_minitron.families.rope import REFUSED_SCALINGS, read_rope
from nemo_minitron.families.table import Family, Row

_LAYER = "decoder.layers.{layer}."
_HF_LAYER = "model.layers.{layer}."


def norm_bias(row: Row) -> Row:
    """Return the row of the bias that belongs to the row of a norm's weight."""
    return replace(
        row,
        name=row.name.removesuffix("weight") + "bias",
        hf=tuple(name.removesuffix("weight") + "bias" for name in row.hf),
        te_name=None if row.te_name is None else row.te_name.removesuffix("weight") + "bias",
    )


ROWS = (
    *(row for row in llama.ROWS if "linear_fc1" not in row.name),
    *(norm_bias(row) for row in llama.ROWS if "layernorm" in row.name),
    Row(
        _LAYER + "mlp.linear_fc1.weight", ("ffn", "hidden"), 0, (_HF_LAYER + "mlp.up_proj.weight",)
    ),
)

# What transformers' NemotronConfig takes where config.json says nothing. It does not look at
# rope_percent, which the first of these models had as well.
_DEFAULTS = {"max_position_embeddings": 4096}
_DEFAULT_ROTARY = 0.5
_NOT_ITS = ("rms_norm_eps", "sliding_window")
READS = (llama.READS - {"rms_norm_eps"}) | {"norm_eps", "rope_percent"}


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the Megatron sizes of a Hugging Face Nemotron config.

    Raises:
        ValueError: the config asks for something this table does not hold.
    """
    check_keys("nemotron", hf, READS)
    if hf.get("hidden_act", "relu2") != "relu2":
        raise ValueError(f"config.json hidden_act={hf['hidden_act']} is not supported; only relu2")
    rope = read_rope(hf, share=_DEFAULT_ROTARY)
    known = {**_DEFAULTS, **hf, "hidden_act": "silu"}
    llama.refuse_window(known)
    dense = llama.dense(known, rope)
    return replace(
        dense,
        family="nemotron",
        normalization="LayerNorm",
        layernorm_zero_centered_gamma=True,
        layernorm_epsilon=hf.get("norm_eps", 1e-5),
        gated_linear_unit=False,
        activation="squared_relu",
        hf=dict(hf),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a (pruned) model."""
    carried = {key: value for key, value in config.hf.items() if key not in READS}
    written = {
        **llama.to_hf(replace(config, hf=carried)),
        "architectures": ["NemotronForCausalLM"],
        "model_type": "nemotron",
        "hidden_act": "relu2",
        "norm_eps": config.layernorm_epsilon,
        "partial_rotary_factor": config.rotary_percent,
        "attention_bias": False,
        "mlp_bias": False,
    }
    return {key: value for key, value in written.items() if key not in _NOT_ITS}


NEMOTRON = Family(
    "nemotron",
    {"NemotronForCausalLM": "nemotron"},
    ROWS,
    from_hf,
    to_hf,
    READS,
    models="Nemotron-4, Minitron",
    refuses=(
        "`attention_bias=true` or `mlp_bias=true`: the table has biases for norms only",
        "`hidden_act` other than `relu2`",
        *REFUSED_SCALINGS,
    ),
)
