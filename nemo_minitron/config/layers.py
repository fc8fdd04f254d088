"""A model as a list of layers: what each is made of, and its values where layers differ.

A field of ``ModelConfig`` whose metadata is ``PER_LAYER`` holds one entry per layer, or None where
no layer has anything of its own. Everything here also takes Megatron's ``TransformerConfig``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

OPTIONAL: Mapping[str, Any] = {"optional": True}
"""Metadata of a field that ``model.yaml`` leaves out at its default, so that a model which does not
use it has the file that versions without the field write."""
PER_LAYER: Mapping[str, Any] = {**OPTIONAL, "per_layer": True}
"""Metadata of a field that holds one entry per layer."""
ATTENTION, MLP, EXPERTS, MAMBA, LINEAR = "*", "-", "E", "M", "G"
"""What a layer can be made of, in the letters of Megatron's hybrid models; the last one is linear
attention, a gated delta net."""


def per_layer_fields(config: Any) -> tuple[str, ...]:
    """Return names of the fields that hold one entry per layer."""
    return tuple(field.name for field in fields(config) if field.metadata.get("per_layer"))


def kinds_of(config: Any) -> list[str]:
    """Return the letters of every layer.

    A layer of a hybrid model is of one kind. A GPT layer is attention or linear attention, then an
    MLP or experts, whichever of the two this layer has.
    """
    pattern = getattr(config, "hybrid_layer_pattern", None)
    if pattern is not None:
        return list(pattern)
    routed = config.moe_layer_freq
    if not isinstance(routed, list):  # Megatron's configuration says 1 where all layers are alike
        routed = [config.num_moe_experts is not None] * config.num_layers
    linear = getattr(config, "linear_attention_freq", None) or [0] * config.num_layers
    return [
        (LINEAR if delta else ATTENTION) + (EXPERTS if has else MLP)
        for delta, has in zip(linear, routed, strict=True)
    ]


def check_pattern(pattern: str) -> None:
    """Check the letters of a hybrid model.

    Raises:
        ValueError: names the letters that are not supported.
    """
    strange = sorted(set(pattern) - {ATTENTION, MLP, EXPERTS, MAMBA})
    if strange:
        raise ValueError(
            f"hybrid_layer_pattern={pattern} holds {' '.join(strange)}; supported are M (Mamba-2), "
            "* (attention), - (MLP) and E (experts), one letter per layer"
        )


def entries_of(config: Any, layers: Sequence[int]) -> dict[str, Any]:
    """Return entries of the per-layer fields that are set, for some of the layers (0-based).

    A string of letters stays a string, every other field is a list.
    """
    lists = {name: getattr(config, name) for name in per_layer_fields(config)}
    found = {
        name: [values[layer] for layer in layers]
        for name, values in lists.items()
        if values is not None
    }
    return {
        name: "".join(values) if isinstance(lists[name], str) else values
        for name, values in found.items()
    }


def check_lengths(config: Any) -> None:
    """Check that every per-layer field has one entry for each layer.

    Raises:
        ValueError: names the field, its length and the number of layers.
    """
    for name in per_layer_fields(config):
        values = getattr(config, name)
        if values is not None and len(values) != config.num_layers:
            raise ValueError(
                f"{name} has {len(values)} entries, but num_layers={config.num_layers}; it needs "
                "one for each layer"
            )
