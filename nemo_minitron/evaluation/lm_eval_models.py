"""Models for lm-eval: a Megatron model on any layout, and an exported Hugging Face folder."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from nemo_minitron.evaluation.requests import Continuations, Question, Request, Scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class MegatronLM(HFLM):
    """lm-eval's Hugging Face model with another engine.

    Prompts, rolling windows and answers are cut and joined by the very code that serves Hugging
    Face models; only forward passes go elsewhere. To lm-eval there is one rank.
    """

    def __init__(
        self,
        ask: Callable[[Question], Any],
        tokenizer: "PreTrainedTokenizerFast",
        *,
        max_length: int,
    ) -> None:
        """Take what answers.

        Args:
            ask: answers lists of ``Request`` and ``Continuations``, on whatever layout.
            tokenizer: of the model.
            max_length: tokens of the longest request.
        """
        TemplateLM.__init__(self)
        self._ask, self.tokenizer = ask, tokenizer
        # All at once: batches are made by who answers.
        self._max_length, self.batch_size_per_gpu = max_length, sys.maxsize
        self._device = torch.device("cpu")  # of what lm-eval itself makes
        self.backend = "causal"
        self.custom_prefix_token_id = None
        self.add_bos_token = None
        self.truncation = False
        self.enable_thinking = False
        self.think_end_token = None
        self.chat_template_args: dict[str, object] = {}
        if tokenizer.pad_token_id is None:  # lm-eval pads prompts, and the mask takes it off again
            tokenizer.pad_token_id = tokenizer.eos_token_id

    def get_model_info(self) -> dict[str, object]:
        """Return nothing: the manifest of the result describes the model."""
        return {}

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[object, list[int], list[int]]], **kwargs: object
    ) -> Scores:
        """Return scores of ``(texts, context ids, continuation ids)``, cut on the left."""
        found: Scores = self._ask([self._request(given, asked) for _, given, asked in requests])
        return found

    def _request(self, context: list[int], continuation: list[int]) -> Request:
        if not 0 < len(continuation) <= self._max_length:
            raise ValueError(
                f"a task asks for a continuation of {len(continuation)} tokens; it must have 1 to "
                f"lm_eval.max_length={self._max_length}: raise lm_eval.max_length or leave the "
                "task out"
            )
        whole = [*context, *continuation][-(self._max_length + 1) :]
        given = len(whole) - len(continuation)
        return Request(whole[:given], whole[given:])

    def _model_generate(
        self,
        context: Tensor,
        max_length: int,
        stop: list[str],
        attention_mask: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        """Return ``[b, s + new]``: greedy continuations of ``[b, s]`` prompts, padded left."""
        assert attention_mask is not None
        rows = zip(context.tolist(), attention_mask.tolist(), strict=True)
        prompts = [[i for i, m in zip(ids, mask, strict=True) if m] for ids, mask in rows]
        new = max_length - context.size(1)
        found = self._ask(Continuations(prompts, new, stop))
        out = torch.full((len(found), new), self.tokenizer.pad_token_id)
        for row, ids in enumerate(found):
            out[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        return torch.cat([context, out], 1)


def hf_model(folder: Path, *, max_length: int, batch_size: int) -> HFLM:
    """Open an exported folder as lm-eval's own model, in fp32 as for Megatron models."""
    return HFLM(
        pretrained=str(folder),
        dtype="float32",
        device="cuda" if torch.cuda.is_available() else "cpu",
        batch_size=batch_size,
        max_length=max_length,
    )
