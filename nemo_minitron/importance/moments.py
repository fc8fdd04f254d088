"""Second moments of activations, from which pruning refits what is left. Pure torch.

For the input x of a linear layer that gives up input channels (``mlp.linear_fc2``,
``self_attention.linear_proj``): the sum of x x^T over tokens. For every norm: the mean square of
each channel after division by the norm's own root mean square. Both are linear in the tokens, so
ranks add theirs up once, at the very end.

Shape letters: s local sequence, b micro-batch, w local channels, W channels of all
tensor-parallel ranks, h hidden size, m modules.
"""

import torch
import torch.distributed as dist
from torch import Tensor


class InputMoments:
    """Sums of x x^T of ``m`` modules, rows of this tensor-parallel rank's channels."""

    def __init__(self, modules: int, width: int, group: dist.ProcessGroup, device: torch.device):
        """Start from no tokens.

        Args:
            modules: modules observed.
            width: local channels of each.
            group: the tensor-parallel ranks, which hold the other channels of the same tokens.
            device: where the activations are.
        """
        self.group = group
        self.sums = torch.zeros(modules, width, width * group.size(), device=device)

    def observe(self, module: int, x: Tensor) -> None:
        """Add the ``[s, b, w]`` input of module number ``module``."""
        mine = x.flatten(0, 1)
        everyone = mine
        if self.group.size() > 1:
            parts = [torch.empty_like(mine) for _ in range(self.group.size())]
            dist.all_gather(parts, mine.contiguous(), group=self.group)
            everyone = torch.cat(parts, dim=1)
        self.sums[module].addmm_(mine.float().t(), everyone.float())

    def whole(self, module: int) -> Tensor:
        """``[W, W]`` of one module on every tensor-parallel rank (collective)."""
        mine = self.sums[module]
        if self.group.size() == 1:
            return mine
        parts = [torch.empty_like(mine) for _ in range(self.group.size())]
        dist.all_gather(parts, mine.contiguous(), group=self.group)
        return torch.cat(parts)


class NormMoments:
    """Sums over tokens of (x / rms(x))^2 per channel, at ``m`` norms."""

    def __init__(self, modules: int, width: int, centred: bool, device: torch.device):
        """Start from no tokens.

        Args:
            modules: norms observed.
            width: hidden size.
            centred: the norms subtract the mean first (LayerNorm).
            device: where the activations are.
        """
        self.centred = centred
        self.sums = torch.zeros(modules, width, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(modules, dtype=torch.float64, device=device)

    def observe(self, module: int, x: Tensor) -> None:
        """Add the ``[s, b, h]`` input of norm number ``module``."""
        x = x.float()
        if self.centred:
            x = x - x.mean(dim=-1, keepdim=True)
        squares = x.square()
        squares /= squares.mean(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        self.sums[module] += squares.sum(dim=(0, 1), dtype=torch.float64)
        self.tokens[module] += x.size(0) * x.size(1)
