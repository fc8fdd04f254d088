"""The live executor: a plan applied to a model in memory, on any layout.

Gives the same weights as the streaming executor (``slicing.prune_store``), bit for bit. Dims that
every rank holds whole (hidden) are sliced where they are. Of dims that tensor parallelism splits,
the global winners are shared out equally; of the layers, equal contiguous runs go to the pipeline
stages, of the experts to the expert-parallel ranks: a row travels only if its rank changes, once,
straight from its old rank to its new one.

Layer after layer: a layer is sliced, its old weights are freed, then its rows travel; the pruned
model is built without memory for its layers. So a rank never holds much more than the model before
pruning and one pruned layer.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from nemo_minitron.config.balance import balanced_layout
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.families.table import Family, Row
from nemo_minitron.models.build import HiddenGPTModel
from nemo_minitron.models.empty import Shapes, build_empty_gpt
from nemo_minitron.models.found import builder_like
from nemo_minitron.models.parts import by_row, outer_parameters
from nemo_minitron.models.prune_check import check_before
from nemo_minitron.pruning.exchange import Traffic, redistribute, travel_order
from nemo_minitron.pruning.merge import merge_qkv
from nemo_minitron.pruning.moves import Grid, plan_move, row_before, rows_of_layers
from nemo_minitron.pruning.plan import Plan, pruned_config
from nemo_minitron.pruning.slicing import dim_indices, row_indices, slice_tensor
from nemo_minitron.runtime.agreement import agreed
from nemo_minitron.runtime.groups import ParallelGroups


@dataclass(frozen=True)
class _Job:
    """Arguments that are the same for every layer.

    Attributes:
        family: the table.
        config: the model before pruning.
        pruned: the model after pruning.
        plan: what to keep.
        groups: this rank's process groups; rows travel inside ``groups.tp_ep_pp``.
        grid: the ranks of that group.
        rows: parameters of each layer of the pruned model.
        shapes: local shapes of the parameters of the pruned model that are still empty.
        traffic: this rank's counter.
    """

    family: Family
    config: ModelConfig
    pruned: ModelConfig
    plan: Plan
    groups: ParallelGroups
    grid: Grid
    rows: list[list[Row]]
    shapes: Shapes
    traffic: Traffic


@torch.no_grad()
def prune_live(
    chunks: Sequence[HiddenGPTModel],
    family: Family,
    config: ModelConfig,
    plan: Plan,
    parallel: ParallelConfig,
    groups: ParallelGroups,
    traffic: Traffic | None = None,
) -> tuple[list[HiddenGPTModel], ModelConfig]:
    """Prune a model in memory (collective: every rank of the layout calls it).

    When layers are dropped the new chunks have the layout ``config.balance.balanced_layout(config,
    new_config, parallel)``; without that they keep ``parallel``.

    Args:
        chunks: this rank's part of the model, without DDP or Float16Module around it. It is used
            up: its layers are empty afterwards.
        family: the parameter table.
        config: global sizes of the model.
        plan: what to keep, the same on every rank.
        parallel: layout of the model; must be the initialised one.
        groups: this rank's process groups.
        traffic: counts what this rank sends.

    Returns:
        This rank's part of the pruned model (on the same device, in the same dtype and mode), and
        its global sizes.

    Raises:
        ValueError: the plan is of another model, a parameter has no row or is not of its shape, or
            the pruned model does not fit the layout; no weight has been touched then, on any rank.
    """
    check_before(chunks, family, config, plan, groups)
    pruned = pruned_config(config, plan)
    layout = balanced_layout(config, pruned, parallel)
    build = agreed(partial(builder_like, chunks, config, pruned, layout))
    new_chunks, shapes = build_empty_gpt(build, like=chunks[0])
    # From here on the old model is used up.
    old = _layers(chunks)
    _free(layer for index, layer in old.items() if index not in set(plan.layers))
    outer = _prune_outer(chunks, family, config, plan, groups)
    _fill_outer(new_chunks, family, pruned, outer, shapes)
    new = _layers(new_chunks)
    grid, before, after = _placement(groups, chunks, new_chunks)
    rows = rows_of_layers(family, pruned)
    job = _Job(family, config, pruned, plan, groups, grid, rows, shapes, traffic or Traffic())
    sources = [before[index] for index in plan.layers]
    targets = [after[position] for position in range(len(plan.layers))]
    for position in travel_order(sources, targets):
        layer, target = old.get(plan.layers[position]), new.get(position)
        if layer is not None or target is not None:
            path = sources[position] % groups.pp.size(), targets[position] % groups.pp.size()
            _prune_layer(job, position, path, layer, target)
    return new_chunks, pruned


def _layers(chunks: Sequence[HiddenGPTModel]) -> dict[int, Any]:
    """Return global 0-based index -> this rank's transformer layer."""
    return {layer.layer_number - 1: layer for chunk in chunks for layer in chunk.decoder.layers}


