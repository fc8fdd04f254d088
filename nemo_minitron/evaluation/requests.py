"""Log-probabilities of continuations after their contexts, on any layout.

Letters: N requests, c tokens of a chunk, s sequence, b micro-batch, h hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_minitron.distillation.logit_loss import capped_
from nemo_minitron.distillation.top_k import top_k_targets
from nemo_minitron.distillation.vocab import VocabShard, all_reduce
from nemo_minitron.evaluation.lm_loss import vocab_shard
from nemo_minitron.models.build import HiddenGPTModel
from nemo_minitron.models.schedule import (
    Batch,
    gathered_hidden,
    on_this_cp_rank,
    run_schedule,
    tokens_first,
)
from nemo_minitron.runtime.groups import ParallelGroups
from nemo_minitron.runtime.launch import device

_CHUNK_SIZE = 256


@dataclass(frozen=True)
class Request:
    """Token ids: what is given, and what is scored after it.

    Attributes:
        context: at least one token; the model sees ``context + continuation[:-1]``.
        continuation: at least one token.
    """

    context: Sequence[int]
    continuation: Sequence[int]

    def __len__(self) -> int:
        """Return tokens that the model sees."""
        return len(self.context) + len(self.continuation) - 1


@dataclass(frozen=True)
class Continuations:
    """Prompts to continue greedily.

    Attributes:
        prompts: token ids of each.
        max_new_tokens: of each continuation.
        stop: texts that end one.
    """

    prompts: list[list[int]]
    max_new_tokens: int
    stop: list[str]


Question = Sequence[Request] | Continuations
Scores = list[tuple[float, bool]]
"""Log-probability of every continuation, and whether it is greedy."""
Answer = Scores | list[list[int]]
"""Scores of requests, or token ids that continue prompts."""


def token_scores(
    rows: Tensor, weight: Tensor, labels: Tensor, shard: VocabShard, cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of every label, and whether it is the most likely token.

    Logits of at most ``_CHUNK_SIZE`` tokens exist at one time, of this rank's vocabulary rows; one
    number per token and rank travels for each of normaliser, label and best candidate.

    Args:
        rows: ``[N, h]`` final hidden states.
        weight: local ``[v / tp, h]`` output layer, padding included.
        labels: ``[N]`` global ids.
        shard: the vocabulary shard.
        cap: what no logit exceeds, or None.

    Returns:
        ``[N]`` fp64 log-probabilities and ``[N]`` bool, the same on every tensor-parallel rank. Of
        equal logits the lowest id is the most likely one, as in torch's argmax.
    """
    local = weight[: shard.valid].t()
    scores, greedy = [rows.new_empty(0, dtype=torch.float64)], [labels.new_empty(0).bool()]
    for part, ids in zip(rows.split(_CHUNK_SIZE), labels.split(_CHUNK_SIZE), strict=True):
        logits = capped_((part @ local).float(), cap)
        best = top_k_targets(logits, 1, 1.0, shard)
        column, mine = shard.local(ids)
        found = logits.new_zeros(len(ids))
        if shard.valid:
            found = torch.where(mine, logits.gather(1, column[:, None])[:, 0], 0.0)
        scores.append((all_reduce(found, shard.group) - best.log_z).double())
        greedy.append(best.ids[:, 0] == ids)
    return torch.cat(scores), torch.cat(greedy)


@dataclass
class RequestScorer:
    """Scores requests with a frozen model; every rank takes part in every call.

    Attributes:
        chunks: this rank's part of the model, which returns hidden states, in eval mode.
        groups: this rank's process groups.
        vocab_size: true vocabulary.
        batch_size: requests of one forward pass on one data-parallel rank.
        multiple: sequence lengths must be multiples of it (``ParallelConfig.sequence_multiple``).
    """

    chunks: list[HiddenGPTModel]
    groups: ParallelGroups
    vocab_size: int
    batch_size: int
    multiple: int = 1

    def __post_init__(self) -> None:
        """Find out which rows of the output layer this rank has."""
        self.shard = vocab_shard(self.chunks, self.groups, self.vocab_size)

    @torch.no_grad()
    def score(
        self, requests: Sequence[Request], advance: Callable[[int], None] = lambda n: None
    ) -> Scores:
        """Return each continuation's summed log-probability (nats), and whether it is greedy.

        Requests of similar length go together, padded on the right, which a causal model does not
        see. Each data-parallel rank scores its share.

        Args:
            requests: the same on every rank.
            advance: told how many more are done.
        """
        total = torch.zeros(len(requests), 2, dtype=torch.float64, device=device())
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index]))
        dp, size = self.groups.dp, self.batch_size
        mine = size * self.groups.pp.size()
        for start in range(0, len(order), mine * dp.size()):
            together = order[start : start + mine * dp.size()]
            length = -(-len(requests[together[0]]) // self.multiple) * self.multiple
            here = together[dp.rank() :: dp.size()]
            batches = [
                _batch([requests[i] for i in here[at : at + size]], length, size)
                for at in range(0, mine, size)
            ]
            found = self._run(batches)
            if found is not None:
                total[here] = found[: len(here)]
            advance(len(together))
        dist.all_reduce(total, group=self.groups.dp_cp)
        dist.broadcast(total, src=self.groups.last_stage_global_rank, group=self.groups.pp)
        return [(score, misses == 0) for score, misses in total.tolist()]

    def _run(self, batches: list[Batch]) -> Tensor | None:
        """``[requests, 2]`` of this rank's part of the sequences, on the last stage."""
        local = [on_this_cp_rank(batch, self.groups) for batch in batches]
        outputs = run_schedule(
            self.chunks, local, self._collect, forward_only=True, collect_outputs=True
        )
        return torch.cat(outputs) if outputs else None

    def _collect(self, index: int, batch: Batch, hidden: Tensor) -> Tensor:
        """Return ``[b, 2]`` sums of log-probabilities and counts of labels that are not greedy."""
        assert self.shard is not None
        labels, mask = tokens_first(batch)
        wanted = mask.nonzero()[:, 0]
        rows = gathered_hidden(hidden, self.chunks[-1])[wanted]
        last = self.chunks[-1]
        weight, cap = last.output_weight(), last.logit_cap
        scores, greedy = token_scores(rows, weight, labels[wanted], self.shard, cap)
        sums = scores.new_zeros(batch["tokens"].size(0), 2)
        return sums.index_add_(0, wanted % len(sums), torch.stack([scores, (~greedy).double()], 1))


def _batch(requests: Sequence[Request], length: int, size: int) -> Batch:
    """Return a micro-batch ``[size, length]``; rows that nobody asked for score nothing."""
    tokens = torch.zeros(size, length, dtype=torch.long)
    labels, mask = torch.zeros_like(tokens), torch.zeros(size, length)
    for row, request in enumerate(requests):
        ids = torch.tensor([*request.context, *request.continuation])
        first, seen = len(request.context) - 1, len(request)
        tokens[row, :seen] = ids[:-1]
        labels[row, first:seen] = ids[first + 1 :]
        mask[row, first:seen] = 1
    positions = torch.arange(length).expand(size, length).contiguous()
    batch = {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": positions}
    return {key: value.to(device()) for key, value in batch.items()}
