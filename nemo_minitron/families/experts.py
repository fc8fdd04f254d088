"""Rows of families with experts, and sizes of experts that not every program can multiply."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from nemo_minitron.config.layers import EXPERTS, MLP
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.table import Row

log = logging.getLogger(__name__)

# torch's grouped matrix product, with which transformers runs all experts at once, wants the rows
# of both matrices of an expert to be whole multiples of this.
_ROW_BYTES = 16
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# The shared expert is multiplied on its own, at any width.
_SIZES = ("hidden_size", "moe_ffn_hidden_size")


def before_experts(rows: Iterable[Row]) -> Iterator[Row]:
    """Rows of a dense family; the norm before experts is not fused under Transformer Engine either.

    Megatron-LM with ``--transformer-impl local`` stores it as if it were.
    """
    for row in rows:
        norm = "pre_mlp_layernorm" in row.name
        yield replace(row, te_name=None, stored_as=row.te_name) if norm else row


def beside_dense(dense: Iterable[Row], routed: Iterable[Row]) -> tuple[Row, ...]:
    """Rows of a family in which a layer has either an MLP or experts (``moe_layer_freq``).

    Args:
        dense: rows of a family whose layers all have an MLP.
        routed: rows of the router and the experts.
    """
    found: list[Row] = []
    for row in dense:
        norm = "pre_mlp_layernorm" in row.name
        found.append(replace(row, kind=MLP) if norm or ".mlp." in row.name else row)
        if norm:
            found += [replace(other, kind=EXPERTS) for other in before_experts([row])]
    return (*found, *(replace(row, kind=EXPERTS) for row in routed))


def dense_layers(routed: list[int] | None, width: int, dense_width: int) -> dict[str, Any]:
    """Fields of ModelConfig that say which layers are dense, and how wide.

    ``ffn_hidden_size``, the width of dense layers, is that of the experts where there are none.

    Args:
        routed: for each layer 1 if it has experts, else 0.
        width: of an expert.
        dense_width: of a dense layer.
    """
    every = routed is None or all(routed)
    return {
        "moe_layer_freq": None if every else routed,
        "moe_ffn_hidden_size": width,
        "ffn_hidden_size": width if every else dense_width,
    }


def warn_of_expert_sizes(config: ModelConfig) -> list[str]:
    """Say which sizes keep transformers from running the experts of a model as it does by default.

    Args:
        config: the model, as it will be exported.

    Returns:
        What was said, a sentence a size; nothing where all is well or there are no experts.
    """
    if not config.num_moe_experts:
        return []
    step = _ROW_BYTES // _BYTES.get(config.dtype, 4)
    found = [
        f"{name}={getattr(config, name)} is no multiple of {step} ({_ROW_BYTES} bytes of "
        f"{config.dtype}): transformers runs the exported experts only with "
        'experts_implementation="eager", slower; take the nearest multiple'
        for name in _SIZES
        if getattr(config, name) % step
    ]
    for line in found:
        log.warning(line)
    return found
