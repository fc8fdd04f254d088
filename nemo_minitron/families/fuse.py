"""How several Hugging Face tensors become one Megatron tensor, and back.

Keyed by what dim 0 of the Megatron tensor holds (``families.table.DIM_SIZES``), so a table row
needs no code. One Hugging Face tensor whose values lie in another order has a *form*
(``Row.hf_form``). Values are only moved: every function is exact in every dtype.
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


@dataclass(frozen=True)
class HfForm:
    """How one Hugging Face tensor becomes one Megatron tensor of other order.

    Attributes:
        to_megatron: Hugging Face tensor -> Megatron tensor, contiguous.
        to_hf: inverse.
        transposed: whether the two dims are swapped.
    """

    to_megatron: Callable[[ModelConfig, Tensor], Tensor]
    to_hf: Callable[[ModelConfig, Tensor], Tensor]
    transposed: bool = False


def _interleave_qkv(config: ModelConfig, packed: Tensor) -> Tensor:
    """All queries, all keys, all values [(n + 2g) * d, ...] -> per query group."""
    return _fuse_qkv(config, packed.split(_qkv_sizes(config)))


def _pack_qkv(config: ModelConfig, tensor: Tensor) -> Tensor:
    """Inverse of ``_interleave_qkv``."""
    return torch.cat(_split_qkv(config, tensor))


def _transpose(_: ModelConfig, tensor: Tensor) -> Tensor:
    return tensor.t().contiguous()


def _interleave_transposed_qkv(config: ModelConfig, packed: Tensor) -> Tensor:
    """[h, (n + 2g) * d] -> [g * (n/g + 2) * d, h]."""
    return _interleave_qkv(config, _transpose(config, packed))


def _pack_transposed_qkv(config: ModelConfig, tensor: Tensor) -> Tensor:
    """Inverse of ``_interleave_transposed_qkv``."""
    return _transpose(config, _pack_qkv(config, tensor))


HF_FORMS: dict[str, HfForm] = {
    "packed_qkv": HfForm(_interleave_qkv, _pack_qkv),
    "transposed": HfForm(_transpose, _transpose, transposed=True),
    "packed_qkv_transposed": HfForm(
        _interleave_transposed_qkv, _pack_transposed_qkv, transposed=True
    ),
}


def hf_shapes(row: Row, config: ModelConfig) -> list[tuple[int, ...]]:
    """Shapes of the Hugging Face tensors of a row, in the order of ``row.hf``."""
    if row.hf_form is not None and HF_FORMS[row.hf_form].transposed:
        return [row.shape(config)[::-1]]
    rest = tuple(DIM_SIZES[dim](config) for dim in row.dims[1:])
    if len(row.hf) == 1:
        return [row.shape(config)]
    return [(size, *rest) for size in FUSIONS[row.dims[0]].sizes(config)]
