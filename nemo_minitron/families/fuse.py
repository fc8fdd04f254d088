"""How several Hugging Face tensors become one Megatron tensor, and back.

Keyed by what dim 0 of the Megatron tensor holds (``families.table.DIM_SIZES``), so a table row
needs no code. Only rows are moved: every function is exact in every dtype.
Letters: g query groups, n heads, d head dim, f ffn, `...` the other dims.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.table import DIM_SIZES, Row


@dataclass(frozen=True)
class Fusion:
    """One way of packing rows.

    Attributes:
        sizes: rows of each part, in the order of ``Row.hf``.
        fuse: parts -> Megatron tensor.
        split: Megatron tensor -> parts.
    """

    sizes: Callable[[ModelConfig], tuple[int, ...]]
    fuse: Callable[[ModelConfig, Sequence[Tensor]], Tensor]
    split: Callable[[ModelConfig, Tensor], list[Tensor]]


def _qkv_sizes(config: ModelConfig) -> tuple[int, ...]:
    d = config.kv_channels
    kv = config.num_query_groups * d
    return config.num_attention_heads * d, kv, kv


def _fuse_qkv(config: ModelConfig, parts: Sequence[Tensor]) -> Tensor:
    """[n*d, ...], [g*d, ...], [g*d, ...] -> [g * (n/g + 2) * d, ...].

    Megatron interleaves per query group: [q_1 .. q_{n/g}, k, v].
    """
    rest = parts[0].shape[1:]
    grouped = [part.view(config.num_query_groups, -1, *rest) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def _split_qkv(config: ModelConfig, tensor: Tensor) -> list[Tensor]:
    """Inverse of ``_fuse_qkv``."""
    d = config.kv_channels
    grouped = tensor.view(config.num_query_groups, -1, *tensor.shape[1:])
    parts = grouped.split([config.heads_per_group * d, d, d], dim=1)
    # A clone, so that a part does not keep the whole alive.
    return [part.clone(memory_format=torch.contiguous_format).flatten(0, 1) for part in parts]


def _halves(size: Callable[[ModelConfig], int], config: ModelConfig) -> tuple[int, ...]:
    return size(config), size(config)


def _fuse_gate_up(_: ModelConfig, parts: Sequence[Tensor]) -> Tensor:
    """[f, ...], [f, ...] -> [2 * f, ...]."""
    return torch.cat(list(parts))


def _split_gate_up(_: ModelConfig, tensor: Tensor) -> list[Tensor]:
    """Inverse of ``_fuse_gate_up``."""
    return [part.clone() for part in tensor.chunk(2)]


FUSIONS: dict[str, Fusion] = {
    "qkv": Fusion(_qkv_sizes, _fuse_qkv, _split_qkv),
    "gate_up": Fusion(partial(_halves, DIM_SIZES["ffn"]), _fuse_gate_up, _split_gate_up),
    "expert_gate_up": Fusion(
        partial(_halves, DIM_SIZES["expert_ffn"]), _fuse_gate_up, _split_gate_up
    ),
    "shared_expert_gate_up": Fusion(
        partial(_halves, DIM_SIZES["shared_expert_ffn"]), _fuse_gate_up, _split_gate_up
    ),
}


def hf_shapes(row: Row, config: ModelConfig) -> list[tuple[int, ...]]:
    """Shapes of the Hugging Face tensors of a row, in the order of ``row.hf``."""
    rest = tuple(DIM_SIZES[dim](config) for dim in row.dims[1:])
    if len(row.hf) == 1:
        return [row.shape(config)]
    return [(size, *rest) for size in FUSIONS[row.dims[0]].sizes(config)]
