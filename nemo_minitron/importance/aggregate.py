"""Streaming aggregation of activations into one score per channel. Pure torch.

2407.14679, section 2.2: a score is ``Agg_batch(Agg_seq(activation))``, with ``mean`` of absolute
values, ``l2`` or ``var`` for each of the two. The default is (batch=l2, seq=mean).

The inner aggregation is not linear, so it must be complete before the outer one starts: what a rank
holds of a sample are *partial sums*, which the ranks that share the sample's tokens add up
(``reduce_partials``), and only then does ``commit`` go on to the batch. The batch sums are linear
again, so data-parallel ranks add theirs once, at the very end (``reduce_sums``).

Shape letters: s local sequence, b micro-batch, m modules, w local channels, k partial sums.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# Partial sums that each sequence aggregation needs: sum |x|; sum x^2; sum x and sum x^2.
PARTIALS = {"mean": 1, "l2": 1, "var": 2}
# Batch sums that each batch aggregation needs: sum y; sum y^2; both.
_SUMS = {"mean": ("sum",), "l2": ("squares",), "var": ("sum", "squares")}


def write_partials(x: Tensor, seq: str, out: Tensor) -> None:
    """Partial sums of one activation over its local positions.

    Args:
        x: ``[s, b, w]`` activation of one module, any float dtype.
        seq: sequence aggregation.
        out: ``[k, b, w]``, overwritten; its dtype (fp32 or fp64) is that of the sums.
    """
    if seq == "mean":
        torch.sum(x.abs(), dim=0, dtype=out.dtype, out=out[0])
        return
    x = x.float()
    if seq == "l2":
        torch.sum(x * x, dim=0, dtype=out.dtype, out=out[0])
        return
    # Around the local mean, so that fp32 is enough for the elements.
    mean = x.mean(dim=0)
    centred = x - mean
    squares = centred.square_().sum(dim=0)
    out[0] = mean.double() * x.size(0)
    out[1] = squares.double() + mean.double().square() * x.size(0)


def sequence_statistic(partials: Tensor, seq: str, positions: int | Tensor) -> Tensor:
    """Complete partial sums -> one statistic per sample.

    Args:
        partials: ``[m, k, b, w]`` sums over all positions of each sample.
        seq: sequence aggregation.
        positions: global positions per sample, or ``[m, b, 1]`` where samples differ.

    Returns:
        ``[m, b, w]`` fp64, not negative.
    """
    sums = partials.double()
    if seq == "mean":
        return sums[:, 0] / positions
    if seq == "l2":
        return sums[:, 0].sqrt()
    return (sums[:, 1] / positions - (sums[:, 0] / positions).square()).clamp_min(0.0)


class Accumulator:
    """Scores of ``m`` modules of ``w`` local channels each, sample by sample.

    Every micro-batch is: one ``observe`` per module, ``reduce_partials`` where a sample is spread
    over ranks, one ``commit``. Nothing here waits for the device.
    """

    def __init__(
        self, modules: int, width: int, *, batch: str, seq: str, device: torch.device
    ) -> None:
        """Start from no samples.

        Args:
            modules: modules observed per micro-batch.
            width: local channels of each.
            batch: batch aggregation.
            seq: sequence aggregation.
            device: where the activations are.
        """
        self.batch, self.seq = batch, seq
        self.samples = 0
        self._length = 0
        self.partials = torch.empty(
            modules,
            PARTIALS[seq],
            0,
            width,
            # A variance is the small difference of large sums.
            dtype=torch.float64 if "var" in (batch, seq) else torch.float32,
            device=device,
        )
        # fp64 costs nothing here: the tensors are small.
        self.sums = {
            name: torch.zeros(modules, width, dtype=torch.float64, device=device)
            for name in _SUMS[batch]
        }

    def observe(self, module: int, x: Tensor) -> None:
        """Note the ``[s, b, w]`` activation of module number ``module``."""
        if self.partials.size(2) != x.size(1):
            m, k, _, w = self.partials.shape
            self.partials = self.partials.new_zeros(m, k, x.size(1), w)
        write_partials(x, self.seq, self.partials[module])
        self._length = x.size(0)

    def commit(self, shards: int, valid: int) -> None:
        """Add the observed micro-batch to the batch sums.

        Args:
            shards: ranks over which the positions of each sample are spread, equally.
            valid: leading samples of the micro-batch that count; the rest is padding.
        """
        if valid == 0:
            return
        positions = self._length * shards
        y = sequence_statistic(self.partials[:, :, :valid], self.seq, positions)
        if "sum" in self.sums:
            self.sums["sum"] += y.sum(dim=1)
        if "squares" in self.sums:
            self.sums["squares"] += y.square_().sum(dim=1)
        self.samples += valid

    def scores(self) -> Tensor:
        """``[m, w]`` fp64 scores of all samples committed (and reduced) so far."""
        if self.samples == 0:
            raise ValueError("no sample was observed; set data.num_samples to at least 1")
        if self.batch == "l2":
            return self.sums["squares"].sqrt()
        mean = self.sums["sum"] / self.samples
        if self.batch == "mean":
            return mean
        return (self.sums["squares"] / self.samples - mean.square()).clamp_min(0.0)

    def state_dict(self) -> dict[str, Any]:
        """What was committed so far."""
        return {"samples": self.samples, "sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` returned."""
        self.samples = state["samples"]
        for name, values in self.sums.items():
            values.copy_(state["sums"][name])


