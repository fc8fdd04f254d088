"""Second moments of the activations that pruning cuts, for ``pruning.compensate``.

``E[x x^T]`` over the tokens of a calibration, uncentred, as least squares without an offset wants
it:

- ``ffn``: input of each ``mlp.linear_fc2``,
- ``head``: input of each ``self_attention.linear_proj``,
- ``hidden``: output of each norm that a linear layer reads, the final one included.

Channels of ffn and head are split over the tensor-parallel ranks: each holds the rows of its own
channels against all columns, for which activations (not weights) are gathered. Hidden states are
whole on every rank, which looks at its share of the positions and holds all of the matrix. All of
it is fp32: 4 f^2 bytes per layer for ffn, divided by the tensor-parallel size.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nemo_minitron.config.axes import AXES, Axis
from nemo_minitron.families.dims import DIMS
from nemo_minitron.importance.experts import gather
from nemo_minitron.models.norms import norms_and_readers, on_normed
from nemo_minitron.pruning.scores import MOMENTS, moment_file
from nemo_minitron.runtime.groups import ParallelGroups


def scored_module(block: Any, axis: Axis) -> nn.Module:
    """Return the module of a transformer layer whose input is scored for an axis.

    Raises:
        ValueError: the layer has no such module.
    """
    module: Any = block
    for name in axis.seen_at.split("."):
        owner, module = module, getattr(module, name, None)
        if module is None:
            raise ValueError(
                f"layer {block.layer_number} has a {type(owner).__name__} without {name}, so axis "
                f"'{axis.name}' cannot be scored; leave {axis.name} out of scores.axes"
            )
    return module


class MomentRecorder:
    """Sums of outer products of one model chunk, fed by hooks of its own.

    Attributes:
        sums: axis -> ``[matrices, rows, columns]`` local, fp32.
        indices: axis -> global index of each matrix.
    """

    def __init__(
        self,
        chunk: Any,
        groups: ParallelGroups,
        axes: list[str],
        share: Callable[[Tensor], Tensor],
        valid: Callable[[], int],
    ) -> None:
        """Prepare the sums; registers nothing yet.

        Args:
            chunk: a Megatron ``GPTModel`` without wrappers.
            groups: this rank's process groups.
            axes: what to record.
            share: a ``[s, b, h]`` hidden state -> the positions that this rank looks at.
            valid: leading samples of the current micro-batch that count on this rank.
        """
        self.groups, self.share, self.valid = groups, share, valid
        self._blocks = list(chunk.decoder.layers)
        self._final = getattr(chunk.decoder, "final_layernorm", None)
        config, tp = chunk.config, groups.tp.size()
        layers = [int(block.layer_number) - 1 for block in self._blocks]
        norms = [2 * layer + side for layer in layers for side in range(2)]
        if self._final is not None:
            norms.append(2 * config.num_layers)
        seen = (AXES[axis] for axis in axes if AXES[axis].seen_at)
        widths = {axis.name: DIMS[axis.scored_dim].size(config) for axis in seen}
        known = {axis: (layers, width // tp, width) for axis, width in widths.items()}
        known["hidden"] = (norms, config.hidden_size, config.hidden_size)
        device = next(chunk.parameters()).device
        self.indices = {axis: known[axis][0] for axis in axes}
        self.sums = {
            axis: torch.zeros(len(known[axis][0]), *known[axis][1:], device=device) for axis in axes
        }

    def register(self, keep: Callable[[RemovableHandle], object]) -> None:
        """Register all hooks, handing every handle to ``keep`` at once."""
        for local, block in enumerate(self._blocks):
            if "hidden" in self.sums:
                for side, (norm, linear) in enumerate(norms_and_readers(block)):
                    observe = partial(self._observe_hidden, 2 * local + side)
                    keep(on_normed(norm, linear, self.share, observe))
            for axis in (AXES[name] for name in self.sums if AXES[name].seen_at):
                hook = partial(self._on_input, axis.name, local)
                keep(scored_module(block, axis).register_forward_pre_hook(hook))
        if self._final is not None and "hidden" in self.sums:
            observe = partial(self._observe_hidden, 2 * len(self._blocks))
            keep(on_normed(self._final, None, self.share, observe))

    def _observe_hidden(self, index: int, x: Tensor) -> None:
        x = self._counted(x)
        self.sums["hidden"][index].addmm_(x.t(), x)

    def _on_input(self, axis: str, local: int, _: nn.Module, args: tuple[Any, ...]) -> None:
        mine = self._counted(args[0])
        self.sums[axis][local].addmm_(mine.t(), gather(mine, self.groups.tp, dim=1))

    def _counted(self, x: Tensor) -> Tensor:
        """``[s, b, w]`` -> ``[tokens that count, w]`` fp32."""
        return x[:, : self.valid()].float().flatten(0, 1)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what has been accumulated so far."""
        return self.sums

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what ``state_dict`` returned."""
        for axis, sums in self.sums.items():
            sums.copy_(state[axis])

    def matrices(self, tokens: int) -> Iterator[tuple[str, int, Tensor | None]]:
        """Axis, global index and the mean ``[w, w]`` over all tokens, one after another.

        Collective over all groups but the pipeline's; tensor-parallel rank 0 gets the matrices, the
        others None.

        Args:
            tokens: of the whole calibration.
        """
        for axis, sums in self.sums.items():
            for index, matrix in zip(self.indices[axis], sums, strict=True):
                for group in (self.groups.cp, self.groups.dp):
                    if group.size() > 1:
                        dist.all_reduce(matrix, group=group)
                yield axis, index, self._whole(axis, matrix, tokens)

    def _whole(self, axis: str, matrix: Tensor, tokens: int) -> Tensor | None:
        group = self.groups.tp
        if group.size() == 1:
            return (matrix / tokens).cpu()
        first, root = group.rank() == 0, dist.get_global_rank(group, 0)
        if axis == "hidden":
            dist.reduce(matrix, root, group=group)
            return (matrix / tokens).cpu() if first else None
        parts = [torch.empty_like(matrix) for _ in range(group.size())] if first else None
        dist.gather(matrix, parts, root, group=group)
        return (torch.cat(parts) / tokens).cpu() if parts is not None else None


def save_moments(
    recorders: list[MomentRecorder], groups: ParallelGroups, tokens: int, folder: Path
) -> None:
    """Write every matrix into a file of its own, the layers of a pipeline stage by that stage.

    Args:
        recorders: of this rank's chunks.
        groups: this rank's process groups.
        tokens: of the whole calibration.
        folder: of the result.
    """
    from safetensors.torch import save_file

    (folder / MOMENTS).mkdir(exist_ok=True)
    writes = groups.cp.rank() == 0 and groups.dp.rank() == 0
    for recorder in recorders:
        for axis, index, matrix in recorder.matrices(tokens):
            if matrix is not None and writes:
                save_file({"moment": matrix}, moment_file(folder, axis, index))
