"""The optimizer's part of a training checkpoint, the same for every layout.

Megatron stores sharded tensors under global names, which any layout can read. Beside them it keeps
what belongs to one layout: parameter groups of rank 0, and a level of nesting per optimizer (there
is a second one when experts are spread over ranks). Neither is needed: the groups are those of the
optimizer that loads, the learning rate is the scheduler's, and what is left is the step.
"""

from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
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
    """What ``dist_checkpointing`` saves of the optimizer, or has to fill in (collective).

    Args:
        optimizer: Megatron's, possibly a chain of several.
        model_state: sharded state of the model as Megatron's optimizer wants it.
        groups: this rank's process groups.
        is_loading: makes room for the state of an optimizer that took no step yet.

    Returns:
        ``{"parts": sharded tensors per optimizer, "step": number of updates}``.
    """
    if is_loading:
        _allocate(optimizer)
    metadata = {
        "distrib_optim_sharding_type": _SHARDING,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": groups.dp_cp,
    }
    state = optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)
    parts = _parts(optimizer)
    states = [state] if len(parts) == 1 else [state[index] for index in range(len(parts))]
    split = [_sharded_and_step(part_state) for part_state in states]
    if not is_loading:
        for part, (tensors, _) in zip(parts, split, strict=True):
            if isinstance(part, DistributedOptimizer):
                _undo_shift(part, tensors["param_state"])
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
    """Give every parameter zero Adam moments, so that a checkpoint has somewhere to go.

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


def _padding_before(buffer: "_ParamAndGradBuffer") -> list[int]:
    """Elements of padding that precede each bucket of one of Megatron's gradient buffers."""
    padding = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets]
    return [0, *accumulate(padding)][:-1]


def _undo_shift(part: DistributedOptimizer, param_state: dict[int, dict[str, Any]]) -> None:
    """Give every parameter its own weights and moments where Megatron took a neighbour's.

    To save in the ``fully_reshardable`` format, Megatron gathers a buffer without the padding
    between its buckets, and then cuts parameters out of it at offsets that count the padding
    (0.16 to 0.19; it warns of "data corruption" where it runs past the end). A model whose output
    layer shares the embedding has two buckets on its last pipeline stage, and one with overlapped
    gradient reduction has many, so training would go on from other weights.

    Args:
        part: a distributed optimizer.
        param_state: its state as Megatron returned it, number of the parameter -> sharded tensors;
            their data is corrected in place.
    """
    before = [_padding_before(buffer) for buffer in part.buffers]
    if not any(map(any, before)):
        return
    whole = part.get_parameter_state_dp_zero(use_gloo_comm=False, return_on_all_ranks=True)
    places = [
        (index, start - before[index][bucket], end - before[index][bucket])
        for index, buffer in enumerate(part.buffers)
        for start, end, bucket in buffer.param_index_map.values()
    ]
    for number, (index, start, end) in enumerate(places):
        (states,) = whole[index].values()
        for name, sharded in param_state[number].items():
            sharded.data.copy_(states[name][start:end].view(sharded.data.shape))


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