def _free(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        for parameter in module.parameters():
            parameter.data = parameter.data.new_empty(0)


# ---------------------------------------------------------------- the model around the layers


def _prune_outer(
    chunks: Sequence[HiddenGPTModel],
    family: Family,
    config: ModelConfig,
    plan: Plan,
    groups: ParallelGroups,
) -> dict[str, Tensor]:
    """Return sliced local tensors outside the decoder's layers; the old ones are freed.

    They stay on their stage. Tensor parallelism splits their vocabulary, which stays, and the rows
    of ``eh_proj``, which every rank needs all of to find its share of the winners.
    """
    outer = {}
    for name, row, parameter in outer_parameters(chunks, family, config):
        kept = row_indices(row, config, plan, None)
        if row.tp_dim is None or kept[row.tp_dim] is None:
            outer[name] = _take_parameter(parameter, kept)
            continue
        parts = [torch.empty_like(parameter) for _ in range(groups.tp.size())]
        dist.all_gather(parts, parameter.data.contiguous(), group=groups.tp)
        whole = _take_parameter(torch.cat(parts, dim=row.tp_dim), kept)
        parameter.data = parameter.data.new_empty(0)
        outer[name] = whole.chunk(groups.tp.size(), dim=row.tp_dim)[groups.tp.rank()].clone()
    return outer


def _fill_outer(
    chunks: Sequence[HiddenGPTModel],
    family: Family,
    pruned: ModelConfig,
    outer: dict[str, Tensor],
    shapes: Shapes,
) -> None:
    for name, _, parameter in outer_parameters(chunks, family, pruned):
        known = shapes.get(parameter) if isinstance(parameter, nn.Parameter) else None
        assert outer[name].shape == (known or parameter.shape), name
        parameter.data = outer.pop(name)
    assert not outer, f"the pruned model lacks {sorted(outer)}"


def _take_parameter(parameter: Tensor, kept: tuple[Tensor | None, ...]) -> Tensor:
    """Return the kept part of a parameter, whose own memory is given up."""
    device = parameter.device
    indices = tuple(None if index is None else index.to(device) for index in kept)
    tensor = slice_tensor(parameter.data, indices)  # type: ignore[arg-type]  # indices are Tensor to torch
    parameter.data = parameter.data.new_empty(0)
    return tensor


# ---------------------------------------------------------------- layers


def _placement(
    groups: ParallelGroups, old: Sequence[HiddenGPTModel], new: Sequence[HiddenGPTModel]
) -> tuple[Grid, dict[int, int], dict[int, int]]:
    """Return the ranks, and the virtual stage of every layer before and after.

    Asked of the ranks, so that it holds for any split Megatron made. Virtual stages are counted
    along the pipeline: chunk ``c`` of stage ``p`` of ``n`` is number ``c * n + p``.
    """
    place = (groups.ep.rank(), groups.pp.rank(), groups.tp.rank())
    mine = (place, _layer_numbers(old), _layer_numbers(new))
    answers = [mine] * groups.tp_ep_pp.size()
    dist.all_gather_object(answers, mine, group=groups.tp_ep_pp)
    count = groups.pp.size()
    ranks = [[[-1] * groups.tp.size() for _ in range(count)] for _ in range(groups.ep.size())]
    before: dict[int, int] = {}
    after: dict[int, int] = {}
    for rank, ((expert_rank, stage, shard), was, will_be) in enumerate(answers):
        ranks[expert_rank][stage][shard] = rank
        for places, chunks in ((before, was), (after, will_be)):
            for chunk, layers in enumerate(chunks):
                places.update(dict.fromkeys(layers, chunk * count + stage))
    return Grid(ranks, groups.ep.rank()), before, after


def _layer_numbers(chunks: Sequence[HiddenGPTModel]) -> list[list[int]]:
    """Return global 0-based indices of the layers of each chunk."""
    return [[layer.layer_number - 1 for layer in chunk.decoder.layers] for chunk in chunks]


def _prune_layer(
    job: _Job,
    position: int,
    path: tuple[int, int],
    layer: TransformerLayer | None,
    target: TransformerLayer | None,
) -> None:
    """Slice, free and hand over one layer.

    Args:
        job: what to do.
        position: position of the layer in ``plan.layers``.
        path: pipeline stage it is on, and stage it goes to.
        layer: the layer before pruning; None on ranks of other stages.
        target: the empty layer to fill; None on ranks of other stages.
    """
    moves = {
        row.name: plan_move(row, job.config, job.pruned, job.plan, position, path, job.grid)
        for row in job.rows[position]
    }
    local = {} if layer is None else _slice_layer(job, position, layer)
    parameters = {} if target is None else by_row(job.family, job.pruned, target, job.groups)
    # Without a move, what this rank has is what it keeps.
    filled = {
        name: local[name] if moves[name] is None else parameter.new_empty(_shape(job, parameter))
        for name, parameter in parameters.items()
    }
    travelling = {name: move for name, move in moves.items() if move is not None}
    redistribute(local, filled, travelling, job.groups.tp_ep_pp, job.traffic)
    for name, parameter in parameters.items():
        assert filled[name].shape == _shape(job, parameter), name
        parameter.data = filled[name]


def _shape(job: _Job, tensor: Tensor) -> torch.Size:
    """Return the local shape of a parameter; buffers (``expert_bias``) are never emptied."""
    return job.shapes[tensor] if isinstance(tensor, nn.Parameter) else tensor.shape


def _slice_layer(job: _Job, position: int, layer: TransformerLayer) -> dict[str, Tensor]:
    """Name of the row after pruning -> local tensor; the layer is empty afterwards.

    Only dims that are not split are sliced: the winners of a dim that is split are chosen among the
    rows of all ranks.
    """
    parameters = by_row(job.family, job.config, layer, job.groups)
    local = {}
    for row in job.rows[position]:
        parameter = parameters.pop(row_before(row, job.plan, position).name, None)
        if parameter is None:  # another rank's expert
            continue
        kept = tuple(
            None
            if dim == row.tp_dim
            else dim_indices(axis, job.config, job.plan, position, row.expert)
            for dim, axis in enumerate(row.dims)
        )
        local[row.name] = _take_parameter(parameter, kept)
        if job.plan.merge and row.dims[0] == "qkv":
            local[row.name] = _merge(job, position, local[row.name])
    _free([layer])  # dropped experts
    return local


def _merge(job: _Job, position: int, tensor: Tensor) -> Tensor:
    """Merge query heads in this rank's rows of ``linear_qkv``, before any is cut.

    Heads with a key of their own are merged across groups, so across ranks: only then every rank
    needs the rows of all.
    """
    terms, group = job.plan.merge[position], job.groups.tp
    if job.config.heads_per_group > 1 or group.size() == 1:
        groups_here = job.config.num_query_groups // group.size()
        return merge_qkv(tensor, job.config, terms, first_group=group.rank() * groups_here)
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    job.traffic.bytes_sent += tensor.nbytes * (group.size() - 1)
    job.traffic.messages += group.size() - 1
    merged = merge_qkv(torch.cat(parts), job.config, terms)
    return merged.chunk(group.size())[group.rank()].clone()
