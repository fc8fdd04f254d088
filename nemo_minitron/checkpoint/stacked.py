"""Hugging Face tensors that hold a parameter of all experts, one after another along dim 0.

A row of the table names the part of one expert ``...experts.down_proj[{expert}]``.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from nemo_minitron.checkpoint.lazy import LazyTensor, Store
from nemo_minitron.families.table import Family

_EXPERT = "[{expert}]"


def _ends(family: Family) -> tuple[str, ...]:
    """Return the endings of the names of tensors that hold all experts."""
    names = (name for row in family.rows for name in row.hf if name.endswith(_EXPERT))
    return tuple(name.partition("{layer}")[2].removesuffix(_EXPERT) for name in names)


def _part(whole: LazyTensor, expert: int) -> LazyTensor:
    """Return the rows of one expert from a tensor that holds all experts."""

    def read() -> Tensor:
        if whole.read_rows is None:
            return whole.read()[expert].clone()
        return whole.read_rows(expert, expert + 1)[0]

    return LazyTensor(whole.shape[1:], whole.dtype, read, origin=whole.origin)


def unstacked(family: Family, store: Store) -> Store:
    """Return a store with one tensor for each expert in place of one for all experts."""
    ends, found = _ends(family), Store()
    for name, tensor in store.items():
        if not name.endswith(ends) or not tensor.shape:
            found[name] = tensor
            continue
        for expert in range(tensor.shape[0]):
            found[f"{name}[{expert}]"] = _part(tensor, expert)
    return found


def _whole(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Inverse of ``_part``."""

    def read_rows(start: int, stop: int) -> Tensor:
        return torch.stack([part.read() for part in parts[start:stop]])

    shape, dtype = (len(parts), *parts[0].shape), parts[0].dtype
    return LazyTensor(shape, dtype, partial(read_rows, 0, len(parts)), read_rows)


def stacked(store: Store) -> Store:
    """Do the inverse of ``unstacked``: the parts of a tensor are in the order of the experts."""
    parts: dict[str, list[LazyTensor]] = {}
    for name, tensor in store.items():
        parts.setdefault(name.partition("[")[0], []).append(tensor)
    return {
        name: store[name] if name in store else _whole(tensors) for name, tensors in parts.items()
    }
