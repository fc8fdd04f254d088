"""The student's side of a teacher that runs on ranks of its own (``serve_teacher`` is the other).

Token ids go to the teacher, and its final hidden states come back. On the student's side the first
rank of every tensor-parallel group on the last pipeline stage takes part (a *client*), on the
teacher's one rank of each replica (a *port*). The replicas take the micro-batches of a global batch
in turn. The student makes the teacher's logits itself, from the hidden state and its own copy of
the teacher's output layer, so neither weights nor logits travel.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_minitron.checkpoint.torch_dist import read_torch_dist
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.distillation.logit_loss import TeacherStates
from nemo_minitron.distillation.vocab import VocabShard
from nemo_minitron.families.registry import family_of
from nemo_minitron.models.schedule import Batch
from nemo_minitron.runtime.groups import ParallelGroups
from nemo_minitron.runtime.launch import device
from nemo_minitron.runtime.worlds import Bridge, shared_store

END = "end"
_AHEAD = 2  # hidden states that a client has room for while the loss of one is computed
CONNECT = timedelta(minutes=30)
"""How long one side waits for the other to load its weights."""
_LEAVE = timedelta(seconds=10)


@dataclass(frozen=True)
class Sides:
    """How many ranks of each side take part, the same on all ranks.

    Attributes:
        data: data-parallel ranks of the student.
        context: its context-parallel ranks.
        ports: replicas of the teacher.
    """

    data: int
    context: int
    ports: int

    @property
    def members(self) -> int:
        """Number of ranks that the group between teacher and student has."""
        return self.data * self.context + self.ports

    def client(self, data: int, context: int) -> int:
        """Return the number on the bridge of the student's rank with these coordinates."""
        return data * self.context + context

    def port(self, replica: int) -> int:
        """Return the number on the bridge of a replica of the teacher."""
        return self.data * self.context + replica

    def replica(self, data: int, index: int) -> int:
        """Return which replica runs a micro-batch of a data-parallel rank."""
        return (index * self.data + data) % self.ports

    def served(self, replica: int, micro_batches: int) -> list[tuple[int, int]]:
        """Return data-parallel rank and number of each micro-batch that a replica runs."""
        return [
            (data, index)
            for index in range(micro_batches)
            for data in range(self.data)
            if self.replica(data, index) == replica
        ]


def step_key(number: int) -> str:
    """Key of the shared store that says what the teacher does next: ``count b s``, or the end."""
    return f"teacher-step-{number}"


def left_key(rank: int) -> str:
    """Return key of the shared store that a rank of the teacher sets once it knows of the end."""
    return f"teacher-left-{rank}"


def output_rows(folder: Path, config: ModelConfig, group: dist.ProcessGroup, rows: int) -> Tensor:
    """This rank's ``[rows, H]`` of the output layer of a checkpoint; rows of padding are zero.

    Args:
        folder: ``checkpoint/`` of a result.
        config: its sizes.
        group: ranks that share the rows.
        rows: of each of them, padding included.
    """
    tied = config.share_embeddings_and_output_weights
    name = "embedding.word_embeddings.weight" if tied else "output_layer.weight"
    stored = read_torch_dist(folder, family_of(config), config)[name]
    shard = VocabShard(group, config.vocab_size, rows)
    weight = torch.zeros(rows, config.hidden_size, dtype=stored.dtype)
    if shard.valid:
        stop = shard.start + shard.valid
        read = stored.read_rows or (lambda start, stop: stored.read()[start:stop])
        weight[: shard.valid] = read(shard.start, stop)
    return weight


