"""What a Megatron model on any layout answers to lm-eval: scores and greedy continuations."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from nemo_minitron.evaluation.requests import Continuations, Request, RequestScorer
from nemo_minitron.models.build import HiddenGPTModel
from nemo_minitron.models.inference import GREEDY, CachedModel, continue_prompts
from nemo_minitron.runtime.console import progress
from nemo_minitron.runtime.groups import ParallelGroups

# A stop text may begin inside a token: so many tokens more than it has characters are read again.
_SLACK = 8


class Answers:
    """Answers questions of ``lockstep.led_by_first``; every rank takes part."""

    def __init__(
        self,
        chunks: list[HiddenGPTModel],
        groups: ParallelGroups,
        vocab_size: int,
        tokenizer: Any,
        stops: frozenset[int],
        *,
        batch_size: int,
        multiple: int,
    ) -> None:
        """Arguments are those of ``RequestScorer``, the tokenizer and tokens that end a text."""
        self.stops = stops
        self.chunks, self.groups, self.vocab_size = chunks, groups, vocab_size
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.scorer = RequestScorer(
            chunks, groups, vocab_size, batch_size=batch_size, multiple=multiple
        )

    def __call__(self, question: Any) -> Any:
        """``list[Request]`` -> scores, ``Continuations`` -> token ids; the same on every rank.

        Raises:
            ValueError: a score is NaN or infinite.
        """
        if isinstance(question, Continuations):
            return self._continue(question)
        return self._score(question)

    def _score(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        with progress("scoring requests", len(requests)) as advance:
            found = self.scorer.score(requests, advance)
        if not torch.tensor([score for score, _ in found]).isfinite().all():
            raise ValueError(
                "a log-probability is NaN or infinite: the model's activations overflow; set "
                "checkpoint to an intact result"
            )
        return found

    def _continue(self, asked: Continuations) -> list[list[int]]:
        """Each data-parallel rank continues its share."""
        model = CachedModel(self.chunks[0], self.groups, self.vocab_size)
        dp, count = self.groups.dp, len(asked.prompts)
        mine = range(count)[dp.rank() :: dp.size()]
        ended = self._ended(asked.stop)
        texts: dict[int, list[int]] = {}
        with progress("writing answers", len(mine)) as advance:
            for start in range(0, len(mine), self.batch_size):
                rows = mine[start : start + self.batch_size]
                prompts = [asked.prompts[row] for row in rows]
                draws = torch.zeros(len(rows), asked.max_new_tokens, dtype=torch.float64)
                found = continue_prompts(model, prompts, GREEDY, draws, self.stops, ended)
                texts |= dict(zip(rows, found, strict=True))
                advance(len(rows))
        shares: list[Any] = [None] * dp.size()
        dist.all_gather_object(shares, texts, group=dp)
        return [ids for _, ids in sorted((row, x) for share in shares for row, x in share.items())]

    def _ended(self, stop: Sequence[str]) -> Callable[[list[int]], bool]:
        """Whether the latest tokens hold one of the texts."""
        reach = max(map(len, stop), default=0) + _SLACK

        def ended(ids: list[int]) -> bool:
            text = self.tokenizer.decode(ids[-reach:])
            return any(word in text for word in stop)

        return ended
