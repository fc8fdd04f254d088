"""A plan applied to tensors, through the parameter table. Pure torch.

Everything here is about *global* tensors; the table says which axis each tensor dim holds, and the
plan which indices of that axis stay.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import LongTensor, Tensor

from nemo_minitron.checkpoint.lazy import LazyTensor, Store, on_done, on_read, refuse_nonfinite
from nemo_minitron.checkpoint.torch_dist import read_torch_dist, write_torch_dist
from nemo_minitron.config.axes import AXES, Axis, Scope, axis_size
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.dims import DIMS, Dim
from nemo_minitron.families.registry import family_of
from nemo_minitron.families.table import Family, Row
from nemo_minitron.pruning.compensate import Compensation
from nemo_minitron.pruning.merge import Terms, merge_qkv
from nemo_minitron.pruning.plan import Plan, pruned_config
from nemo_minitron.runtime.console import progress


def _kept_of_axis(
    dim: str, axis: Axis, plan: Plan, position: int | None, expert: int | None
) -> Tensor:
    """Return indices of one axis that stay: of the model, of a layer or of one of its experts."""
    kept = plan[axis.name]
    if axis.scope is not Scope.MODEL:
        if position is None:
            raise ValueError(
                f"a '{dim}' dim needs a layer; fix the family table: only rows with "
                "{layer} in their name can have it"
            )
        kept = kept[position]
    if axis.scope is Scope.EXPERT:
        if expert is None:
            raise ValueError(
                f"a '{dim}' dim needs an expert; fix the family table: only rows with {{expert}} "
                "in their name can have it"
            )
        kept = kept[expert]
    return torch.tensor(kept)


def _kept_rows(dim: Dim, config: ModelConfig, kept: dict[str, Tensor]) -> Tensor:
    """Return rows of a dim that stay.

    Args:
        dim: what it holds.
        config: the model before pruning.
        kept: axis -> indices that stay of it.
    """
    repeats = dim.repeats(config)
    steps = [size // repeats for size in dim.part_sizes(config)]
    owners = kept[dim.interleaved_by].tolist() if dim.interleaved_by else [0]
    rows = []
    for owner in owners:
        start = owner * sum(steps)
        for part, step in zip(dim.parts, steps, strict=True):
            mine, length = kept[part.axis], part.rows(config)
            inner = kept.get(part.inner, torch.arange(length))
            if dim.interleaved_by:  # those of this owner, counted inside it
                each = part.count(config) // repeats
                mine = mine[mine // each == owner] % each
            rows.append(start + (mine[:, None] * length + inner).flatten())
            start += step
    return torch.cat(rows)


CACHE_BYTES = 8 << 20
"""Bytes of an old tensor that are read, looked at and cut at a time: few enough for the cache that
cores share, enough for the time of a call not to matter."""


def dim_indices(
    dim: str, config: ModelConfig, plan: Plan, position: int | None, expert: int | None = None
) -> LongTensor | None:
    """Return indices that stay of one tensor dim.

    Args:
        dim: what the dim holds, a key of ``families.dims.DIMS``.
        config: the model before pruning.
        plan: what to keep.
        position: position of the layer in ``plan.layers``; None for tensors outside the layers.
        expert: position of the expert in ``plan["expert"][position]``; None outside experts.

    Returns:
        Global indices in the order they are stored, or None when all stay.
    """
    held = DIMS[dim]
    kept = {
        axis: _kept_of_axis(dim, AXES[axis], plan, position, expert)
        for axis in {*held.pruned_axes}
        if axis in plan
    }
    if all(len(kept[axis]) == axis_size(config, axis) for axis in kept):
        return None
    return _kept_rows(held, config, kept)  # type: ignore[return-value]  # torch types every result as Tensor


def row_indices(
    row: Row, config: ModelConfig, plan: Plan, position: int | None
) -> tuple[LongTensor | None, ...]:
    """Return indices that stay of each dim of a parameter.

    What is inside a layer for multi-token prediction has no scores and stays whole; such a layer
    follows the axes of the model alone.

    Args:
        row: of the pruned model.
        config: the model before pruning.
        plan: what to keep.
        position: as in ``dim_indices``.
    """
    whole = [
        row.predicts and any(AXES[axis].scope is not Scope.MODEL for axis in DIMS[dim].pruned_axes)
        for dim in row.dims
    ]
    return tuple(
        None if stays else dim_indices(dim, config, plan, position, row.expert)
        for dim, stays in zip(row.dims, whole, strict=True)
    )


@dataclass(frozen=True)
class Source:
    """Where a pruned tensor comes from.

    Attributes:
        name: Megatron name in the model before pruning.
        indices: the global indices kept of each tensor dim, None where all are.
        merge: query heads to merge before that (``merge.merge_qkv``).
        change: makes rows of the pruned tensor from rows of the old one, in place of cutting the
            last dim (``compensate.Compensation.change``), or None to cut it.
    """

    name: str
    indices: tuple[LongTensor | None, ...]
    merge: Terms = field(default_factory=list)
    change: Callable[[Tensor], Tensor] | None = None

    def cut(self, tensor: Tensor, rows: LongTensor | None, out: Tensor) -> None:
        """Write ``rows`` of an old tensor (None for all) to ``out`` as the pruned one has them."""
        if self.change is None:
            slice_tensor(tensor, (rows, *self.indices[1:]), out)
        else:
            out.copy_(self.change(slice_tensor(tensor, (rows,))))


def _old_name(row: Row, plan: Plan, position: int) -> str:
    """Name before pruning of the parameter of a kept layer (and expert)."""
    if row.expert is not None and row.template is not None:
        row = row.template.of_expert(plan["expert"][position][row.expert])
    return row.name.format(layer=plan.layers[position])


def sources(
    family: Family,
    config: ModelConfig,
    plan: Plan,
    compensation: Compensation | None = None,
) -> dict[str, Source]:
    """Megatron name in the pruned model -> where its values are in the model before pruning.

    Args:
        family: the table.
        config: the model before pruning.
        plan: what to keep.
        compensation: how the rest makes up for what is cut, or None to leave it as it is.
    """
    result = {}
    for name, row, position in family.parameters(pruned_config(config, plan)):
        old = name if position is None else _old_name(row, plan, position)
        kept = row_indices(row, config, plan, position)
        merge: Terms = []
        if plan.merge and position is not None and row.dims[0] == "qkv":
            merge = plan.merge[position]
        change = None
        if compensation is not None and not row.predicts:
            layer = None if position is None else plan.layers[position]
            change = compensation.change(row, config, layer, kept[-1])
        result[name] = Source(old, kept, merge, change)
    return result


def slice_tensor(
    tensor: Tensor, indices: tuple[LongTensor | None, ...], out: Tensor | None = None
) -> Tensor:
    """Keep ``indices`` of each dim.

    Args:
        tensor: global.
        indices: those that stay of each dim, None where all do.
        out: contiguous; gets what is kept.

    Returns:
        ``out`` where given, otherwise a new tensor, or ``tensor`` itself when all indices are None.
    """
    cuts = [(dim, kept) for dim, kept in enumerate(indices) if kept is not None]
    if not cuts:
        return tensor if out is None else out.copy_(tensor)
    *earlier, (last, kept_last) = cuts
    for dim, kept in earlier:
        tensor = _take(tensor, kept, dim, None)
    return _take(tensor, kept_last, last, out)


_AS_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _take(tensor: Tensor, kept: LongTensor, dim: int, out: Tensor | None) -> Tensor:
    """``index_select``; on the CPU, inner dims by numpy's, which is several times as fast."""
    if dim == 0 or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return torch.index_select(tensor, dim, kept, out=out)
    low, high = (int(index) for index in kept.aminmax())
    if low < 0 or high >= tensor.size(dim):
        raise IndexError(f"indices {low} to {high} of a dim of {tensor.size(dim)}")
    if out is None:
        sizes = (*tensor.shape[:dim], len(kept), *tensor.shape[dim + 1 :])
        out = tensor.new_empty(sizes)
    old, new = (t.view(_AS_INTEGER[t.dtype.itemsize]).numpy() for t in (tensor, out))
    # Otherwise numpy would check every index again for every row, and write through a buffer.
    np.take(old, kept.numpy(), axis=dim, out=new, mode="clip")
    return out


