"""The live executor: a plan applied to a model in memory, on any layout.

Gives the same weights as the streaming executor (``slicing.prune_store``), bit for bit. Dims that
every rank holds whole (hidden) are sliced where they are. Of dims that tensor parallelism splits,
the global winners are shared out equally; of the layers, equal contiguous runs go to the pipeline
stages: a row travels only if its rank changes, once, straight from its old rank to its new one.

Layer after layer: a layer is sliced, its old weights are freed, then its rows travel; the pruned
model is built without memory for its layers. So a rank never holds much more than the model before
pruning and one pruned layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_minitron.config.balance import balanced_layout
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.families.table import DIM_SIZES, Family, Row
from nemo_minitron.models.build import HiddenGPTModel
from nemo_minitron.models.empty import Shapes, build_empty_gpt
from nemo_minitron.pruning.exchange import (
    Move,
    Traffic,
    Transfer,
    equal_shares,
    plan_transfers,
    redistribute,
    travel_order,
)
from nemo_minitron.pruning.plan import Plan, pruned_config
from nemo_minitron.pruning.slicing import dim_indices, slice_tensor
from nemo_minitron.runtime.groups import ParallelGroups

# Blocks of a dim that tensor parallelism splits one by one; all other dims are one block.
_BLOCKS = {"gate_up": 2}
_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class _Job:
    """What stays the same from layer to layer.

    Attributes:
        family: the table.
        config: the model before pruning.
        pruned: the model after pruning.
        plan: what to keep.
        groups: this rank's process groups; rows travel inside ``groups.model``.
        stages: per pipeline stage its ranks of ``groups.model`` in tensor-parallel order.
        traffic: this rank's counter.
    """

    family: Family
    config: ModelConfig
    pruned: ModelConfig
    plan: Plan
    groups: ParallelGroups
    stages: list[list[int]]
    traffic: Traffic

    @property
    def rows(self) -> list[Row]:
        """The parameters of a layer."""
        return [row for row in self.family.rows if row.per_layer and row.when(self.config)]


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
        ValueError: the pruned model does not fit the layout; nothing has been touched then.
    """
    pruned = pruned_config(config, plan)
    layout = balanced_layout(config, pruned, parallel)
    old = _layers(chunks)
    _free(layer for index, layer in old.items() if index not in set(plan.layers))
    outer = _prune_outer(chunks, family, config, plan)
    new_chunks, shapes = build_empty_gpt(pruned, layout, groups, like=chunks[0])
    _fill_outer(new_chunks, family, pruned, outer, shapes)
    new = _layers(new_chunks)
    stages, before, after = _placement(groups, chunks, new_chunks)
    job = _Job(family, config, pruned, plan, groups, stages, traffic or Traffic())
    sources = [before[index] for index in plan.layers]
    targets = [after[position] for position in range(len(plan.layers))]
    for position in travel_order(sources, targets):
        layer, target = old.get(plan.layers[position]), new.get(position)
        if layer is not None or target is not None:
            path = sources[position] % len(stages), targets[position] % len(stages)
            _prune_layer(job, position, path, layer, target, shapes)
    return new_chunks, pruned


def _layers(chunks: Sequence[HiddenGPTModel]) -> dict[int, Any]:
    """Global 0-based index -> this rank's transformer layer."""
    return {layer.layer_number - 1: layer for chunk in chunks for layer in chunk.decoder.layers}


def _free(modules: Iterator[nn.Module]) -> None:
    for module in modules:
        for parameter in module.parameters():
            parameter.data = parameter.data.new_empty(0)


# ---------------------------------------------------------------- the model around the layers


def _outer_parameters(
    chunks: Sequence[HiddenGPTModel], family: Family, config: ModelConfig
) -> Iterator[tuple[str, Row, nn.Parameter]]:
    """Name, row and parameter of everything outside the layers.

    Tied embeddings are held twice in a pipeline: the copy of the last stage goes by the name of
    the output layer, which the table of a tied model does not list.
    """
    tied = config.share_embeddings_and_output_weights
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if not name.startswith("decoder.layers."):
                listed = _EMBEDDING if tied and name == _OUTPUT else name
                yield name, family.find(listed, config)[0], parameter


def _prune_outer(
    chunks: Sequence[HiddenGPTModel], family: Family, config: ModelConfig, plan: Plan
) -> dict[str, Tensor]:
    """Sliced local tensors outside the layers; the old ones are freed.

    They stay on their stage, and tensor parallelism splits only their vocabulary, which stays.
    """
    outer = {}
    for name, row, parameter in _outer_parameters(chunks, family, config):
        kept = tuple(dim_indices(dim, config, plan, None) for dim in row.dims)
        outer[name] = _take_parameter(parameter, kept)
    return outer


def _fill_outer(
    chunks: Sequence[HiddenGPTModel],
    family: Family,
    pruned: ModelConfig,
    outer: dict[str, Tensor],
    shapes: Shapes,
) -> None:
    for name, _, parameter in _outer_parameters(chunks, family, pruned):
        assert outer[name].shape == shapes.get(parameter, parameter.shape), name
        parameter.data = outer.pop(name)
    assert not outer, f"the pruned model lacks {sorted(outer)}"


