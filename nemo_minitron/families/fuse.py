"""How several Hugging Face tensors become one Megatron tensor, and back.

What dim 0 of the Megatron tensor holds (``families.dims.DIMS``) says it, and what dim 0 of the
others holds where each is more than a part of it (``Row.hf_dims``), so a table row needs no code.
One Hugging Face tensor whose values lie in another order has a *form* (``Row.hf_form``).
Values are only moved: every function is exact in every dtype.
Letters: g query groups, n heads, d head dim, `...` the other dims.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.dims import DIMS, Dim, Run
from nemo_minitron.families.table import Row


def fuse(dim: Dim, config: ModelConfig, parts: Sequence[Tensor]) -> Tensor:
    """Return the parts of a dim -> the rows as they lie in the Megatron tensor."""
    return torch.cat([parts[part][start:stop] for part, start, stop in dim.runs(config)])


def rows_of_part(dim: Dim, config: ModelConfig, part: int) -> list[Run]:
    """Return rows of the Megatron tensor in the order of one part of the dim."""
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


def _located(dim: Dim, config: ModelConfig, part: int, start: int, stop: int) -> Iterator[Run]:
    """Find where rows ``start`` to ``stop`` of a part lie in the tensor of a dim."""
    place = 0
    for _, low, high in rows_of_part(dim, config, part):
        first, last = max(start, place), min(stop, place + high - low)
        if first < last:
            yield 0, low + first - place, low + last - place
        place += high - low


def runs_from_hf(row: Row, config: ModelConfig) -> list[Run]:
    """Return rows of the Hugging Face tensors (by number) in the order of the Megatron tensor."""
    runs = DIMS[row.dims[0]].runs(config)
    if not row.hf_dims:
        return list(runs)
    holds = [
        (number, dim, part)
        for number, dim in enumerate(DIMS[name] for name in row.hf_dims)
        for part in range(len(dim.parts))
    ]
    return [
        (number, first, last)
        for part, start, stop in runs
        for number, dim, inner in holds[part : part + 1]
        for _, first, last in _located(dim, config, inner, start, stop)
    ]


def runs_to_hf(row: Row, config: ModelConfig, number: int) -> list[Run]:
    """Return rows of the Megatron tensor in the order of one of the Hugging Face tensors."""
    whole = DIMS[row.dims[0]]
    if not row.hf_dims:
        return rows_of_part(whole, config, number)
    before = sum(len(DIMS[name].parts) for name in row.hf_dims[:number])
    return [
        place
        for part, start, stop in DIMS[row.hf_dims[number]].runs(config)
        for place in _located(whole, config, before + part, start, stop)
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
    """Return shapes of the Hugging Face tensors of a row, in the order of ``row.hf``."""
    if row.hf_form is not None and HF_FORMS[row.hf_form].transposed:
        return [row.shape(config)[::-1]]
    rest = row.shape(config)[1:]
    if row.hf_dims:
        return [(DIMS[name].size(config), *rest) for name in row.hf_dims]
    if len(row.hf) == 1:
        return [row.shape(config)]
    return [(size, *rest) for size in DIMS[row.dims[0]].part_sizes(config)]
