"""Forward hooks on Megatron model chunks that feed the accumulators.

What is scored where (2407.14679, section 2.2):

- ``hidden``: output of each layer's input norm and pre-MLP norm (what attention and the MLP read,
  in a family that has no norms there),
- an axis with ``Axis.seen_at`` (``ffn``, ``head``, ``shared_expert_ffn``): input of that module,
  or a part of its output (``mamba_head``: the channels x that a Mamba layer projects),
- ``layer``: input and output of the transformer layer,
- ``expert`` and ``expert_ffn``: see ``importance/experts.py``; layers with experts have no ``ffn``.

Activations are ``[s, b, w]`` and local: ffn and head channels are split over the tensor-parallel
ranks; under sequence parallelism the hidden states are split along s over the same ranks, and where
they hold copies of them each rank looks at its share of s; context parallelism splits every s. A
chunk is one virtual pipeline stage; all ranks that share its samples
run its forward passes in the same order, so one exchange at the end of each is enough.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nemo_minitron.config.axes import AXES, Axis, axis_size
from nemo_minitron.config.layers import EXPERTS, kinds_of
from nemo_minitron.config.stages import ScoreConfig
from nemo_minitron.families.dims import DIMS
from nemo_minitron.importance.aggregate import (
    Accumulator,
    BlockInfluence,
    TokenSums,
    all_reduce_flat,
    criterion,
    load_token_state,
    token_state,
)
from nemo_minitron.importance.angles import BlockAngles
from nemo_minitron.importance.experts import ExpertRecorder
from nemo_minitron.importance.moments import MomentRecorder, scored_module
from nemo_minitron.models.norms import norms_and_readers, on_normed
from nemo_minitron.runtime.groups import ParallelGroups


def kinds_of_chunk(chunk: Any) -> list[str]:
    """Return the letters (``config.layers``) of each layer of a chunk."""
    letters: list[str] | None = getattr(chunk.decoder, "layer_type_list", None)
    if letters is not None:
        return letters
    kinds = kinds_of(chunk.config)
    return [kinds[int(block.layer_number) - 1] for block in chunk.decoder.layers]


def rows_seen(axis: Axis, config: Any) -> tuple[int, int]:
    """Return the first scored row in the dim of its module, and the number of them (global)."""
    sizes = DIMS[axis.scored_dim].part_sizes(config)
    if axis.seen_part is None:
        return 0, sum(sizes)
    return sum(sizes[: axis.seen_part]), sizes[axis.seen_part]


class ChunkRecorder:
    """Accumulators of one model chunk, fed by its hooks.

    Attributes:
        layers: global 0-based indices of the chunk's layers.
        channels: axis -> accumulator; ``hidden`` has a module per norm (two of a GPT layer), the
            other axes one per layer that has the axis, in layer order.
        seen: axis -> local layers that have it; of ``hidden`` the layer of every norm.
        influence: accumulator of block influence, None when layers are not scored by it.
        angles: accumulator of block angles, one for all chunks of a rank; None when not scored.
        samples: those that counted so far on this rank, each of them whole.
        tokens: their positions.
        experts: sums over the experts' tokens, None in a dense model.
        moments: sums of outer products, None where none are asked for.
    """

    def __init__(
        self,
        chunk: Any,
        groups: ParallelGroups,
        scores: ScoreConfig,
        valid: Callable[[int], int] | None,
        angles: BlockAngles | None = None,
    ) -> None:
        """Prepare accumulators; registers nothing yet.

        Args:
            chunk: a Megatron ``GPTModel`` without wrappers.
            groups: this rank's process groups.
            scores: what to score and how.
            valid: micro-batch number -> leading samples of it that count on this rank; None where
                all of them do.
            angles: accumulator of block angles.
        """
        self.chunk, self.groups, self.angles = chunk, groups, angles
        self.samples, self.tokens, self._size = 0, 0, 0
        self.valid = valid or (lambda micro_batch: self._size)
        config = chunk.config
        self._split = bool(config.sequence_parallel)
        self._ranks, self._rank = groups.tp.size(), groups.tp.rank()
        self._positions = 0
        self._state: tuple[Tensor, Tensor] | None = None
        blocks = list(chunk.decoder.layers)
        self.layers = [int(block.layer_number) - 1 for block in blocks]
        self.micro_batches = 0
        tp, count = self._ranks, len(blocks)
        device = next(chunk.parameters()).device
        self._norms = [(n, *pair) for n, b in enumerate(blocks) for pair in norms_and_readers(b)]
        scored = (axis for axis in AXES.values() if axis.seen_at and axis.name in scores.axes)
        kinds = kinds_of_chunk(chunk)
        # A stage takes part in what only layers of other stages have.
        whole = getattr(chunk, "hybrid_layer_pattern", None) or "".join(kinds_of(config))
        axes = [a for a in scored if a.kind in whole and axis_size(config, a.name)]
        self.seen = {a.name: [i for i, kind in enumerate(kinds) if a.kind in kind] for a in axes}
        self.seen["hidden"] = [layer for layer, *_ in self._norms]
        widths = {a.name: rows_seen(a, config)[1] // tp for a in axes}
        widths = {"hidden": config.hidden_size, **widths}
        self.channels = {
            axis: Accumulator(
                len(self.seen[axis]),
                width,
                batch=scores.batch_aggregation,
                seq=scores.seq_aggregation,
                device=device,
            )
            for axis, width in widths.items()
            if axis in scores.axes
        }
        self._criterion = criterion(scores.criterion)
        self.influence = None
        if scores.layers_by("block_influence"):
            self.influence = BlockInfluence(count, device=device)
        self._blocks = blocks
        self.experts: ExpertRecorder | None = None
        if config.num_moe_experts is not None:
            self.routed = [i for i, kind in enumerate(kinds) if EXPERTS in kind]
            moe = [blocks[layer].mlp for layer in self.routed]
            self.experts = ExpertRecorder(chunk, moe, groups, scores, self._valid_now)
        self.moments: MomentRecorder | None = None
        if scores.moments:
            self.moments = MomentRecorder(
                chunk, groups, scores.moments, self._share, self._valid_now
            )

    def _valid_now(self) -> int:
        return self.valid(self.micro_batches)

    def register(self, keep: Callable[[RemovableHandle], object]) -> None:
        """Register all hooks, handing every handle to ``keep`` at once.

        Raises:
            ValueError: a layer has no dense MLP or no self-attention to hook.
        """
        keep(self.chunk.register_forward_hook(self._finish))
        for part in (self.experts, self.moments):
            if part is not None:
                part.register(keep)
        for first in self._blocks[:1]:
            keep(first.register_forward_pre_hook(self._begin, with_kwargs=True))
        if "hidden" in self.channels:
            for index, (_, norm, linear) in enumerate(self._norms):
                observe = partial(self.channels["hidden"].observe, index)
                keep(on_normed(norm, linear, self._share, observe))
        for name, layers in self.seen.items():
            for number, local in enumerate(layers):
                if name in self.channels and name != "hidden":
                    self._see(AXES[name], number, self._blocks[local], keep)
        for local, block in enumerate(self._blocks):
            if self.influence is not None or self.angles is not None:
                hook = partial(self._on_layer, local)
                keep(block.register_forward_hook(hook, with_kwargs=True))

    def _see(
        self, axis: Axis, number: int, block: Any, keep: Callable[[RemovableHandle], object]
    ) -> None:
        """Hook what is scored for an axis in one layer, the ``number``th that has it."""
        module, observe = scored_module(block, axis), self.channels[axis.name].observe
        if axis.seen_part is None:
            keep(module.register_forward_pre_hook(partial(self._on_input, observe, number)))
            return
        start, count = (rows // self._ranks for rows in rows_seen(axis, self.chunk.config))
        keep(module.register_forward_hook(partial(self._on_part, observe, number, start, count)))

    # Hooks: torch gives (module, args[, kwargs][, output]) after the bound arguments.

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note a micro-batch's positions at its first layer; sequence parallelism splits s."""
        length, self._size = (args[0] if args else kwargs["hidden_states"]).shape[:2]
        self._positions = length * self._ranks if self._split else length

    @staticmethod
    def _on_input(
        observe: Callable[[int, Tensor], None],
        local: int,
        _: nn.Module,
        args: tuple[Any, ...],
    ) -> None:
        observe(local, args[0])

    @staticmethod
    def _on_part(
        observe: Callable[[int, Tensor], None],
        local: int,
        start: int,
        count: int,
        _: nn.Module,
        args: tuple[Any, ...],
        output: tuple[Tensor, Any],
    ) -> None:
        observe(local, output[0].narrow(-1, start, count))

    def _on_layer(
        self,
        local: int,
        _: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: tuple[Tensor, Any] | Tensor,
    ) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output if isinstance(output, Tensor) else output[0]
        known = self._state is not None and self._state[0] is before
        before = self._state[1] if known else self._share(before)  # type: ignore[index]  # `known` says that it is there
        self._state = after, self._share(after)
        after = self._state[1]
        if self.influence is not None:
            self.influence.observe(local, before, after)
        if self.angles is not None:
            layer = self.layers[local]
            self.angles.observe(self.micro_batches, layer, before)
            if layer + 1 == self.chunk.config.num_layers:
                self.angles.observe(self.micro_batches, layer + 1, after)

    def _share(self, hidden: Tensor) -> Tensor:
        """The positions of a ``[s, b, h]`` hidden state that this tensor-parallel rank looks at."""
        ranks, rank = self._ranks, self._rank
        if self._split or ranks == 1:
            return hidden
        length = hidden.size(0)
        return hidden[length * rank // ranks : length * (rank + 1) // ranks]

    def _finish(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Complete a micro-batch's samples over the ranks that share them."""
        valid, positions = self._valid_now(), self._positions * self.groups.cp.size()
        self.micro_batches += 1
        self.samples += valid
        self.tokens += valid * positions
        partials = {axis: accumulator.partials() for axis, accumulator in self.channels.items()}
        if "hidden" in partials:
            all_reduce_flat([partials["hidden"]], self.groups.tp)
        all_reduce_flat(list(partials.values()), self.groups.cp)
        for axis, sums in partials.items():
            self.channels[axis].commit(sums, positions, valid)
        if self.influence is not None:
            self.influence.commit(valid)
        self._state = None
        if self.angles is not None and self.groups.pp.size() == 1:
            self.angles.flush(self.valid)  # in a pipeline this has to wait for the other stages

    @torch.no_grad()
    def scores(self) -> dict[str, Tensor]:
        """Axis -> ``[modules, w]`` fp64 scores of local channels, from complete batch sums."""
        found = {axis: accumulator.scores() for axis, accumulator in self.channels.items()}
        for axis in (AXES[name] for name in found):
            if axis.seen_at and axis.seen_part is None:
                for values, local in zip(found[axis.name], self.seen[axis.name], strict=True):
                    linear = scored_module(self._blocks[local], axis)
                    values.copy_(self._criterion(values, linear))
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what has been accumulated so far."""
        return {
            "micro_batches": self.micro_batches,
            "channels": {axis: acc.state_dict() for axis, acc in self.channels.items()},
            "tokens": [token_state(acc) for acc in self._token_sums()],
            "experts": None if self.experts is None else self.experts.state_dict(),
            "moments": None if self.moments is None else self.moments.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` returned."""
        self.micro_batches = state["micro_batches"]
        for axis, accumulator in self.channels.items():
            accumulator.load_state_dict(state["channels"][axis])
        for sums, values in zip(self._token_sums(), state["tokens"], strict=True):
            load_token_state(sums, values)
        if self.experts is not None:
            self.experts.load_state_dict(state["experts"])
        if self.moments is not None:
            self.moments.load_state_dict(state["moments"])

    def _token_sums(self) -> list[TokenSums]:
        return [acc for acc in (self.influence, self.angles) if acc is not None]


def _block_angles(
    chunks: Sequence[Any], groups: ParallelGroups, scores: ScoreConfig
) -> BlockAngles | None:
    """Return the accumulator of block angles that all chunks of this rank feed."""
    if not scores.layers_by("block_angular"):
        return None
    num_layers = chunks[0].config.num_layers
    mine = [block.layer_number - 1 for chunk in chunks for block in chunk.decoder.layers]
    if num_layers - 1 in mine:
        mine.append(num_layers)
    owned = [mine] * groups.pp.size()
    if groups.pp.size() > 1:
        dist.all_gather_object(owned, mine, group=groups.pp)
    device = next(chunks[0].parameters()).device
    return BlockAngles(owned, num_layers, scores.block_sizes, groups.pp, device)


@contextmanager
def record(
    chunks: Sequence[Any],
    groups: ParallelGroups,
    scores: ScoreConfig,
    valid: Callable[[int], int] | None = None,
) -> Iterator[list[ChunkRecorder]]:
    """Hook every chunk; the hooks are gone when the context ends, however it ends.

    Args:
        chunks: this rank's model chunks without wrappers, in virtual-stage order.
        groups: this rank's process groups.
        scores: what to score and how.
        valid: micro-batch number -> leading samples of it that count on this rank, None where all
            of them do. Every chunk sees the micro-batches in the same order.

    Yields:
        One recorder per chunk.
    """
    angles = _block_angles(chunks, groups, scores)
    recorders = [ChunkRecorder(chunk, groups, scores, valid, angles) for chunk in chunks]
    with ExitStack() as handles:
        for recorder in recorders:
            recorder.register(lambda handle: handles.callback(handle.remove))
        with torch.no_grad():
            yield recorders
