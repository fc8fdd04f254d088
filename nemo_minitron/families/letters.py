"""Tables of GPT families whose model is a HybridModel of Megatron-Core: one letter, one layer.

A layer of a GPT model is two there: attention (``*``), then an MLP (``-``) or experts (``E``), each
with the norm before it. The tensors are the same; their layers have other numbers, and the last
norm another name.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nemo_minitron.config.layers import ATTENTION, EXPERTS, MAMBA, MLP, kinds_of
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.table import COMMON_SPEC, Family, Row

_LAYER = "decoder.layers.{layer}."
_SPEC = "nemo_minitron.models.hybrid_spec:stack_spec"
_OF_LAYERS = ("no_rope_freq", "window_size")
_MAMBA_SIZES = ("mamba_num_heads", "mamba_head_dim", "mamba_num_groups", "mamba_state_dim")


def is_hybrid(family: Family) -> bool:
    """Whether all models of the family are HybridModel."""
    return "is_hybrid_model" in family.megatron


def takes_letters(family: Family, pattern: str) -> bool:
    """Whether a model of the family can be a HybridModel with these letters."""
    if is_hybrid(family):
        return True
    common = family.layer_spec == COMMON_SPEC and "multi_latent_attention" not in family.megatron
    return common and MAMBA not in pattern and not {MLP, EXPERTS} <= {*pattern}


def by_letters(family: Family, config: ModelConfig) -> Family:
    """Return the family as a model of it needs it: itself, or its table for a HybridModel.

    Raises:
        ValueError: no model of the family is one of these letters.
    """
    pattern = config.hybrid_layer_pattern
    if pattern is None or is_hybrid(family):
        return family
    if not takes_letters(family, pattern):
        raise ValueError(
            f"hybrid_layer_pattern={pattern} is not supported for family '{family.name}'; only "
            "letters of attention (*) with MLP (-) or with experts (E), and only in families whose "
            "layers are Megatron-Core's own; leave as_hybrid out for a GPT model"
        )
    routed = any(".router." in row.name for row in family.rows)
    return replace(
        family,
        rows=tuple(
            _row(row, EXPERTS if routed else MLP) for row in family.rows if not row.predicts
        ),
        to_hf=lambda small: family.to_hf(of_whole_layers(family, small)),
        layer_spec=_SPEC,
        megatron={**family.megatron, "is_hybrid_model": True},
    )


def _row(row: Row, mlp: str) -> Row:
    """Return a row of a GPT family, with the letter of the layers that have it."""
    if not row.per_layer:
        return replace(
            row, name=row.name.replace("decoder.final_layernorm.", "decoder.final_norm.")
        )
    part = row.name.removeprefix(_LAYER)
    letter = mlp if part.startswith(("mlp.", "pre_mlp_layernorm.")) else ATTENTION
    # Attention and MLP of one layer of Hugging Face are neighbours.
    hf = tuple(name.replace("{layer}", "{pair}") for name in row.hf)
    return replace(row, kind=row.kind or letter, hf=hf)


def in_letters(config: ModelConfig) -> ModelConfig:
    """Return sizes of the HybridModel with the same tensors as a GPT model (``as_hybrid``).

    Raises:
        ValueError: HybridModel has no such model.
    """
    if config.hybrid_layer_pattern is not None:
        return config
    if (config.rope_scaling or {}).get("rope_type") == "llama3":
        raise ValueError(
            "as_hybrid=true is not supported for a model with rope_scaling of type llama3, which "
            "Megatron-Core's HybridModel does not have; set as_hybrid to false"
        )
    lists = {name: getattr(config, name) for name in _OF_LAYERS}
    doubled: dict[str, Any] = {
        name: entries and [entry for entry in entries for _ in "*-"]
        for name, entries in lists.items()
    }
    return replace(
        config,
        num_layers=2 * config.num_layers,
        hybrid_layer_pattern="".join(kinds_of(config)),
        moe_layer_freq=None,
        **doubled,
    )


def name_of_pair(name: str) -> str:
    """Name in the GPT model of a parameter of the HybridModel."""
    name = name.replace("decoder.final_norm.", "decoder.final_layernorm.")
    return re.sub(
        r"^(decoder\.layers\.)(\d+)", lambda found: f"{found[1]}{int(found[2]) // 2}", name
    )


def of_whole_layers(family: Family, config: ModelConfig) -> ModelConfig:
    """Return sizes of the GPT model with the same tensors.

    Raises:
        ValueError: the layers are not pairs of attention and MLP, or of attention and experts.
    """
    pattern = config.hybrid_layer_pattern
    if pattern is None:
        return config
    if not re.fullmatch(r"(\*-)+|(\*E)+", pattern):
        raise ValueError(
            f"hybrid_layer_pattern={pattern} has no Hugging Face format in family '{family.name}', "
            "whose layers are attention (*) and then an MLP (-) or experts (E); drop both of a pair"
        )
    fields = {name: getattr(config, name) for name in _OF_LAYERS}
    return replace(
        config,
        hybrid_layer_pattern=None,
        num_layers=config.num_layers // 2,
        kept_layers=[layer // 2 for layer in config.kept_layers[::2]],
        **{name: entries and entries[::2] for name, entries in fields.items()},
    )


def without_letters(family: Family, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of ModelConfig, for a GPT family those of a GPT model with as many layers."""
    pattern = fields.get("hybrid_layer_pattern")
    if pattern is None or is_hybrid(family):
        return dict(fields)
    left = {name: value for name, value in fields.items() if name not in _MAMBA_SIZES}
    if MLP not in pattern:  # no layer has this width
        left["ffn_hidden_size"] = left["moe_ffn_hidden_size"]
    return {**left, "hybrid_layer_pattern": None}
