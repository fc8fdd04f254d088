"""The next token from logits: greedy, or nucleus sampling by given random numbers. Torch only."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_p: the smallest set of tokens with at least this probability is drawn from (1904.09751,
            section 3.1); 1 draws from all.
    """

    temperature: float
    top_p: float


GREEDY = Sampling(temperature=0.0, top_p=1.0)


def draws_of(seed: int, index: int, count: int) -> Tensor:
    """``[count]`` fp64 in [0, 1) for one sequence; they depend on nothing but the arguments."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.rand(count, generator=generator, dtype=torch.float64)


def sample_tokens(logits: Tensor, sampling: Sampling, draws: Tensor) -> Tensor:
    """Draw one token per row by inverting the distribution function.

    Args:
        logits: ``[b, v]`` fp32.
        sampling: temperature and nucleus.
        draws: ``[b]`` fp64 in [0, 1).

    Returns:
        ``[b]`` int64 ids. Of equally likely tokens the lower id comes first.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scaled = logits.double() / sampling.temperature
    ordered, ids = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    upto = ordered.cumsum(-1)
    # Tokens whose predecessors do not reach top_p; the first one always stays.
    kept = (upto - ordered < sampling.top_p).sum(-1, keepdim=True).clamp(min=1)
    target = draws[:, None] * upto.gather(-1, kept - 1)
    picked = torch.searchsorted(upto, target, right=True).minimum(kept - 1)
    return ids.gather(-1, picked)[:, 0]
