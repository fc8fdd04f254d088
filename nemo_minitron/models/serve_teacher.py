"""The teacher's side of a teacher on ranks of its own (``remote_teacher`` is the other).

Its ranks wait for a global batch, run the frozen model over their share of it in Megatron's
schedule, and send each final hidden state as soon as it is there, until the student says that the
training is over.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_minitron.models.attention import zigzag_positions
from nemo_minitron.models.build import HiddenGPTModel
from nemo_minitron.models.remote_teacher import CONNECT, END, Sides, left_key, step_key
from nemo_minitron.models.schedule import Batch, gathered_hidden, run_schedule
from nemo_minitron.runtime.groups import ParallelGroups
from nemo_minitron.runtime.launch import device
from nemo_minitron.runtime.stop import StopOnRequest
from nemo_minitron.runtime.worlds import Bridge, shared_store


class TeacherServer:
    """Runs a frozen model for a student on other ranks.

    Attributes:
        bridge: on ports, the connection to the student.
    """

    def __init__(
        self, chunks: Sequence[HiddenGPTModel], groups: ParallelGroups, sides: Sides
    ) -> None:
        """Connect to the student (a call of every rank of both sides).

        Args:
            chunks: this rank's part of the model, which returns hidden states.
            groups: this rank's process groups.
            sides: how many ranks take part.
        """
        self.chunks, self.groups, self.sides = list(chunks), groups, sides
        self.bridge: Bridge | None = None
        if groups.is_last_stage and groups.tp.rank() == 0:
            self.bridge = Bridge(sides.port(groups.dp.rank()), sides.members, CONNECT)
        self._sending: list[tuple[Tensor, Any]] = []

    def serve(self) -> None:
        """Run the teacher until the student has no more batches.

        Signals that ask to stop are the student's: it ends the step, saves, and says so.
        """
        with StopOnRequest():
            step = 0
            while (asked := _asked(step)) != END:
                self._run(*map(int, asked.split()))
                step += 1
            shared_store().set(left_key(dist.get_rank()), "left")

    @torch.no_grad()
    def _run(self, count: int, b: int, s: int) -> None:
        """This replica's share of a global batch.

        Args:
            count: micro-batches of each data-parallel rank of the student.
            b: sequences of a micro-batch.
            s: length of a whole sequence.
        """
        served = self.sides.served(self.groups.dp.rank(), count)
        tokens = self._tokens(served, b, s)
        positions = torch.arange(s, device=device()).expand(b, s)
        batches: list[Batch] = [{"tokens": ids, "position_ids": positions} for ids in tokens]

        def send(index: int, batch: Batch, hidden: Tensor) -> int:
            rows = gathered_hidden(hidden, self.chunks[-1]).unflatten(0, (s, b))
            self._send(rows, served[index][0])
            return index

        run_schedule(self.chunks, batches, send, forward_only=True, collect_outputs=True)
        for _, work in self._sending:
            work.wait()
        self._sending.clear()

    def _tokens(self, served: Sequence[tuple[int, int]], b: int, s: int) -> Tensor:
        """``[micro-batches, b, s]`` ids, from the student's ranks to every rank of this replica."""
        whole = torch.empty(len(served), b, s, dtype=torch.int32, device=device())
        if self.bridge is not None:
            arriving = []
            for data in range(self.sides.data):
                rows = [row for row, (who, _) in enumerate(served) if who == data]
                for context in range(self.sides.context if rows else 0):
                    shape = (len(rows), b, s // self.sides.context)
                    room = torch.empty(shape, dtype=torch.int32, device=device())
                    client = self.sides.client(data, context)
                    arriving.append((rows, context, room, self.bridge.receive(room, client)))
            for rows, context, room, work in arriving:
                work.wait()
                chosen = torch.tensor(rows, device=device())[:, None]
                where = self._positions(context, s)
                whole[chosen, :, where] = room.transpose(1, 2)
        groups = self.groups
        if groups.is_last_stage and groups.tp.size() > 1:
            dist.broadcast(whole, src=dist.get_global_rank(groups.tp, 0), group=groups.tp)
        if groups.pp.size() > 1:
            dist.broadcast(whole, src=groups.last_stage_global_rank, group=groups.pp)
        return whole.long()

    def _send(self, rows: Tensor, data: int) -> None:
        """Send a hidden state ``[s, b, H]``, each context-parallel rank its part."""
        if self.bridge is None:
            return
        for context in range(self.sides.context):
            part = rows
            if self.sides.context > 1:
                part = rows.index_select(0, self._positions(context, rows.size(0)))
            part = part.contiguous()
            work = self.bridge.send(part, self.sides.client(data, context))
            self._sending.append((part, work))

    def _positions(self, context: int, s: int) -> Tensor:
        """Return places in the sequence of what a context-parallel rank of the student holds."""
        size = self.sides.context
        return zigzag_positions(s // size, context, size, device())


def _asked(step: int) -> str:
    """Receive the student's next request; wait as long as its first rank is alive."""
    while True:
        try:
            return str(shared_store().get(step_key(step)).decode())
        except dist.DistStoreError:
            continue  # the store's own limit of waiting
