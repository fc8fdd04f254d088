"""Forward passes with a KV cache through Megatron-Core's inference, on any TP x PP layout.

Letters: b sequences, s tokens of one pass, h hidden, v vocabulary.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_minitron.distillation.logit_loss import capped_
from nemo_minitron.distillation.vocab import VocabShard
from nemo_minitron.models.build import HiddenGPTModel
from nemo_minitron.runtime.groups import ParallelGroups
from nemo_minitron.runtime.launch import device
from nemo_minitron.runtime.megatron import cached_forward, keeping_states


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


class CachedModel:
    """A frozen model that continues sequences, every rank of a replica taking part.

    The layout has neither virtual stages, sequence nor context parallelism
    (``config.layout.check_cached``): Megatron's static batching knows none of them.
    """

    def __init__(self, chunk: HiddenGPTModel, groups: ParallelGroups, vocab_size: int) -> None:
        """Take a chunk that returns hidden states, in eval mode.

        Args:
            chunk: this rank's part of the model.
            groups: this rank's process groups.
            vocab_size: true vocabulary.
        """
        self.chunk, self.groups, self.vocab_size = chunk, groups, vocab_size
        self._shard = None
        if groups.is_last_stage:
            self._shard = VocabShard(groups.tp, vocab_size, chunk.output_weight().size(0))
        self._wrapper: Any = None  # Megatron's GPTInferenceWrapper while sequences are cached

    def start(self, batch: int, length: int) -> None:
        """Forget what was cached and make room.

        Args:
            batch: sequences that go together.
            length: tokens of the longest, prompt and continuation.

        Raises:
            ValueError: LongRoPE would rotate the tokens of a short sequence as those of a long one.
        """
        longest = self.chunk.built_from and self.chunk.built_from[0].longrope_length
        if longest and length > longest:
            raise ValueError(
                f"length={length} must be at most original_max_position_embeddings={longest} with "
                "rope_scaling of type longrope, which rotates all tokens of a batch by its longest "
                "text"
            )
        self._wrapper = cached_forward(self.chunk, self.groups, batch, length, self.vocab_size)

    @property
    def cache_bytes(self) -> int:
        """Return the bytes of this rank's keys and values."""
        assert self._wrapper is not None
        pairs = self._wrapper.inference_context.key_value_memory_dict.values()
        return sum(tensor.nbytes for pair in pairs for tensor in pair)

    def stop(self) -> None:
        """Free the cache."""
        self._wrapper = None

    def forward(self, tokens: Tensor) -> Tensor | None:
        """Append tokens to every cached sequence.

        Args:
            tokens: ``[b, s]``; one token each once something is cached.

        Returns:
            On the last stage ``[b, v]`` fp32 logits after the last token, on every
            tensor-parallel rank; else None.
        """
        assert self._wrapper is not None
        start = self._wrapper.inference_context.sequence_len_offset
        assert start == 0 or tokens.size(1) == 1, tokens.shape
        positions = torch.arange(start, start + tokens.size(1), device=tokens.device)
        with keeping_states(self.chunk):
            hidden = self._wrapper.run_one_forward_step(
                {
                    "tokens": tokens,
                    "position_ids": positions.expand_as(tokens),
                    "attention_mask": None,
                }
            )
        self._wrapper.inference_context.enable_decode_mode()
        return None if hidden is None else self._logits(hidden[-1])

    def _logits(self, hidden: Tensor) -> Tensor:
        """``[b, h]`` to ``[b, v]``: one token of each sequence, so gathering them costs little."""
        assert self._shard is not None
        weight, group = self.chunk.output_weight(), self.groups.tp
        local = capped_((hidden @ weight.t()).float().contiguous(), self.chunk.logit_cap)
        if group.size() == 1:
            return local[:, : self.vocab_size]
        parts = [torch.empty_like(local) for _ in range(group.size())]
        dist.all_gather(parts, local, group=group)
        return torch.cat(parts, 1)[:, : self.vocab_size]

    def from_last_stage(self, ids: Tensor | None, batch: int) -> Tensor:
        """``[b]`` token ids of the last stage's first tensor-parallel rank, on every rank."""
        found = torch.empty(batch, dtype=torch.long, device=device()) if ids is None else ids
        tp, pp = self.groups.tp, self.groups.pp
        if ids is not None and tp.size() > 1:
            dist.broadcast(found, src=dist.get_global_rank(tp, 0), group=tp)
        if pp.size() > 1:
            dist.broadcast(found, src=self.groups.last_stage_global_rank, group=pp)
        return found


@torch.inference_mode()
def continue_prompts(
    model: CachedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    draws: Tensor,
    stop_ids: frozenset[int],
    ended: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """Continue prompts of any lengths together (collective within a model replica).

    As in Megatron's static engine the shortest prompt goes first, as a block; then every sequence
    takes one token per pass, its own prompt's as long as there are some. Nothing is padded, so a
    continuation does not depend on the prompts beside it.

    Args:
        model: every rank of the replica calls with the same arguments.
        prompts: at least one token each; prompts of similar length waste least.
        sampling: how tokens are drawn.
        draws: ``[b, max_new_tokens]`` fp64 in [0, 1): what chooses each new token.
        stop_ids: tokens that end a continuation.
        ended: whether the new tokens of a sequence are enough; the same answer on every rank.

    Returns:
        New tokens of every prompt, at most ``draws.size(1)``, the stop token included.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device())
    batch, new = draws.shape
    tokens = torch.zeros(batch, int(lengths.max()) + new, dtype=torch.long, device=device())
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device())
    draws, rows = draws.to(device()), torch.arange(batch, device=device())
    model.start(batch, tokens.size(1))
    done = torch.zeros(batch, dtype=torch.bool, device=device())
    seen, upto = 0, int(lengths.min())
    while True:
        logits = model.forward(tokens[:, seen:upto])
        step = (upto - lengths).clamp(0, new - 1)  # rows still in their prompt draw in vain
        ids = None if logits is None else sample_tokens(logits, sampling, draws[rows, step])
        ids = model.from_last_stage(ids, batch)
        own = upto >= lengths
        tokens[:, upto] = torch.where(own, ids, tokens[:, upto])
        done |= own & (torch.isin(ids, stops) | (upto - lengths + 1 >= new))
        if ended is not None:
            for row in (own & ~done).nonzero()[:, 0].tolist():
                done[row] = ended(tokens[row, len(prompts[row]) : upto + 1].tolist())
        seen, upto = upto, upto + 1
        if bool(done.all()):
            break
    model.stop()
    kept = tokens.tolist()
    return [
        _until_stop(kept[row][len(prompt) : len(prompt) + new], stop_ids)
        for row, prompt in enumerate(prompts)
    ]


def _until_stop(ids: list[int], stop_ids: frozenset[int]) -> list[int]:
    """Cut tokens behind the first stop token, which stays."""
    end = next((at + 1 for at, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:end]
