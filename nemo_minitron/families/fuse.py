"""How several Hugging Face tensors become one Megatron tensor, and back.

Keyed by what dim 0 of the Megatron tensor holds (``families.table.DIM_SIZES``), so a table row
needs no code. One Hugging Face tensor whose values lie in another order has a *form*
(``Row.hf_form``). Values are only moved: every function is exact in every dtype.
Letters: g query groups, n heads, d head dim, f ffn, `...` the other dims.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_minitron.checkpoint.lazy import Run
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.table import DIM_SIZES, Row


@dataclass(frozen=True)
class Fusion:
    """One way of packing rows.

    Attributes:
        sizes: rows of each part, in the order of ``Row.hf``.
        runs: rows of the parts in the order of the Megatron tensor.
    """

    sizes: Callable[[ModelConfig], tuple[int, ...]]
    runs: Callable[[ModelConfig], list[Run]]

    def fuse(self, config: ModelConfig, parts: Sequence[Tensor]) -> Tensor:
        """Parts -> Megatron tensor."""
        return torch.cat([parts[part][start:stop] for part, start, stop in self.runs(config)])

    def places(self, config: ModelConfig, part: int) -> list[Run]:
        """Rows of the Megatron tensor in the order of one part."""
        found, place = [], 0
        for number, start, stop in self.runs(config):
            if number == part:
                found.append((0, place, place + stop - start))
            place += stop - start
        return found

    def split(self, config: ModelConfig, tensor: Tensor) -> list[Tensor]:
        """Inverse of ``fuse``."""
        return [
            torch.cat([tensor[start:stop] for _, start, stop in self.places(config, part)])
            for part in range(len(self.sizes(config)))
        ]


def _qkv_sizes(config: ModelConfig) -> tuple[int, ...]:
    d = config.kv_channels
    kv = config.num_query_groups * d
    return config.num_attention_heads * d, kv, kv


def _qkv_runs(config: ModelConfig) -> list[Run]:
    """Megatron interleaves per query group: [q_1 .. q_{n/g}, k, v]."""
    steps = [config.heads_per_group * config.kv_channels, config.kv_channels, config.kv_channels]
    return [
        (part, group * step, (group + 1) * step)
        for group in range(config.num_query_groups)
        for part, step in enumerate(steps)
    ]


def _gate_up(axis: str) -> Fusion:
    """The gate, then the up projection, of the ffn that ``axis`` sizes."""
    size = DIM_SIZES[axis]
    return Fusion(
        sizes=lambda config: (size(config), size(config)),
        runs=lambda config: [(0, 0, size(config)), (1, 0, size(config))],
    )


_QKV = Fusion(_qkv_sizes, _qkv_runs)
FUSIONS: dict[str, Fusion] = {
    "qkv": _QKV,
    "gate_up": _gate_up("ffn"),
    "expert_gate_up": _gate_up("expert_ffn"),
    "shared_expert_gate_up": _gate_up("shared_expert_ffn"),
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
    return _QKV.fuse(config, packed.split(_qkv_sizes(config)))


def _pack_qkv(config: ModelConfig, tensor: Tensor) -> Tensor:
    """Inverse of ``_interleave_qkv``."""
    return torch.cat(_QKV.split(config, tensor))


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
