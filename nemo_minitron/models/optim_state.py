"""The optimizer's part of a training checkpoint, the same for every layout.

Megatron stores sharded tensors under global names, which any layout can read. Beside them it keeps
what belongs to one layout: parameter groups of rank 0, and a level of nesting per optimizer (there
is a second one when experts are spread over ranks). Neither is needed: the groups are those of the
optimizer that loads, the learning rate is the scheduler's, and what is left is the step.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from nemo_minitron.runtime.groups import ParallelGroups

if TYPE_CHECKING:
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer

_SHARDING = "fully_reshardable"


def optimizer_state(
    optimizer: MegatronOptimizer,
    model_state: dict[str, Any],
    groups: ParallelGroups,
    *,
    is_loading: bool,
) -> dict[str, Any]:
    """Return the optimizer state that ``dist_checkpointing`` saves or loads (collective).

    Args:
        optimizer: Megatron's, possibly a chain of several.
        model_state: sharded state of the model as Megatron's optimizer wants it.
        groups: this rank's process groups.
        is_loading: makes room for the state of an optimizer that took no step yet.

    Returns:
        ``{"parts": sharded tensors per optimizer, "step": number of updates}``.
    """
    _allocate(optimizer)
    parts = _parts(optimizer)
    metadata = {
        "distrib_optim_sharding_type": _SHARDING,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": groups.dp_cp,
    }
    if not is_loading and all(isinstance(part, DistributedOptimizer) for part in parts):
        states = [
            {**part.state_dict(), "param_state": _owned_states(part, model_state)} for part in parts
        ]
    else:
        state = optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)
        states = [state] if len(parts) == 1 else [state[index] for index in range(len(parts))]
    split = [_sharded_and_step(part_state) for part_state in states]
    out: dict[str, Any] = {"parts": {str(i): tensors for i, (tensors, _) in enumerate(split)}}
    if not is_loading:
        out["step"] = max(step for _, step in split)
    return out


def load_optimizer(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Restore what ``optimizer_state`` saved, at this layout or another."""
    for index, part in enumerate(_parts(optimizer)):
        tensors = state["parts"][str(index)]
        if isinstance(part, DistributedOptimizer):
            _load_distributed(part, tensors["param_state"], state["step"])
        else:
            _load_replicated(part, tensors, state["step"])


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _torch_adam(part: MegatronOptimizer) -> Any | None:
    """The inner torch Adam of an optimizer, None where Apex or Transformer Engine gives one."""
    inner = part.optimizer
    return inner if isinstance(inner, torch.optim.Adam | torch.optim.AdamW) else None


def _allocate(optimizer: MegatronOptimizer) -> None:
    """Give parameters without Adam moments zeros: a checkpoint needs somewhere to go or come from.

    Megatron's distributed optimizer does this itself for the Apex and Transformer Engine Adams;
    with torch's Adam it asserts that a step was taken.
    """
    for part in _parts(optimizer):
        inner: Any = _torch_adam(part)
        for group in inner.param_groups if inner is not None else []:
            for parameter in group["params"]:
                if not inner.state[parameter]:
                    inner.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