def _read_pruned(
    tensor: LazyTensor, shape: tuple[int, ...], config: ModelConfig, source: Source
) -> Tensor:
    whole = tensor.read()
    if source.merge:
        whole = merge_qkv(whole, config, source.merge)
    out = torch.empty(shape, dtype=tensor.dtype)
    source.cut(whole, source.indices[0], out)
    return out


def _read_pruned_rows(
    tensor: LazyTensor, width: tuple[int, ...], source: Source, start: int, stop: int
) -> Tensor:
    """Read rows ``[start, stop)`` of the pruned tensor, in runs small enough for a cache."""
    out = torch.empty(stop - start, *width, dtype=tensor.dtype)
    step = max(1, CACHE_BYTES * tensor.shape[0] // max(tensor.nbytes, 1))
    for first in range(start, stop, step):
        last = min(first + step, stop)
        _read_pruned_run(tensor, source, first, last, out[first - start : last - start])
    return out


def _read_pruned_run(
    tensor: LazyTensor, source: Source, start: int, stop: int, out: Tensor
) -> None:
    """Read rows ``[start, stop)`` of the pruned tensor, from the run that holds them."""
    assert tensor.read_rows is not None
    kept = source.indices[0]
    if kept is None:
        source.cut(tensor.read_rows(start, stop), None, out)
        return
    rows = kept[start:stop]
    first = int(rows.min())
    block = tensor.read_rows(first, int(rows.max()) + 1)
    source.cut(block, None if len(rows) == block.size(0) else rows - first, out)  # type: ignore[arg-type]  # torch types every result as Tensor


def _pruned(tensor: LazyTensor, config: ModelConfig, source: Source) -> LazyTensor:
    shape = tuple(
        size if kept is None else len(kept)
        for size, kept in zip(tensor.shape, source.indices, strict=True)
    )
    # Merging adds heads up, whose rows lie apart.
    if tensor.read_rows is None or source.merge:
        return LazyTensor(shape, tensor.dtype, partial(_read_pruned, tensor, shape, config, source))
    read_rows = partial(_read_pruned_rows, tensor, shape[1:], source)
    return LazyTensor(shape, tensor.dtype, partial(read_rows, 0, shape[0]), read_rows)


def prune_store(
    family: Family,
    config: ModelConfig,
    plan: Plan,
    store: Store,
    compensation: Compensation | None = None,
) -> Store:
    """Return the pruned model, tensor by tensor and only when read.

    Args:
        family: the table.
        config: the model before pruning.
        plan: what to keep.
        store: all its parameters.
        compensation: how the rest makes up for what is cut, or None to leave it as it is.

    Returns:
        Store of the pruned model; dtypes are kept, tensors that lose nothing are passed through.

    Raises:
        ValueError: the store lacks a parameter, or holds one that has no row in the table.
    """
    for name in store:
        family.find(name, config)
    missing = [name for name, _, _ in family.parameters(config) if name not in store]
    if missing:
        raise ValueError(f"the checkpoint lacks {len(missing)} parameters: {missing[:5]}")
    result: Store = {}
    for name, source in sources(family, config, plan, compensation).items():
        tensor = store[source.name]
        if all(kept is None for kept in source.indices):
            result[name] = tensor
            continue
        result[name] = _pruned(tensor, config, source)
    return result


def prune_checkpoint(
    source: Path,
    config: ModelConfig,
    plan: Plan,
    folder: Path,
    workers: int,
    compensation: Compensation | None = None,
) -> None:
    """Prune tensor by tensor with one writer; no model is built, no process group needed.

    Args:
        source: ``checkpoint/`` of a result.
        config: its model.
        plan: what to keep.
        folder: to create; gets weights, ``model.yaml`` and the tokenizer.
        workers: tensors in flight.
        compensation: how what is left makes up for what is cut.
    """
    family, small = family_of(config), pruned_config(config, plan)
    whole = on_read(
        read_torch_dist(source, family, config), partial(refuse_nonfinite, key="checkpoint")
    )
    store = prune_store(family, config, plan, whole, compensation)
    folder.mkdir()
    with progress("pruning tensors", len(store)) as advance:
        counted = on_done(store, advance)
        write_torch_dist(folder, counted, family, small, workers=workers)
    small.save(folder)
    if (source / "tokenizer").is_dir():
        shutil.copytree(source / "tokenizer", folder / "tokenizer")