class RemoteTeacher:
    """The objective of a student whose teacher runs on other ranks.

    Attributes:
        bridge: on clients, the connection to the teacher.
    """

    def __init__(self, sides: Sides, groups: ParallelGroups, config: ModelConfig) -> None:
        """Connect to the teacher (a call of every rank of both sides).

        Args:
            sides: how many ranks take part.
            groups: this rank's process groups.
            config: sizes of the teacher.
        """
        self.sides, self.groups, self.config = sides, groups, config
        self.bridge: Bridge | None = None
        if groups.is_last_stage and groups.tp.rank() == 0:
            member = sides.client(groups.dp.rank(), groups.cp.rank())
            self.bridge = Bridge(member, sides.members, CONNECT)
        self._speaks = dist.get_rank() == 0
        self._weight: Tensor | None = None
        self._arriving: deque[tuple[Tensor, Any]] = deque()
        self._sending: list[tuple[Tensor, Any]] = []
        self._left: Iterator[int] = iter(())
        self._step = 0

    def load_output(self, folder: Path, rows: int, dtype: torch.dtype) -> None:
        """Read this rank's rows of the teacher's output layer.

        Args:
            folder: ``checkpoint/`` of the teacher.
            rows: rows of the output layer on a rank, those of the padding included.
            dtype: in which the teacher computes.
        """
        if self.groups.is_last_stage:
            self._weight = output_rows(folder, self.config, self.groups.tp, rows).to(
                device(), dtype
            )

    def prepare(self, micro_batches: list[Batch], *, train: bool) -> None:
        """Send the token ids of a global batch; the teacher begins with the first micro-batch."""
        b, s = micro_batches[0]["tokens"].shape
        self._announce(f"{len(micro_batches)} {b} {s * self.sides.context}")
        if self.bridge is None:
            return
        for _, work in self._sending:
            work.wait()
        self._sending.clear()
        data, ports = self.groups.dp.rank(), range(self.sides.ports)
        for replica in ports:
            ids = [
                batch["tokens"]
                for index, batch in enumerate(micro_batches)
                if self.sides.replica(data, index) == replica
            ]
            if ids:
                tokens = torch.stack(ids).int()
                self._sending.append((tokens, self.bridge.send(tokens, self.sides.port(replica))))
        self._left = iter(range(len(micro_batches)))
        shape = (s, b, self.config.hidden_size)
        for _ in range(_AHEAD):
            self._expect(shape)

    def targets(self, index: int, batch: Batch, *, keep: bool) -> TeacherStates:
        """Final hidden state of a micro-batch, from the teacher to every rank with the loss."""
        assert not keep  # intermediate losses alone ask twice
        assert self._weight is not None
        b, s = batch["tokens"].shape
        shape = (s, b, self.config.hidden_size)
        if self.bridge is None:
            hidden = torch.empty(shape, dtype=self._weight.dtype, device=device())
        else:
            hidden, work = self._arriving.popleft()
            work.wait()
            self._expect(shape)
        if self.groups.tp.size() > 1:
            source = dist.get_global_rank(self.groups.tp, 0)
            dist.broadcast(hidden, src=source, group=self.groups.tp)
        return TeacherStates(
            hidden.flatten(0, 1), self._weight, self.config.final_logit_softcapping
        )

    def close(self, teacher_ranks: int) -> None:
        """Tell the teacher that no more is asked of it, and wait a little until its ranks know.

        It needs no process group: training may have failed.
        """
        if self._speaks:
            self._announce(END)
            with suppress(dist.DistError):
                shared_store().wait([left_key(rank) for rank in range(teacher_ranks)], _LEAVE)

    def _announce(self, what: str) -> None:
        """Rank 0 says to all ranks of the teacher what comes next."""
        if self._speaks:
            store = shared_store()
            store.set(step_key(self._step), what)
            if self._step:  # all have read it: they took part in the step before
                store.delete_key(step_key(self._step - 1))
        self._step += 1

    def _expect(self, shape: tuple[int, ...]) -> None:
        """Make room for the next hidden state of the global batch."""
        index = next(self._left, None)
        if index is None:
            return
        assert self.bridge is not None
        assert self._weight is not None
        room = torch.empty(shape, dtype=self._weight.dtype, device=device())
        port = self.sides.port(self.sides.replica(self.groups.dp.rank(), index))
        self._arriving.append((room, self.bridge.receive(room, port)))