def _sharded_and_step(state: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """The sharded tensors of one optimizer and its step, without what belongs to the layout."""
    inner = state.get("optimizer", state)
    steps = [group["step"] for group in inner["param_groups"] if "step" in group]
    if "param_state" in state:
        return {"param_state": state["param_state"]}, float(max(steps, default=0))
    moments = dict(inner["state"])
    steps.append(moments.pop("common_step", 0))
    tensors = {"moments": moments}
    if "fp32_from_fp16_params" in state:  # lists of different lengths cannot be merged at loading
        groups = state["fp32_from_fp16_params"]
        tensors["main"] = {i: dict(enumerate(group)) for i, group in enumerate(groups)}
    return tensors, float(max(steps))


def _owned_states(part: DistributedOptimizer, model_state: dict[str, Any]) -> dict[int, Any]:
    """Return weights and moments of the parameters whose beginning this data-parallel rank holds.

    Every rank writes its own, so only the few parameters that two or more ranks share travel, and
    only to one of them. In Megatron's format ``fully_reshardable``, which its own writer makes by
    gathering everything on every rank; before that, from 0.16 to 0.19, it cuts parameters out of
    what it gathered at offsets that count padding which is not there (wrong with several buckets).

    Args:
        part: a distributed optimizer that has moments.
        model_state: sharded state of the model; its tensors are the parameters themselves.

    Returns:
        Number of the parameter -> name of the state -> sharded tensor, fp32.
    """
    group = part.data_parallel_group
    sharded = {id(s.data): s for s in nested_values(model_state) if hasattr(s, "replica_id")}
    owned: dict[int, Any] = {}
    transfers: list[dist.P2POp] = []
    placed = [(buffer, *item) for buffer in part.buffers for item in buffer.param_index_map.items()]
    for number, (buffer, parameter, place) in enumerate(placed):
        pieces = _pieces(buffer, place, group.size())
        if group.rank() not in pieces:
            continue
        whole, more = _assembled(_held(part, parameter), pieces, group)
        transfers += more
        if whole:
            shard = sharded[id(parameter)]
            assert shard.replica_id[-1] == group.rank(), "replicas are numbered by data parallelism"
            owned[number] = {name: _as_state(shard, name, whole[name]) for name in whole}
    for request in dist.batch_isend_irecv(transfers) if transfers else []:
        request.wait()
    return owned


def _pieces(
    buffer: "_ParamAndGradBuffer", place: tuple[int, int, int], ranks: int
) -> dict[int, tuple[int, int]]:
    """Return, by data-parallel rank, the first and last (exclusive) element it has of a parameter.

    Args:
        buffer: the buffer that the parameter is in.
        place: where it starts and ends in the buffer, and its bucket.
        ranks: that share each bucket equally.
    """
    start, end, number = place
    bucket = buffer.buckets[number]
    share = bucket.grad_data.numel() // ranks
    first, last = (start - bucket.offset) // share, (end - 1 - bucket.offset) // share
    edges = {rank: bucket.offset + rank * share for rank in range(first, last + 2)}
    return {
        rank: (max(start, edges[rank]) - start, min(end, edges[rank + 1]) - start)
        for rank in range(first, last + 1)
    }


def _held(part: DistributedOptimizer, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """This rank's piece of the weights and moments of a parameter, flat, without the step count."""
    states = part._get_main_param_and_optimizer_states(parameter)
    return {name: state.detach().float() for name, state in states.items() if state.dim()}


def _assembled(
    held: dict[str, torch.Tensor], pieces: dict[int, tuple[int, int]], group: dist.ProcessGroup
) -> tuple[dict[str, torch.Tensor], list[dist.P2POp]]:
    """Return a whole parameter on the rank with its first piece, and what has to travel to it."""
    owner = next(iter(pieces))
    if len(pieces) == 1:
        return held, []
    if group.rank() != owner:
        peer = dist.get_global_rank(group, owner)
        return {}, [dist.P2POp(dist.isend, state, peer, group) for state in held.values()]
    size = max(end for _, end in pieces.values())
    whole = {name: state.new_empty(size) for name, state in held.items()}
    for name, state in held.items():
        whole[name][: len(state)] = state
    return whole, [
        dist.P2POp(dist.irecv, state[begin:end], dist.get_global_rank(group, rank), group)
        for rank, (begin, end) in pieces.items()
        if rank != owner
        for state in whole.values()
    ]


def _as_state(shard: Any, name: str, state: torch.Tensor) -> Any:
    """Return the sharded tensor, or factory of some, of one state of a parameter."""
    data = state.view(shard.data.shape)
    changes = {"data": data, "replica_id": (*shard.replica_id[:-1], 0)}
    if isinstance(shard, ShardedTensor):
        changes["dtype"] = data.dtype
    return replace(shard, key=f"optimizer.state.{name}.{shard.key}", **changes)


def _with_step(groups: list[dict[str, Any]], step: float) -> list[dict[str, Any]]:
    return [{**group, "step": int(step)} for group in groups]


def _load_distributed(part: DistributedOptimizer, tensors: dict[Any, Any], step: float) -> None:
    """Load a distributed optimizer.

    With torch's Adam, Megatron's ``fully_reshardable`` loader expects the step count among the
    sharded tensors although its own writer leaves it out; the count is set aside meanwhile.
    """
    state = part.state_dict()
    state["optimizer"]["param_groups"] = _with_step(state["optimizer"]["param_groups"], step)
    part.load_state_dict(state)
    inner: Any = _torch_adam(part)
    values = list(inner.state.values()) if inner is not None else []
    for value in values:
        del value["step"]
    part.load_parameter_state_from_fully_reshardable(tensors)
    for value in values:
        # One tensor each: Megatron hands all of them the same one, which torch's Adam would then
        # count up once per parameter.
        value["step"] = torch.tensor(step)


def _load_replicated(part: MegatronOptimizer, tensors: dict[str, Any], step: float) -> None:
    """Load an optimizer that every data-parallel rank holds whole."""
    state = part.state_dict()
    inner = state.get("optimizer", state)
    inner["state"] = {**tensors["moments"], "common_step": torch.tensor(step)}
    if _torch_adam(part) is None:
        inner["param_groups"] = _with_step(inner["param_groups"], step)
        del inner["state"]["common_step"]
    if "main" in tensors:
        state["fp32_from_fp16_params"] = [
            [group[i] for i in sorted(group)] for _, group in sorted(tensors["main"].items())
        ]
    part.load_state_dict(state)
