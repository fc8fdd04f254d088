"""The frozen teacher: a second Megatron model on the same ranks, and how its states travel.

States go to the pipeline stages that own the mapped student layers.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_minitron.distillation.layer_map import Pair
from nemo_minitron.distillation.offload import HostWeights
from nemo_minitron.models.build import HiddenGPTModel
from nemo_minitron.models.hidden import logit_cap, output_weight
from nemo_minitron.models.places import States, places_of
from nemo_minitron.models.schedule import Batch, run_schedule

Group = dist.ProcessGroup
Kept = dict[Pair, list[States | None]]
"""States of every micro-batch, in order."""


class Teacher:
    """Runs forward only; has no gradient buffers and no optimizer state.

    With ``offload`` its weights wait in host memory between passes (see ``release``).
    """

    def __init__(self, chunks: list[HiddenGPTModel], *, offload: bool = False) -> None:
        self.chunks = chunks
        self._host = _host_weights(chunks) if offload else None
        for chunk in chunks:
            chunk.return_hidden = True
            chunk.eval()
            chunk.requires_grad_(False)

    @torch.no_grad()
    def hidden_states(self, micro_batches: list[Batch]) -> list[Tensor]:
        """Return the final hidden state of every micro-batch, in order.

        Args:
            micro_batches: those of one global batch on this rank.

        Returns:
            ``[s, b, H]`` each (``[s / tp, b, H]`` under sequence parallelism) on the last stage;
            empty on the others.
        """
        with self._host.on_device() if self._host else nullcontext():
            return run_schedule(
                self.chunks,
                micro_batches,
                lambda index, batch, hidden: hidden,
                forward_only=True,
                collect_outputs=True,
            )

    def release(self) -> None:
        """Send the weights to host memory, if that is where they wait; call it once loaded."""
        if self._host:
            self._host.release()

    @property
    def output_weight(self) -> Tensor:
        """``[v / tp, H]`` local rows of the output layer (last stage only)."""
        return output_weight(self.chunks[-1])

    @property
    def logit_cap(self) -> float | None:
        """Return the soft cap of the logits, or None."""
        return logit_cap(self.chunks[-1])


def _host_weights(chunks: list[HiddenGPTModel]) -> HostWeights:
    """All weights but the output layer's, from which the loss makes logits after the pass."""
    weights = [parameter for chunk in chunks for parameter in chunk.parameters()]
    return HostWeights(weights, [output_weight(chunk) for chunk in chunks if chunk.post_process])


@dataclass(frozen=True)
class Route:
    """A pair and the pipeline ranks that own its two places."""

    pair: Pair
    source: int
    target: int


def owners(chunks: Sequence[HiddenGPTModel], group: Group) -> dict[int, tuple[int, int]]:
    """Place -> (virtual stage, pipeline rank) that has it, the same on every rank (collective)."""
    mine = [places_of(chunk) for chunk in chunks]
    found = [mine] * group.size()
    if group.size() > 1:
        dist.all_gather_object(found, mine, group=group)
    return {
        place: (stage, rank)
        for rank, stages in enumerate(found)
        for stage, places in enumerate(stages)
        for place in places
    }


def deliver(
    routes: Sequence[Route],
    captured: Kept,
    shapes: Callable[[Pair, int], list[tuple[int, ...]]],
    micro_batches: int,
    group: Group,
    empty: Callable[[tuple[int, ...]], Tensor],
) -> Kept:
    """Move captured states to where the student's loss is; nothing else crosses the wire.

    Every rank posts its sends and receives in the same order (pair, micro-batch, tensor) and all
    at once, so none waits for another's turn.

    Args:
        routes: all pairs, in the same order on every rank.
        captured: states of the teacher's places on this rank; emptied.
        shapes: pair and micro-batch -> local shapes of its states.
        micro_batches: number of them.
        group: pipeline-parallel group.
        empty: makes a tensor of the captured states' dtype on this rank's device.

    Returns:
        States for the student's places on this rank.
    """
    me, kept, operations = group.rank(), Kept(), []
    for route in routes:
        if me not in (route.source, route.target):
            continue
        if route.source == route.target:
            kept[route.pair] = captured.pop(route.pair)
            continue
        arriving: list[States | None] = []
        sending = captured.pop(route.pair) if me == route.source else []
        for index in range(micro_batches):
            states = sending[index] if sending else tuple(map(empty, shapes(route.pair, index)))
            assert states is not None
            operation, peer = (dist.isend, route.target) if sending else (dist.irecv, route.source)
            operations += [
                dist.P2POp(operation, tensor, group=group, group_peer=peer) for tensor in states
            ]
            arriving.append(states)
        if me == route.target:
            kept[route.pair] = arriving
    for request in dist.batch_isend_irecv(operations) if operations else []:
        request.wait()
    return kept