def _take_parameter(parameter: nn.Parameter, kept: tuple[Tensor | None, ...]) -> Tensor:
    """The kept part of a parameter, whose own memory is given up."""
    device = parameter.device
    indices = tuple(None if index is None else index.to(device) for index in kept)
    tensor = slice_tensor(parameter.data, indices)  # type: ignore[arg-type]
    parameter.data = parameter.data.new_empty(0)
    return tensor


# ---------------------------------------------------------------- layers


def _placement(
    groups: ParallelGroups, old: Sequence[HiddenGPTModel], new: Sequence[HiddenGPTModel]
) -> tuple[list[list[int]], dict[int, int], dict[int, int]]:
    """Ranks of every stage, and the virtual stage of every layer before and after.

    Asked of the ranks, so that it holds for any split Megatron made. Virtual stages are counted
    along the pipeline: chunk ``c`` of stage ``p`` of ``n`` is number ``c * n + p``.
    """
    mine = (groups.pp.rank(), groups.tp.rank(), _layer_numbers(old), _layer_numbers(new))
    answers = [mine] * groups.model.size()
    dist.all_gather_object(answers, mine, group=groups.model)
    count = groups.pp.size()
    stages = [[-1] * groups.tp.size() for _ in range(count)]
    before: dict[int, int] = {}
    after: dict[int, int] = {}
    for rank, (stage, shard, was, will_be) in enumerate(answers):
        stages[stage][shard] = rank
        for place, chunks in ((before, was), (after, will_be)):
            for chunk, layers in enumerate(chunks):
                place.update(dict.fromkeys(layers, chunk * count + stage))
    return stages, before, after


def _layer_numbers(chunks: Sequence[HiddenGPTModel]) -> list[list[int]]:
    """Global 0-based indices of the layers of each chunk."""
    return [[layer.layer_number - 1 for layer in chunk.decoder.layers] for chunk in chunks]


def _prune_layer(
    job: _Job,
    position: int,
    path: tuple[int, int],
    layer: Any,
    target: Any,
    shapes: Shapes,
) -> None:
    """Slice, free and hand over one layer.

    Args:
        job: what to do.
        position: position of the layer in ``plan.layers``.
        path: pipeline stage it is on, and stage it goes to.
        layer: the layer before pruning; None on ranks of other stages.
        target: the empty layer to fill; None on ranks of other stages.
        shapes: of the empty parameters.
    """
    moves = {row.name: _move(job, row, position, *path) for row in job.rows}
    local, filled = {}, {}
    if layer is not None:
        for row, parameter in _by_row(job, job.config, layer).values():
            # A dim that is split is not sliced here: its winners are chosen among all ranks' rows.
            kept = tuple(
                None if dim == row.tp_dim else dim_indices(axis, job.config, job.plan, position)
                for dim, axis in enumerate(row.dims)
            )
            local[row.name] = _take_parameter(parameter, kept)
    if target is not None:
        for row, parameter in _by_row(job, job.pruned, target).values():
            if moves[row.name] is None:
                filled[row.name] = local[row.name]
            else:
                filled[row.name] = parameter.new_empty(shapes[parameter])
    travelling = {name: move for name, move in moves.items() if move is not None}
    redistribute(local, filled, travelling, job.groups.model, job.traffic)
    if target is not None:
        for row, parameter in _by_row(job, job.pruned, target).values():
            assert filled[row.name].shape == shapes[parameter], row.name
            parameter.data = filled[row.name]


def _by_row(job: _Job, config: ModelConfig, layer: Any) -> dict[str, tuple[Row, nn.Parameter]]:
    """Name of the row -> row and parameter of a layer, whichever spec built it."""
    prefix = f"decoder.layers.{layer.layer_number - 1}."
    found = {}
    for name, parameter in layer.named_parameters():
        row, _ = job.family.find(prefix + name, config)
        found[row.name] = row, parameter
    missing = [row.name for row in job.rows if row.name not in found]
    assert not missing, f"{prefix} lacks {missing}"
    return found


def _move(job: _Job, row: Row, position: int, source: int, target: int) -> Move | None:
    """How a parameter of one layer gets from stage ``source`` to stage ``target``.

    Returns:
        None when every rank keeps exactly what it has.
    """
    senders, receivers = job.stages[source], job.stages[target]
    kept = None
    if row.tp_dim is not None:
        kept = dim_indices(row.dims[row.tp_dim], job.config, job.plan, position)
    if kept is None:
        if source == target:
            return None
        pairs = zip(senders, receivers, strict=True)
        return Move(0, [Transfer(sender, receiver) for sender, receiver in pairs])
    axis = row.dims[row.tp_dim]  # type: ignore[index]
    parts = _BLOCKS.get(axis, 1)
    size = DIM_SIZES[axis](job.config)
    owned = equal_shares(torch.arange(size), len(senders), parts)
    wanted = equal_shares(kept, len(receivers), parts)
    transfers = plan_transfers(
        dict(zip(senders, owned, strict=True)), dict(zip(receivers, wanted, strict=True))
    )
    return Move(row.tp_dim, transfers)  # type: ignore[arg-type]
