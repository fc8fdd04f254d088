"""Angles between input and output of blocks of contiguous layers. ``torch.distributed`` only.

2403.17887, section 3: the block of n layers that turns the hidden state least is the one to drop;
arccos(cosine) / pi of the input of layer l and of layer l + n, for every l in one forward pass. The
paper looks at the last token of a sequence; here it is the mean over all tokens, as for block
influence (under a causal mask every position is the end of a sequence).

In a pipeline the two ends of a block may be on different ranks, and a collective inside Megatron's
schedule would wait for a stage that waits for this one. So the states of a run of the schedule are
kept, and after it the ranks of the pipeline change the split: from some layers of all tokens to all
layers of some tokens, in one all-to-all per micro-batch. A state travels once, however many blocks
begin or end with it. Memory: the micro-batches of one run (``data.global_batch_size``) x the
layers of this rank; without a pipeline one micro-batch.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

_TOKENS = 1024  # whose unit vectors exist at one time, in fp32


class BlockAngles:
    """Sums over tokens of the angle at every block, for several lengths of block.

    Boundary l is the input of layer l, boundary ``num_layers`` the output of the last one.
    """

    def __init__(
        self,
        owned: Sequence[Sequence[int]],
        num_layers: int,
        sizes: Sequence[int],
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        """Start from no tokens.

        Args:
            owned: per rank of ``group`` the boundaries it observes.
            num_layers: of the whole model.
            sizes: lengths of blocks.
            group: pipeline ranks.
            device: where the states are.
        """
        self.owned, self.num_layers, self.sizes, self.group = owned, num_layers, sizes, group
        self.tokens = 0
        self.sums = torch.zeros(len(sizes), num_layers, dtype=torch.float64, device=device)
        self._states: dict[int, dict[int, Tensor]] = {}

    def observe(self, micro_batch: int, boundary: int, state: Tensor) -> None:
        """Keep the ``[s, b, h]`` state at a boundary until ``flush``."""
        self._states.setdefault(micro_batch, {})[boundary] = state

    def flush(self, valid: Callable[[int], int]) -> None:
        """Add the micro-batches observed since the last time; collective over the group.

        Args:
            valid: micro-batch number -> leading samples of it that count.
        """
        for number in sorted(self._states):
            states = self._states.pop(number)
            count = valid(number)
            if count == 0:  # on all ranks of the pipeline: they share their samples
                continue
            mine = self.owned[self.group.rank()]
            local = torch.stack([states[boundary][:, :count].flatten(0, 1) for boundary in mine])
            self._add(self._all_layers(local))

    def _all_layers(self, local: Tensor) -> Tensor:
        """``[boundaries here, t, h]`` -> ``[num_layers + 1, this rank's share of t, h]``."""
        if self.group.size() == 1:
            return local
        count, tokens, width = local.shape
        ranks, me = self.group.size(), self.group.rank()
        shares = [(tokens + rank) // ranks for rank in range(ranks)]
        send = torch.cat([part.reshape(-1) for part in local.split(shares, dim=1)])
        sizes = [len(boundaries) * shares[me] * width for boundaries in self.owned]
        out = send.new_empty(sum(sizes))
        dist.all_to_all_single(
            out, send, sizes, [count * share * width for share in shares], group=self.group
        )
        order = torch.tensor([boundary for owned in self.owned for boundary in owned]).argsort()
        return out.view(-1, shares[me], width)[order.to(out.device)]

    def _add(self, states: Tensor) -> None:
        """Add the angles of ``[num_layers + 1, t, h]``."""
        for some in states.split(_TOKENS, dim=1):
            self._add_some(some)

    def _add_some(self, states: Tensor) -> None:
        self.tokens += states.size(1)
        unit = F.normalize(states.float(), dim=-1)
        for row, size in enumerate(self.sizes):
            for first in range(self.num_layers - size + 1):
                chord = torch.linalg.vector_norm(unit[first + size] - unit[first], dim=-1)
                # As precise for a small angle as for a large one, which arccos in fp32 is not.
                angle = 2.0 / math.pi * torch.asin((chord / 2).clamp_max_(1.0))
                self.sums[row, first] += angle.sum(dtype=torch.float64)

    def scores(self) -> dict[int, Tensor]:
        """Length -> ``[num_layers - length + 1]`` fp64 mean angle of all (reduced) tokens."""
        if self.tokens == 0:
            raise ValueError("no token was observed; set data.num_samples to at least 1")
        return {
            size: self.sums[row, : self.num_layers - size + 1] / self.tokens
            for row, size in enumerate(self.sizes)
        }
