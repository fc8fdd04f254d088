"""Streaming aggregation of activations into one score per channel. Pure torch.

2407.14679, section 2.2: a score is ``Agg_batch(Agg_seq(activation))``, with ``mean`` of absolute
values, ``l2`` or ``var`` for each of the two. The default is (batch=l2, seq=mean).

The inner aggregation is not linear, so it must be complete before the outer one starts: what a rank
holds of a sample are *partial sums*, which the ranks that share the sample's tokens add up
(``all_reduce_flat``), and only then does ``commit`` go on to the batch. The batch sums are linear
again, so data-parallel ranks add theirs once, at the very end (``reduce_sums``).

Shape letters: s local sequence, b micro-batch, m modules, w local channels, k partial sums.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_minitron.runtime.plugins import named

Criterion = Callable[[Tensor, nn.Module], Tensor]
"""``(values, linear) -> scores`` of the channels that a linear layer reads, ``[w]`` each.

``values``: aggregated activations of the whole calibration set, fp64. All are local: under tensor
parallelism ``linear.weight`` is ``[out, w]`` of a ``RowParallelLinear``, whole for each channel of
this rank. A score may depend on its own channel alone, or it would depend on the layout.
"""
CRITERIA: dict[str, Criterion] = {"activation": lambda values, linear: values}
"""Value of ``scores.criterion`` -> the criterion."""
# Partial sums that each sequence aggregation needs: sum |x|; sum x^2; sum x and sum x^2.
PARTIALS = {"mean": 1, "l2": 1, "var": 2}
# Batch sums that each batch aggregation needs: sum y; sum y^2; both.
_SUMS = {"mean": ("sum",), "l2": ("squares",), "var": ("sum", "squares")}


def partial_sums(x: Tensor, seq: str, dtype: torch.dtype) -> Tensor:
    """Return partial sums of one activation over its local positions.

    Few operations on few bytes: between the matrix products of a forward pass each of them finds
    its input and its own code out of the caches.

    Args:
        x: ``[s, b, w]`` activation of one module, any float dtype.
        seq: sequence aggregation.
        dtype: fp32 or fp64, that of the sums.

    Returns:
        ``[k, b, w]``.
    """
    if seq == "mean":
        return torch.sum(x.abs(), 0, keepdim=True, dtype=dtype)
    x = x.float()
    if seq == "l2":
        return torch.sum(x * x, 0, keepdim=True, dtype=dtype)
    # Around the local mean, so that fp32 is enough for the elements.
    mean = x.sum(dim=0) / max(x.size(0), 1)
    squares = (x - mean).square_().sum(dim=0).to(dtype)
    mean = mean.to(dtype)
    return torch.stack([mean * x.size(0), squares + mean.square() * x.size(0)])


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


@cache
def criterion(name: str) -> Criterion:
    """Return the criterion that ``scores.criterion`` names, of this package or of another.

    Raises:
        ValueError: the package that adds it cannot be imported.
    """
    return named("criteria", CRITERIA, name, "scores.criterion")


class Accumulator:
    """Scores of ``m`` modules of ``w`` local channels each, sample by sample.

    Every micro-batch is: one ``observe`` per module, ``partials``, their sum over the ranks that a
    sample is spread over, one ``commit``. Nothing here waits for the device.
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
        # A variance is the small difference of large sums.
        self._dtype = torch.float64 if "var" in (batch, seq) else torch.float32
        self._observed: list[Tensor | None] = [None] * modules
        # fp64 costs nothing here: the tensors are small.
        self.sums = {
            name: torch.zeros(modules, width, dtype=torch.float64, device=device)
            for name in _SUMS[batch]
        }

    def observe(self, module: int, x: Tensor) -> None:
        """Note the ``[s, b, w]`` activation of module number ``module``."""
        self._observed[module] = partial_sums(x, self.seq, self._dtype)

    def partials(self) -> Tensor:
        """``[m, k, b, w]`` partial sums of the observed micro-batch; the next one may begin."""
        if not self._observed:  # a stage without such a layer
            sums = next(iter(self.sums.values()))
            return sums.new_zeros(0, PARTIALS[self.seq], 0, sums.size(1), dtype=self._dtype)
        sums = torch.stack(self._observed)  # type: ignore[arg-type]  # torch names what is None
        self._observed = [None] * len(self._observed)
        return sums

    def commit(self, partials: Tensor, positions: int, valid: int) -> None:
        """Add a micro-batch to the batch sums.

        Args:
            partials: what ``partials`` returned, complete over the ranks that share the samples.
            positions: global positions of a sample.
            valid: leading samples of the micro-batch that count; the rest is padding.
        """
        if valid == 0:
            return
        y = sequence_statistic(partials[:, :, :valid], self.seq, positions)
        if "sum" in self.sums:
            self.sums["sum"] += y.sum(dim=1)
        if "squares" in self.sums:
            self.sums["squares"] += y.square_().sum(dim=1)
        self.samples += valid

    def scores(self) -> Tensor:
        """Return ``[m, w]`` fp64 scores of all samples committed (and reduced) so far."""
        if self.samples == 0:
            raise ValueError("no sample was observed; set data.num_samples to at least 1")
        if self.batch == "l2":
            return self.sums["squares"].sqrt()
        mean = self.sums["sum"] / self.samples
        if self.batch == "mean":
            return mean
        return (self.sums["squares"] / self.samples - mean.square()).clamp_min(0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return what has been committed so far."""
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
    """Return what has been committed so far."""
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
        # Per token [s, b] of the micro-batch: norms of input and output, their dot product.
        self._before: list[Tensor | None] = [None] * layers
        self._after: list[Tensor | None] = [None] * layers
        self._dot: list[Tensor | None] = [None] * layers
        self._last: tuple[Tensor, Tensor] | None = None  # the last output, and in fp32

    def observe(self, layer: int, before: Tensor, after: Tensor) -> None:
        """Note input and output ``[s, b, h]`` of local layer number ``layer``."""
        if self._last is not None and self._last[0] is before:
            x, self._before[layer] = self._last[1], self._after[layer - 1]
        else:
            x = before.float()
            self._before[layer] = torch.linalg.vector_norm(x, dim=-1)
        y = after.float()
        self._after[layer] = torch.linalg.vector_norm(y, dim=-1)
        self._dot[layer] = torch.linalg.vecdot(x, y)
        self._last = after, y

    def commit(self, valid: int) -> None:
        """Add the first ``valid`` samples of the observed micro-batch."""
        before, after, dot = (
            torch.stack(observed)  # type: ignore[arg-type]  # torch names what is None
            for observed in (self._before, self._after, self._dot)
        )
        self._last = None
        norms = (before * after).clamp_min_(torch.finfo(torch.float32).tiny)
        influence = (1.0 - dot / norms)[:, :, :valid]
        self.sums += influence.sum(dim=(1, 2), dtype=torch.float64)
        self.tokens += valid * dot.size(1)

    def scores(self) -> Tensor:
        """Return ``[layers]`` fp64 influence of all tokens committed (and reduced) so far."""
        if self.tokens == 0:
            raise ValueError("no token was observed; set data.num_samples to at least 1")
        return self.sums / self.tokens


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
    tensors = [tensor for tensor in tensors if tensor.numel()]
    if group.size() == 1 or not tensors:
        return
    if len(tensors) == 1 and tensors[0].is_contiguous():
        dist.all_reduce(tensors[0], group=group)
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
