"""Layer ablation: the LM loss without some layers (2407.14679 and 2408.11796).

Nothing is rebuilt. Every micro-batch goes through Megatron's schedule once whole and then once per
block of layers, that block bypassed on the ranks that hold it; in a pipeline these passes follow
each other like any micro-batches, so stages do not wait for one another. Layers before the block
give the output they gave in the whole pass: on average half of the layers are not run again.
Memory: the outputs of this rank's layers for one micro-batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

from nemo_minitron.config.stages import ScoreConfig
from nemo_minitron.config.training import DataConfig
from nemo_minitron.evaluation.lm_loss import batch_sums, vocab_shard
from nemo_minitron.importance.calibration import Calibration, calibration_runs
from nemo_minitron.models.build import HiddenGPTModel
from nemo_minitron.runtime.groups import ParallelGroups

Block = tuple[int, int]
"""Layers ``first .. stop - 1``, global and 0-based; empty when both are equal."""
LayerOutput = Tensor | tuple[Tensor, Any]
"""Hidden states, beside which layers of Transformers, but not of Mamba, return a context."""


def ablated_blocks(num_layers: int, scores: ScoreConfig) -> list[Block]:
    """Return the blocks to ablate, the empty one first; an empty list if no score needs any."""
    sizes = set(scores.block_sizes) if scores.layers_by("block_lm_loss") else set()
    sizes |= {1} if scores.layers_by("lm_loss") else set()
    blocks = [
        (first, first + size) for size in sorted(sizes) for first in range(num_layers - size + 1)
    ]
    return [(0, 0), *blocks] if blocks else []


class _Bypass:
    """Forward passes of one chunk: number k leaves out block k modulo their number."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = blocks
        self.calls = 0
        self.block = blocks[0]
        self.whole: dict[int, LayerOutput] = {}

    def begin(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """Note that a forward pass of the chunk begins."""
        self.block = self.blocks[self.calls % len(self.blocks)]
        self.calls += 1

    def layer(
        self, index: int, forward: Callable[..., LayerOutput], *args: Any, **kwargs: Any
    ) -> LayerOutput:
        """Stands in for the ``forward`` of layer ``index``."""
        first, stop = self.block
        if first == stop:
            self.whole[index] = forward(*args, **kwargs)
            return self.whole[index]
        if index < first:
            return self.whole[index]
        if index < stop:
            state = args[0] if args else kwargs["hidden_states"]
            return (state, None) if isinstance(self.whole[index], tuple) else state
        return forward(*args, **kwargs)


@contextmanager
def ablating(chunks: Sequence[HiddenGPTModel], blocks: Sequence[Block]) -> Iterator[None]:
    """Make forward pass k of every chunk skip the layers of block ``k % len(blocks)``.

    Args:
        chunks: this rank's model chunks.
        blocks: the first one empty; passes of one round see the same micro-batch.
    """
    with ExitStack() as stack:
        for chunk in chunks:
            bypass = _Bypass(blocks)
            stack.callback(chunk.register_forward_pre_hook(bypass.begin).remove)
            for layer in chunk.decoder.layers:
                layer.forward = partial(bypass.layer, layer.layer_number - 1, layer.forward)
                stack.callback(delattr, layer, "forward")
        yield


class LayerAblation:
    """Measures the LM loss of the model without each block.

    Attributes:
        sums: ``[blocks, 2]`` LM loss and tokens of this rank; zeros off the last stage.
    """

    def __init__(
        self, chunks: list[HiddenGPTModel], groups: ParallelGroups, blocks: Sequence[Block]
    ) -> None:
        """Start from no samples.

        Args:
            chunks: this rank's model chunks.
            groups: this rank's process groups.
            blocks: see ``ablated_blocks``.
        """
        self.chunks, self.groups, self.blocks = chunks, groups, blocks
        self.runs = 0
        device = next(chunks[0].parameters()).device
        self.sums = torch.zeros(len(blocks), 2, dtype=torch.float64, device=device)

    def state_dict(self) -> dict[str, Any]:
        """Return what has been measured so far."""
        return {"runs": self.runs, "sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` returned."""
        self.runs = state["runs"]
        self.sums.copy_(state["sums"])

    @torch.no_grad()
    def run(
        self,
        dataset: Dataset[dict[str, Tensor]],
        data: DataConfig,
        plan: Calibration,
        vocab_size: int,
        on_samples: Callable[[int], None],
    ) -> None:
        """Measure all samples that are left; ``on_samples`` is told of every forward pass of one.

        Args:
            dataset: at least ``plan.samples`` samples.
            data: batch sizes.
            plan: how samples are spread; with them ends the measurement.
            vocab_size: true vocabulary.
            on_samples: see above.
        """
        shard = vocab_shard(self.chunks, self.groups, vocab_size)
        args = (self.chunks, self.groups, dataset, data, plan, self.runs)
        with ablating(self.chunks, self.blocks):
            for batches in calibration_runs(*args):
                passes = [batch for batch in batches for _ in self.blocks]
                sums = batch_sums(self.chunks, passes, shard)
                if sums:
                    self.sums += torch.stack(sums).unflatten(0, (-1, len(self.blocks))).sum(0)
                before, self.runs = plan.done(self.runs), self.runs + 1
                on_samples((plan.done(self.runs) - before) * len(self.blocks))

    def losses(self) -> dict[Block, float]:
        """Return block -> LM loss in nats per token without it; collective, the same on every rank.

        Raises:
            ValueError: no token of the samples counts for the loss.
        """
        total = self.sums.clone()
        groups = self.groups
        dist.all_reduce(total, group=groups.dp_cp)
        dist.broadcast(total, src=groups.last_stage_global_rank, group=groups.pp)
        # Replicas may differ in the last bit, so one of them decides.
        dist.broadcast(total, src=dist.get_global_rank(groups.tp, 0), group=groups.tp)
        return dict(zip(self.blocks, per_token(total), strict=True))


def per_token(sums: Tensor) -> list[float]:
    """``[blocks, 2]`` sums of losses and tokens -> loss per token of each block.

    Raises:
        ValueError: there are no tokens.
    """
    if not sums[:, 1].all():
        raise ValueError(
            "no token of the samples of scores.lm_loss_samples counts for the LM loss; raise it, "
            "set data.split_name to samples that hold answers, or take another criterion than "
            "lm_loss and block_lm_loss in scores.layer_criteria"
        )
    losses: list[float] = (sums[:, 0] / sums[:, 1]).tolist()
    return losses
