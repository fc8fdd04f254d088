"""Objects that lie beside the tensors of a ``torch_dist`` checkpoint, as other programs want them.

Transformer Engine keeps the fp8 state of every module in an object ``<module>._extra_state``, which
Megatron-LM and Megatron-Bridge ask for whether it says anything or not. All of ours say nothing.
"""

import io
import re
from collections.abc import Iterator
from typing import Any

import torch

from nemo_minitron.checkpoint.torch_dist_read import stack_axes, stacked_name
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.table import Family, Row

Place = tuple[str, tuple[int, ...], tuple[int, ...]]
"""Key, and where in a grid of what shape the object lies: a layer, or a layer and an expert."""

# Modules of Transformer Engine that have a state. Megatron takes the output layer's away itself.
_WITH_STATE = re.compile(r"linear_\w+|\w*layernorm|core_attention")
_QKV, _ATTENTION = ".self_attention.linear_qkv", ".self_attention.core_attention"


def _modules(row: Row) -> list[str]:
    """Modules that hold a row under Transformer Engine; attention has no parameter of its own."""
    module = stacked_name(row.te_name or row.name).replace("{layer}.", "").rpartition(".")[0]
    modules = [module, module.replace(_QKV, _ATTENTION)] if module.endswith(_QKV) else [module]
    return [name for name in modules if _WITH_STATE.fullmatch(name.rpartition(".")[2])]


def extra_states(family: Family, config: ModelConfig) -> Iterator[Place]:
    """Places of the objects that a model has under Transformer Engine, each once."""
    seen = set()
    for _, row, layer in family.parameters(config):
        axes = stack_axes(row, layer, config) or [(0, 1)]
        for module in _modules(row):
            place = (
                f"{module}._extra_state",
                tuple(index for index, _ in axes),
                tuple(count for _, count in axes),
            )
            if place not in seen:
                seen.add(place)
                yield place


def name_on_disk(key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """What Megatron calls an object in the metadata: ``linear_qkv._extra_state/shard_3_16``."""
    return f"{key}/shard_{'.'.join(map(str, offset))}_{'.'.join(map(str, shape))}"


def stored(value: Any) -> io.BytesIO:
    """An object as Megatron stores it: pickled, in a list of one."""
    stream = io.BytesIO()
    torch.save([value], stream)
    return stream
