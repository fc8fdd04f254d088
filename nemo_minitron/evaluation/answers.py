"""Answer lm-eval with a Megatron model on any layout: scores and greedy continuations."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from nemo_minitron.evaluation.requests import (
    Answer,
    Continuations,
    Question,
    Request,
    RequestScorer,
    Scores,
)
from nemo_minitron.models.inference import GREEDY, CachedModel, continue_prompts
from nemo_minitron.runtime.console import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A stop text may begin inside a token: so many tokens more than it has characters are read again.
_SLACK = 8


class Answers:
    """Answers questions of ``lockstep.led_by_first``; every rank takes part."""

    def __init__(
        self,
        scorer: RequestScorer,
        tokenizer: "PreTrainedTokenizerFast",
        stops: frozenset[int],
    ) -> None:
        """Take the model with its scorer, its tokenizer, and the tokens that end a text."""
        self.scorer, self.tokenizer, self.stops = scorer, tokenizer, stops

    def __call__(self, question: Question) -> Answer:
        """``list[Request]`` -> scores, ``Continuations`` -> token ids; the same on every rank.

        Raises:
            ValueError: a score is NaN or infinite.
        """
        if isinstance(question, Continuations):
            return self.continued(question)
        return self._score(question)

    def _score(self, requests: Sequence[Request]) -> Scores:
        with progress("scoring requests", len(requests)) as advance:
            found = self.scorer.score(requests, advance)
        if not torch.tensor([score for score, _ in found]).isfinite().all():
            raise ValueError(
                "a log-probability is NaN or infinite: the model's activations overflow; set "
                "checkpoint to an intact result"
            )
        return found

    def continued(self, asked: Continuations) -> list[list[int]]:
        """Token ids after each prompt (collective): each data-parallel rank writes its share."""
        groups, size = self.scorer.groups, self.scorer.batch_size
        model = CachedModel(self.scorer.chunks[0], groups, self.scorer.vocab_size)
        dp, count = groups.dp, len(asked.prompts)
        mine = range(count)[dp.rank() :: dp.size()]
        ended = self._ended(asked.stop)
        texts: dict[int, list[int]] = {}
        with progress("writing answers", len(mine)) as advance:
            for start in range(0, len(mine), size):
                rows = mine[start : start + size]
                prompts = [asked.prompts[row] for row in rows]
                draws = torch.zeros(len(rows), asked.max_new_tokens, dtype=torch.float64)
                found = continue_prompts(model, prompts, GREEDY, draws, self.stops, ended)
                texts |= dict(zip(rows, found, strict=True))
                advance(len(rows))
        shares = [texts] * dp.size()
        dist.all_gather_object(shares, texts, group=dp)
        return [ids for _, ids in sorted((row, x) for share in shares for row, x in share.items())]

    def _ended(self, stop: Sequence[str]) -> Callable[[list[int]], bool]:
        """Return a function that tells whether the latest tokens contain a stop text."""
        reach = max(map(len, stop), default=0) + _SLACK

        def ended(ids: list[int]) -> bool:
            text = self.tokenizer.decode(ids[-reach:])
            return any(word in text for word in stop)

        return ended
