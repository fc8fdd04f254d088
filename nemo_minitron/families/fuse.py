"""How several Hugging Face tensors become one Megatron tensor, and back.

What dim 0 of the Megatron tensor holds (``families.dims.DIMS``) says it, so a table row needs no
code. One Hugging Face tensor whose values lie in another order has a *form* (``Row.hf_form``).
Values are only moved: every function is exact in every dtype.
Letters: g query groups, n heads, d head dim, `...` the other dims.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.dims import DIMS, Dim, Run
from nemo_minitron.families.table import Row


def fuse(dim: Dim, config: ModelConfig, parts: Sequence[Tensor]) -> Tensor:
    """The parts of a dim -> the rows as they lie in the Megatron tensor."""
    return torch.cat([parts[part][start:stop] for part, start, stop in dim.runs(config)])


def rows_of_part(dim: Dim, config: ModelConfig, part: int) -> list[Run]:
    """Rows of the Megatron tensor in the order of one part of the dim."""
    found, place = [], 0
    for number, start, stop in dim.runs(config):
        if number == part:
            found.append((0, place, place + stop - start))
        place += stop - start
    return found


def split(dim: Dim, config: ModelConfig, tensor: Tensor) -> list[Tensor]:
    """Inverse of ``fuse``."""
    return [
        torch.cat([tensor[start:stop] for _, start, stop in rows_of_part(dim, config, part)])
        for part in range(len(dim.parts))
    ]


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
    return fuse(DIMS["qkv"], config, packed.split(DIMS["qkv"].part_sizes(config)))


def _pack_qkv(config: ModelConfig, tensor: Tensor) -> Tensor:
    """Inverse of ``_interleave_qkv``."""
    return torch.cat(split(DIMS["qkv"], config, tensor))


def _transpose(_: ModelConfig, tensor: Tensor) -> Tensor:
    return tensor.t().contiguous()


def _interleave_transposed_qkv(config: ModelConfig, packed: Tensor) -> Tensor:
    """[h, (n + 2g) * d] -> [g * (n/g + 2) * d, h]."""
    return _interleave_qkv(config, _transpose(config, packed))


def _pack_transposed_qkv(config: ModelConfig, tensor: Tensor) -> Tensor:
    """Inverse of ``_interleave_transposed_qkv``."""
    return _transpose(config, _pack_qkv(config, tensor))


def _apart(_: ModelConfig, packed: Tensor) -> Tensor:
    """Rows of gate and up by turns [2f, ...] -> those of the gate, then those of up."""
    return torch.cat([packed[::2], packed[1::2]])


def _by_turns(_: ModelConfig, tensor: Tensor) -> Tensor:
    """Inverse of ``_apart``."""
    return torch.stack(tensor.chunk(2), dim=1).flatten(0, 1)


def _apart_transposed(config: ModelConfig, packed: Tensor) -> Tensor:
    """[h, 2f] -> [2f, h]."""
    return _apart(config, packed.t())


def _by_turns_transposed(config: ModelConfig, tensor: Tensor) -> Tensor:
    """Inverse of ``_apart_transposed``."""
    return _transpose(config, _by_turns(config, tensor))


HF_FORMS: dict[str, HfForm] = {
    "gate_up_by_turns": HfForm(_apart, _by_turns),
    "gate_up_by_turns_transposed": HfForm(_apart_transposed, _by_turns_transposed, transposed=True),
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
    rest = row.shape(config)[1:]
    if len(row.hf) == 1:
        return [row.shape(config)]
    return [(size, *rest) for size in DIMS[row.dims[0]].part_sizes(config)]
