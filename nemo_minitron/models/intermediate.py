"""Intermediate losses inside Megatron's schedule: capture, transport, attach, count.

Per global batch: hooks on the teacher keep the mapped states of its forward-only pass and the
states travel to the stages of the mapped student layers (``captured``); hooks on the student
compute each loss on its activation and attach it to the backward (``attached``).
See docs/design/intermediate.md.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_minitron.config.distillation import STATE_LOSSES, IntermediateConfig
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.distillation.intermediate import attach, relation_loss, state_loss
from nemo_minitron.distillation.layer_map import Pair, make_pairs, relation_heads
from nemo_minitron.models.attention import causal_mask, gather_sequence
from nemo_minitron.models.build import HiddenGPTModel
from nemo_minitron.models.places import States, Use, watch
from nemo_minitron.models.projection import PROJECTION, Projection, sum_gradients
from nemo_minitron.models.schedule import Batch
from nemo_minitron.models.teacher import Kept, Route, deliver, owners
from nemo_minitron.runtime.groups import ParallelGroups
from nemo_minitron.runtime.launch import device

START_AGAIN = "set overwrite=true to start again, or distillation.intermediate.losses=[]"


def loss_name(pair: Pair) -> str:
    """Name of one loss in logs: ``embedding``, ``block_output_29_13`` (layers, not places)."""
    if pair.kind == "embedding":
        return pair.kind
    before = int(pair.kind == "block_output")
    return f"{pair.kind}_{pair.teacher - before}_{pair.student - before}"


class IntermediateLosses:
    """The losses of one student-teacher pair on this rank.

    Attributes:
        pairs: all comparisons, the same on every rank.
        projections: copies of the trained matrix in this rank's student chunks.
        sums: ``[pairs]`` fp32 loss sums of the pass that ran last; of this rank until ``reduced``.
    """

    def __init__(
        self,
        config: IntermediateConfig,
        student: tuple[ModelConfig, Sequence[HiddenGPTModel]],
        teacher: tuple[ModelConfig, Sequence[HiddenGPTModel]],
        parallel: ParallelConfig,
        groups: ParallelGroups,
    ) -> None:
        """Find who owns what (collective) and add the projection to the student's chunks.

        Args:
            config: which losses.
            student: sizes and this rank's chunks, not yet wrapped.
            teacher: sizes and this rank's chunks.
            parallel: layout of both.
            groups: this rank's process groups.
        """
        self.config, self.parallel, self.groups = config, parallel, groups
        self.student, student_chunks = student
        self.teacher, self._teacher_chunks = teacher
        self.pairs = make_pairs(config, self.teacher, self.student)
        self._relation_heads = 0
        if "attention_relation" in config.losses:
            self._relation_heads = relation_heads(config, self.teacher, self.student, parallel)
        # Not any parameter's dtype: torch norms keep fp32 weights under bf16 and give bf16.
        self._dtype = self._teacher_chunks[0].config.params_dtype
        self._device = device()  # the teacher's weights may wait in host memory
        self._places = owners(student_chunks, groups.pp)
        self._teacher_places = owners(self._teacher_chunks, groups.pp)
        self.routes = [
            Route(pair, self._teacher_places[pair.teacher][1], self._places[pair.student][1])
            for pair in self.pairs
        ]
        self.projections = self._add_projections(student_chunks)
        self.sums = torch.zeros(len(self.pairs), device=self._device)
        self._kept: Kept = {}
        self._masks: dict[int, Tensor] = {}

    @property
    def projected(self) -> bool:
        """Whether hidden states are compared and the widths differ."""
        return self.config.uses(STATE_LOSSES) and (
            self.student.hidden_size != self.teacher.hidden_size
        )

    def _add_projections(self, chunks: Sequence[HiddenGPTModel]) -> list[Projection]:
        if not self.projected:
            return []
        homes = sorted({self._places[p.student] for p in self.pairs if p.kind in STATE_LOSSES})
        mine = []
        for copy, (stage, rank) in enumerate(homes):
            if rank == self.groups.pp.rank():
                module = Projection(
                    self.student.hidden_size,
                    self.teacher.hidden_size,
                    copy=copy,
                    sequence_parallel=self.parallel.sequence_parallel,
                    dtype=self._dtype,
                    device=self._device,
                )
                chunks[stage].add_module(PROJECTION, module)
                mine.append(module)
        return mine

    # ---- teacher

    @contextmanager
    def captured(self, micro_batches: Sequence[Batch]) -> Iterator[None]:
        """Keep the mapped states of the teacher's pass inside the context, then send them.

        The states reach the stages that need them (collective).
        """
        captured: Kept = {}
        with ExitStack() as handles:
            for pair, chunk in self._here(self._teacher_places, self._teacher_chunks, teacher=True):
                kept: list[States | None] = captured.setdefault(pair, [])
                use = _keep_in(kept, self._dtype)
                handle = watch(chunk, pair.kind, pair.teacher, use)
                handles.callback(handle.remove)
            yield

        def shapes(pair: Pair, index: int) -> list[tuple[int, ...]]:
            return self._shapes(pair, micro_batches[index])

        count, pp = len(micro_batches), self.groups.pp
        empty = partial(torch.empty, dtype=self._dtype, device=self._device)
        self._kept = deliver(self.routes, captured, shapes, count, pp, empty)

    def _shapes(self, pair: Pair, batch: Batch) -> list[tuple[int, ...]]:
        b, s = batch["tokens"].shape
        tp = self.groups.tp.size()
        if pair.kind in STATE_LOSSES:
            rows = s // tp if self.parallel.sequence_parallel else s
            return [(rows, b, self.teacher.hidden_size)]
        sizes = self.teacher
        heads = (sizes.num_attention_heads, sizes.num_query_groups, sizes.num_query_groups)
        channels = (sizes.query_channels, sizes.query_channels, sizes.kv_channels)
        return [(s, b, n // tp, d) for n, d in zip(heads, channels, strict=True)]

    def _here(
        self,
        places: dict[int, tuple[int, int]],
        chunks: Sequence[HiddenGPTModel],
        *,
        teacher: bool = False,
    ) -> Iterator[tuple[Pair, HiddenGPTModel]]:
        for pair in self.pairs:
            stage, rank = places[pair.teacher if teacher else pair.student]
            if rank == self.groups.pp.rank():
                yield pair, chunks[stage]

    # ---- student

    @contextmanager
    def attached(
        self,
        chunks: Sequence[HiddenGPTModel],
        micro_batches: Sequence[Batch],
        weight: Tensor | None,
    ) -> Iterator[None]:
        """Compute the losses of the student's pass inside the context.

        Args:
            chunks: the student's chunks without wrappers.
            micro_batches: of this global batch, on this rank.
            weight: scalar, what the losses weigh in the backward; the states of the teacher are
                let go one by one. None measures the losses without gradients.
        """
        self.sums = torch.zeros_like(self.sums)
        with ExitStack() as handles:
            for pair, chunk in self._here(self._places, chunks):
                use = self._join(pair, chunk, micro_batches, weight)
                handles.callback(watch(chunk, pair.kind, pair.student, use).remove)
            yield
        if weight is not None:
            self._kept = {}

    def _join(
        self,
        pair: Pair,
        chunk: HiddenGPTModel,
        micro_batches: Sequence[Batch],
        weight: Tensor | None,
    ) -> Use:
        """Hook one loss in. A chunk sees its micro-batches in order, in forward and backward.

        Under activation recompute a layer runs without gradients first and again, with gradients,
        in the backward: the losses belong to the pass with gradients.
        """
        kept, slot, order = self._kept[pair], self.pairs.index(pair), itertools.count()

        def use(states: States, carrier: Tensor) -> Tensor:
            if torch.is_grad_enabled() != (weight is not None):
                return carrier
            index = next(order)
            teacher = kept[index]
            assert teacher is not None
            loss = self._loss(pair, chunk, states, teacher, micro_batches[index]["loss_mask"].t())
            if self._counts(pair):
                self.sums[slot] += loss.detach()
            if weight is None:
                return carrier
            kept[index] = None
            return attach(carrier, loss, weight.to(loss.dtype))

        return use

    def _counts(self, pair: Pair) -> bool:
        """Whether this rank's sum is part of the total: replicas count once."""
        split = pair.kind not in STATE_LOSSES or self.parallel.sequence_parallel
        return split or self.groups.tp.rank() == 0

    def _loss(
        self, pair: Pair, chunk: HiddenGPTModel, states: States, teacher: States, mask: Tensor
    ) -> Tensor:
        """Return sum over this rank's tokens; ``mask`` is ``[s, b]`` of the full local sequence."""
        if pair.kind == "attention_relation":
            return relation_loss(
                states,
                teacher,
                mask,
                self._allowed(mask.size(0)),
                local_heads=self._relation_heads // self.groups.tp.size(),
                total_heads=self._relation_heads,
                gather=self._gather,
            )
        (hidden,), (target,) = states, teacher
        if self.parallel.sequence_parallel:
            mask = mask.chunk(self.groups.tp.size())[self.groups.tp.rank()]
        if self.projected:
            hidden = getattr(chunk, PROJECTION)(hidden)
        return state_loss(hidden, target, mask, self.config.metric)

    def _allowed(self, length: int) -> Tensor:
        """Which positions see which; made once per length: copying it would wait for the device."""
        if length not in self._masks:
            self._masks[length] = causal_mask(length, self.groups.cp, self._device)
        return self._masks[length]

    def _gather(self, local: Tensor) -> Tensor:
        return gather_sequence(local, self.groups.cp)

    # ---- numbers

    def reduced(self) -> Tensor:
        """Return ``[pairs]`` sums over the global batch, the same on every rank (collective)."""
        dist.all_reduce(self.sums, group=self.groups.mp)
        dist.all_reduce(self.sums, group=self.groups.dp_cp)
        return self.sums

    def per_token(self, tokens: float) -> dict[str, float]:
        """Return losses of the pass that ran last, in the order in which they are logged."""
        sums = zip(self.pairs, self.sums.tolist(), strict=True)
        return {f"intermediate/{loss_name(pair)}": value / tokens for pair, value in sums}

    # ---- training

    def finalize_with(self, config: TransformerConfig) -> None:
        """Add up the projection's gradients when Megatron finalises those of a batch.

        Args:
            config: the one config that all student chunks share.
        """
        if self.projected:
            before = config.finalize_model_grads_func
            config.finalize_model_grads_func = partial(self._finalize, before)

    def _finalize(self, before: Callable[..., None], *args: object, **kwargs: object) -> None:
        before(*args, **kwargs)
        shape = (self.teacher.hidden_size, self.student.hidden_size)
        sum_gradients(self.projections, shape, self.groups.pp, self._device)

    @property
    def keys(self) -> str:
        """The losses as they are set on the command line."""
        return f"distillation.intermediate.losses=[{','.join(self.config.losses)}]"

    def check_checkpoint(self, folder: Path) -> None:
        """Refuse a training checkpoint without the projection.

        Raises:
            ValueError: it was written by a run that had none.
        """
        key = f"{PROJECTION}.weight"
        if self.projected and key not in dist_checkpointing.load_tensors_metadata(str(folder)):
            raise ValueError(
                f"{folder} has no {key}, which {self.keys} trains because student and teacher "
                f"differ in hidden_size; {START_AGAIN}"
            )


def _keep_in(kept: list[States | None], dtype: torch.dtype) -> Use:
    def use(states: States, carrier: Tensor) -> Tensor:
        kept.append(tuple(state.to(dtype).contiguous() for state in states))
        return carrier

    return use
