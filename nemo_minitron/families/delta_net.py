"""Gated delta nets beside gated attention: their rows, and their part of config.json.

A layer has one or the other. The delta net (2412.06464) keeps a state for each head of its values,
forgets by a gate and writes by the delta rule; attention multiplies what its heads put out by the
sigmoid of a gate. All norms but the one inside the delta net multiply by 1 + weight.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from nemo_minitron.config.axes import NEVER_PRUNED
from nemo_minitron.config.layers import ATTENTION, LINEAR
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.model_checks import LINEAR_SIZES
from nemo_minitron.families import llama, qwen
from nemo_minitron.families.config_json import words
from nemo_minitron.families.table import Row

_LAYER, _HF_LAYER = "decoder.layers.{layer}.", "model.layers.{layer}."
_MIXER, _HF_MIXER = _LAYER + "self_attention.", _HF_LAYER + "linear_attn."
_PARTS = ("query", "key", "value")

READS = words("layer_types full_attention_interval") | frozenset(LINEAR_SIZES)
"""Keys of config.json that ``read_layers`` reads."""
DEFAULTS = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "full_attention_interval": 4,
    "head_dim": 256,
    "max_position_embeddings": 32768,
}
"""What transformers takes where config.json says nothing."""
LAYER_SPEC = "nemo_minitron.models.delta_spec:block_spec"
LEFT_OUT = "mtp."
"""What the names of tensors of layers for multi-token prediction start with (``Family``)."""
ROTATED = 0.25
"""The part of a head that is rotated, likewise."""
REFUSES = (
    f"pruning {', '.join(f'`{name}`' for name in NEVER_PRUNED)}: "
    + next(iter(NEVER_PRUNED.values())),
    "layers that are all of linear attention, or none of them",
    "`rope_scaling` of type `yarn`, as a part of each head is rotated",
    "writing text (`generate`, `benchmark`, tasks that write): Megatron-Core's gated delta net "
    "keeps no state from one token to the next",
    "SFT records that share a sample (`data.pack`), and documents that share one: the state would "
    "go on from one to the next",
    "Megatron-Core before 0.19, whose gated delta net is another one",
    "layers for multi-token prediction (`mtp.*`): `source_ignore=[num_nextn_predict_layers]` "
    "leaves them out",
)
"""What the documentation says of gated delta nets."""
_WORDS = ("full_attention", "linear_attention")


def _linear(name: str, dims: tuple[str, ...], tp_dim: int | None, hf: str, **more: Any) -> Row:
    return Row(_MIXER + name, dims, tp_dim, (_HF_MIXER + hf,), kind=LINEAR, **more)


def _linear_rows(projections: Mapping[str, str]) -> tuple[Row, ...]:
    """Return rows of a gated delta net.

    Args:
        projections: name of each Hugging Face projection of the input -> what its rows are.
    """
    return (
        Row(
            _MIXER + "in_proj.weight",
            ("linear_in", "hidden"),
            0,
            tuple(f"{_HF_MIXER}{name}.weight" for name in projections),
            hf_dims=tuple(projections.values()),
            parts_on_disk=(*_PARTS, "z", "beta", "alpha"),
            kind=LINEAR,
        ),
        _linear(
            "conv1d.weight",
            ("linear_conv", "one", "linear_conv_width"),
            0,
            "conv1d.weight",
            parts_on_disk=_PARTS,
        ),
        _linear("A_log", ("linear_value_head",), 0, "A_log"),
        _linear("dt_bias", ("linear_value_head",), 0, "dt_bias"),
        _linear("out_norm.weight", ("linear_value_dim",), None, "norm.weight"),
        _linear("out_proj.weight", ("hidden", "linear_inner"), 1, "out_proj.weight"),
    )


def _attention_rows(row: Row) -> Iterator[Row]:
    """A row of Llama's as a layer with attention has it, and one without."""
    if "input_layernorm" in row.name:
        yield replace(row, kind=ATTENTION)
        yield replace(row, kind=LINEAR, te_name=_MIXER + "in_proj.layer_norm_weight")
    elif "linear_qkv" in row.name:
        holds = ("query_and_gate", "query_group", "query_group")
        yield replace(row, kind=ATTENTION, dims=("gated_qkv", *row.dims[1:]), hf_dims=holds)
    elif ".self_attention." in row.name:
        yield replace(row, kind=ATTENTION)
    else:
        yield row


def dense_rows(projections: Mapping[str, str]) -> tuple[Row, ...]:
    """Rows of a network whose layers all have an MLP; ``projections`` as in ``_linear_rows``."""
    rows = (*llama.ROWS, *qwen.QK_NORMS)
    return (
        *(found for row in rows for found in _attention_rows(row)),
        *_linear_rows(projections),
    )


def read_layers(known: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of ModelConfig that every network with gated delta nets has.

    Args:
        known: config.json with the defaults of the family.

    Raises:
        ValueError: a layer is of no known kind, or all are of one.
    """
    layers, every = known["num_hidden_layers"], known["full_attention_interval"]
    kinds = known.get("layer_types")
    kinds = kinds or [_WORDS[bool((layer + 1) % every)] for layer in range(layers)]
    strange = [kind for kind in kinds if kind not in _WORDS]
    if strange or len(kinds) != layers or len({*kinds}) != 2:
        raise ValueError(
            f"config.json layer_types={kinds} with num_hidden_layers={layers} is not supported; "
            f"only one of {' and '.join(_WORDS)} for each layer, and at least one layer of each"
        )
    return {
        "linear_attention_freq": [_WORDS.index(kind) for kind in kinds],
        **{name: known[name] for name in LINEAR_SIZES},
        "attention_output_gate": True,
        "qk_layernorm": True,
        "layernorm_zero_centered_gamma": True,
    }


def written_layers(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of config.json about gated delta nets."""
    return {
        "layer_types": [_WORDS[entry] for entry in config.linear_attention_freq or []],
        **{name: getattr(config, name) for name in LINEAR_SIZES},
        "partial_rotary_factor": config.rotary_percent,
    }
