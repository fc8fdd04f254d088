"""A model as a list of layers: what each is made of, and its values where layers differ.

A field of ``ModelConfig`` whose metadata is ``PER_LAYER`` holds one entry per layer, or None where
no layer has anything of its own. Everything here also takes Megatron's ``TransformerConfig``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

PER_LAYER: Mapping[str, Any] = {"per_layer": True}
"""Metadata of a field that holds one entry per layer."""
ATTENTION, MLP, EXPERTS = "*", "-", "E"
"""What a layer can be made of, in the letters of Megatron's hybrid models."""


@dataclass(frozen=True)
class Layer:
    """One layer of a model.

    Attributes:
        kinds: the letters of what it is made of, in the order of the forward pass.
        values: its entry of every per-layer field that is set.
    """

    kinds: str
    values: Mapping[str, Any]


def per_layer_fields(config: Any) -> tuple[str, ...]:
    """Names of the fields that hold one entry per layer."""
    return tuple(field.name for field in fields(config) if field.metadata.get("per_layer"))


def layers_of(config: Any) -> list[Layer]:
    """The layers of a model in order. A GPT layer is attention, then an MLP or experts."""
    kinds = ATTENTION + (MLP if config.num_moe_experts is None else EXPERTS)
    lists = {name: getattr(config, name) for name in per_layer_fields(config)}
    lists = {name: values for name, values in lists.items() if values is not None}
    return [
        Layer(kinds, {name: values[index] for name, values in lists.items()})
        for index in range(config.num_layers)
    ]


def entries_of(config: Any, layers: Sequence[int]) -> dict[str, list[Any]]:
    """Entries of the per-layer fields that are set, for some of the layers (0-based)."""
    lists = {name: getattr(config, name) for name in per_layer_fields(config)}
    return {
        name: [values[layer] for layer in layers]
        for name, values in lists.items()
        if values is not None
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
