"""Scores of experts and of the channels inside them, from hooks on mixture-of-experts layers.

- ``expert``: L2 norm of the expert's output times the router's weight of it, mean over the tokens
  routed to it: the score of REAP (2510.13999),
- ``expert_ffn``: input of each expert's ``linear_fc2``, over the tokens routed to it.

Both are taken as they enter the layer's sum: Megatron multiplies by the router's weight before
``linear_fc2``. All tokens routed to an expert in the calibration set are aggregated as one
sequence, by the sequence aggregation; which sample a token came from is not known where the expert
is. An expert that no token was routed to scores 0.

Experts are modules of their own, or (Transformer Engine's grouped products) one module computes all
of a rank's; hooks see the same numbers in both.

An expert's rank sees the tokens of all expert-parallel ranks and, under sequence parallelism, of
all tensor-parallel ranks; filler samples among them count for nothing because the router's hook
sets their weights to 0 where they come from, which is also where routed tokens are counted.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nemo_minitron.config.stages import ScoreConfig
from nemo_minitron.importance.aggregate import (
    PARTIALS,
    all_reduce_flat,
    partial_sums,
    sequence_statistic,
)
from nemo_minitron.runtime.groups import Group, ParallelGroups

EXPERT_AXES = ("expert", "expert_ffn")
_STATE = ("counts", "norms", "partials")


class ExpertRecorder:
    """Sums over routed tokens for the experts of one model chunk, fed by its hooks.

    Shape letters: l layers of the chunk, e local experts, k partial sums, w local channels.

    Attributes:
        counts: ``[l, num_moe_experts]`` int64, tokens of this rank routed to each expert.
        norms: ``[l, e]`` fp64, summed L2 norms of the outputs.
        partials: ``[l, e, k, w]`` fp64 partial sums of the channels.
    """

    def __init__(
        self,
        chunk: Any,
        layers: Sequence[Any],
        groups: ParallelGroups,
        scores: ScoreConfig,
        valid: Callable[[], int],
    ) -> None:
        """Prepare sums; registers nothing yet.

        Args:
            chunk: a Megatron model with experts, without wrappers.
            layers: its mixture-of-experts layers.
            groups: this rank's process groups.
            scores: what to score and how.
            valid: leading samples of the current micro-batch that count on this rank.
        """
        config = chunk.config
        self.groups, self.valid = groups, valid
        self.seq = scores.seq_aggregation
        self.axes = [axis for axis in EXPERT_AXES if axis in scores.axes]
        self.sequence_split = bool(config.sequence_parallel)
        self._layers = list(layers)
        count, local = len(self._layers), config.num_moe_experts // groups.ep.size()
        width = config.moe_ffn_hidden_size // groups.expt_tp.size()
        zeros = partial(torch.zeros, dtype=torch.float64, device=next(chunk.parameters()).device)
        self.counts = zeros(count, config.num_moe_experts, dtype=torch.int64)
        self.norms = zeros(count, local)
        self.partials = zeros(count, local, PARTIALS[self.seq], width)

    def register(self, keep: Callable[[RemovableHandle], object]) -> None:
        """Register all hooks, handing every handle to ``keep`` at once."""
        if not self.axes:
            return
        for layer, moe in enumerate(self._layers):
            keep(moe.router.register_forward_hook(partial(self._on_router, layer)))
            if hasattr(moe.experts, "local_experts"):
                self._register_each(keep, layer, moe.experts)
            else:
                self._register_grouped(keep, layer, moe.experts)

    def _register_each(
        self, keep: Callable[[RemovableHandle], object], layer: int, experts: Any
    ) -> None:
        """Hook experts that are modules of their own (``SequentialMLP``)."""
        for index, expert in enumerate(experts.local_experts):
            if "expert" in self.axes:
                keep(expert.register_forward_hook(partial(self._on_output, layer, index)))
            if "expert_ffn" in self.axes:
                hook = partial(self._on_channels, layer, index)
                keep(expert.linear_fc2.register_forward_pre_hook(hook))

    def _register_grouped(
        self, keep: Callable[[RemovableHandle], object], layer: int, experts: Any
    ) -> None:
        """Hook experts that one module computes together (``TEGroupedMLP``).

        Their tokens lie one after another, and the number of each expert's is an argument.

        Raises:
            ValueError: Transformer Engine fuses the experts, so that nothing inside can be seen.
        """
        if "expert" in self.axes:
            keep(experts.register_forward_hook(partial(self._on_outputs, layer)))
        if "expert_ffn" in self.axes:
            if getattr(experts.config, "use_transformer_engine_op_fuser", False):
                raise ValueError(
                    "use_transformer_engine_op_fuser=true hides the channels of experts, so axis "
                    "'expert_ffn' cannot be scored; set it to false, or leave expert_ffn out of "
                    "scores.axes"
                )
            hook = partial(self._on_all_channels, layer)
            keep(experts.linear_fc2.register_forward_pre_hook(hook))

    # Hooks: torch gives (module, args[, output]) after the bound arguments.

    def _on_router(
        self, layer: int, _: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """Count the tokens that count, and silence the others."""
        probs, routing_map = output  # [s * b, num_moe_experts], in the order of [s, b]
        samples, valid = args[0].size(1), self.valid()
        if valid == samples:
            self.counts[layer] += routing_map.sum(dim=0)
            return None
        keep = torch.arange(len(probs), device=probs.device) % samples < valid
        self.counts[layer] += routing_map[keep].sum(dim=0)
        return probs * keep[:, None], routing_map

    def _on_output(
        self, layer: int, expert: int, _: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]
    ) -> None:
        self._add_output(layer, expert, output[0])

    def _on_outputs(
        self, layer: int, _: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]
    ) -> None:
        for expert, out in enumerate(output[0].split(_numbers(args[1]))):
            self._add_output(layer, expert, out)

    def _on_channels(self, layer: int, expert: int, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._add_channels(layer, expert, args[0])

    def _on_all_channels(self, layer: int, _: nn.Module, args: tuple[Any, ...]) -> None:
        # For fp8 Megatron pads each expert's tokens, with rows of 0, which add nothing.
        for expert, x in enumerate(args[0].split(_numbers(args[1]))):
            self._add_channels(layer, expert, x)

    def _add_output(self, layer: int, expert: int, out: Tensor) -> None:
        """Add what one expert made of the tokens of a micro-batch, ``[tokens, h]``."""
        out = out.float()
        if self.groups.expt_tp.size() > 1:
            # Each rank has a partial sum over its channels; Megatron adds them up later, per token.
            out = out.clone()
            dist.all_reduce(out, group=self.groups.expt_tp)
        self.norms[layer, expert] += torch.linalg.vector_norm(out, dim=-1).double().sum()

    def _add_channels(self, layer: int, expert: int, x: Tensor) -> None:
        """Add the channels of one expert, ``[tokens, w]`` of a micro-batch."""
        if len(x) == 0:
            return
        sums = partial_sums(x[:, None], self.seq, torch.float64)
        self.partials[layer, expert] += sums[:, 0]

    def state_dict(self) -> dict[str, Tensor]:
        """Return what has been accumulated so far."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what ``state_dict`` returned."""
        for name in _STATE:
            getattr(self, name).copy_(state[name])

    def scores(self) -> dict[str, Tensor]:
        """Axis -> global fp64 scores of this chunk's layers (collective, the same on every rank).

        Returns:
            ``expert`` ``[l, num_moe_experts]`` and ``expert_ffn`` ``[l, num_moe_experts, f]``, as
            far as they are scored.
        """
        groups = self.groups
        if not self.axes:
            return {}
        counts = self.counts.clone()
        if self.sequence_split:
            all_reduce_flat([counts], groups.tp)
        all_reduce_flat([counts], groups.dp_cp)
        norms, sums = self.norms.clone(), self.partials.clone()
        all_reduce_flat([norms, sums], groups.expt_dp)
        tokens = counts.clamp_min(1)
        found = {}
        if "expert" in self.axes:
            found["expert"] = gather(norms, groups.ep, dim=1) / tokens
        if "expert_ffn" in self.axes:
            sums = gather(gather(sums, groups.expt_tp, dim=-1), groups.ep, dim=1)
            sums = sums.transpose(1, 2)  # [l, k, num_moe_experts, f]
            found["expert_ffn"] = sequence_statistic(sums, self.seq, tokens[:, :, None])
        return found


def _numbers(tokens: Any) -> list[int]:
    """Return tokens of each expert, which Megatron has as a tensor or as a list."""
    return tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)


def gather(local: Tensor, group: Group, dim: int) -> Tensor:
    """Return shards of every rank of ``group``, concatenated along ``dim`` in rank order."""
    if group.size() == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(group.size())]
    if local.numel():  # nothing where a stage has no such layer
        dist.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts, dim=dim)