class TokenSums(Protocol):
    """Sums over tokens: linear, so that ranks need not talk before the end."""

    tokens: int
    sums: Tensor


def token_state(acc: TokenSums) -> dict[str, Any]:
    """What was committed so far."""
    return {"tokens": acc.tokens, "sums": acc.sums}


def load_token_state(acc: TokenSums, state: dict[str, Any]) -> None:
    """Go on from what ``token_state`` returned."""
    acc.tokens = state["tokens"]
    acc.sums.copy_(state["sums"])


class BlockInfluence:
    """1 - cosine of every layer's input and output, averaged over tokens (2403.03853).

    Linear in the tokens, so ranks need not talk before the end.
    """

    def __init__(self, layers: int, *, device: torch.device) -> None:
        """Start from no tokens; ``layers`` local layers."""
        self.tokens = 0
        self.sums = torch.zeros(layers, dtype=torch.float64, device=device)
        # Per token of the micro-batch: norm of the input, norm of the output, their dot product.
        self._before, self._after, self._dot = torch.zeros(3, layers, 0, 0, device=device)
        self._chained: list[int] = []
        self._last: Tensor | None = None

    def observe(self, layer: int, before: Tensor, after: Tensor) -> None:
        """Note input and output ``[s, b, h]`` of local layer number ``layer``."""
        if self._dot.shape[1:] != before.shape[:2]:
            shape = (3, len(self.sums), *before.shape[:2])
            self._before, self._after, self._dot = self._dot.new_zeros(shape)
        norm = partial(torch.linalg.vector_norm, dim=-1, dtype=torch.float32)
        norm(after, out=self._after[layer])
        torch.linalg.vecdot(before.float(), after.float(), out=self._dot[layer])
        if self._last is before:  # then its norm is known
            self._chained.append(layer)
        else:
            norm(before, out=self._before[layer])
        self._last = after

    def commit(self, valid: int) -> None:
        """Add the first ``valid`` samples of the observed micro-batch."""
        self._before[self._chained] = self._after[[layer - 1 for layer in self._chained]]
        self._chained, self._last = [], None
        norms = (self._before * self._after).clamp_min_(torch.finfo(torch.float32).tiny)
        influence = (1.0 - self._dot / norms)[:, :, :valid]
        self.sums += influence.sum(dim=(1, 2), dtype=torch.float64)
        self.tokens += valid * self._dot.size(1)

    def scores(self) -> Tensor:
        """``[layers]`` fp64 influence of all tokens committed (and reduced) so far."""
        if self.tokens == 0:
            raise ValueError("no token was observed; set data.num_samples to at least 1")
        return self.sums / self.tokens


def reduce_partials(accumulators: Sequence[Accumulator], group: dist.ProcessGroup) -> None:
    """Complete the observed samples over the ranks of ``group``: one collective for all modules.

    Args:
        accumulators: those whose samples are spread over ``group``, same sequence aggregation.
        group: ranks that hold different positions of the same samples and the same channels.
    """
    if group.size() > 1 and accumulators:
        all_reduce_flat([acc.partials for acc in accumulators], group)


def reduce_sums(accumulators: Sequence[Accumulator | TokenSums], group: dist.ProcessGroup) -> None:
    """Add up what the ranks of ``group`` accumulated: one collective for all modules.

    Args:
        accumulators: same order on every rank.
        group: ranks that saw different samples (for sums over tokens: different tokens).
    """
    if group.size() == 1 or not accumulators:
        return
    counts = torch.tensor(
        [acc.samples if isinstance(acc, Accumulator) else acc.tokens for acc in accumulators],
        dtype=torch.float64,
        device=_sums(accumulators[0])[0].device,
    )
    all_reduce_flat([counts, *(part for acc in accumulators for part in _sums(acc))], group)
    for acc, count in zip(accumulators, counts.tolist(), strict=True):
        if isinstance(acc, Accumulator):
            acc.samples = int(count)
        else:
            acc.tokens = int(count)


def _sums(acc: Accumulator | TokenSums) -> list[Tensor]:
    return list(acc.sums.values()) if isinstance(acc, Accumulator) else [acc.sums]


def all_reduce_flat(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """Sum each tensor (all of one dtype) over ``group``, in place, in one collective."""
    if group.size() == 1 or not tensors:
        return
    if len(tensors) == 1 and tensors[0].is_contiguous():
        dist.all_reduce(tensors[0], group=group)
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
