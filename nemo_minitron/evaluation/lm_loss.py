"""Language-model loss and perplexity of a model on any layout."""

import math
import time

import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from nemo_minitron.config.distillation import DistillationConfig
from nemo_minitron.config.training import DataConfig
from nemo_minitron.data.sampler import build_dataloader
from nemo_minitron.distillation.logit_loss import logit_loss
from nemo_minitron.distillation.vocab import VocabShard
from nemo_minitron.models.build import HiddenGPTModel
from nemo_minitron.models.schedule import (
    Batch,
    StepLoader,
    gathered_hidden,
    on_this_cp_rank,
    run_schedule,
    tokens_first,
)
from nemo_minitron.runtime.console import progress
from nemo_minitron.runtime.groups import ParallelGroups
from nemo_minitron.runtime.launch import device

_CHUNK_SIZE = 256
_LARGEST = 700.0
"""Nats per token whose perplexity a float can still hold."""


def vocab_shard(
    chunks: list[HiddenGPTModel], groups: ParallelGroups, vocab_size: int
) -> VocabShard | None:
    """Return the rows of the output layer that this rank holds; None except on the last stage."""
    if not groups.is_last_stage:
        return None
    return VocabShard(groups.tp, vocab_size, chunks[-1].output_weight().size(0))


def batch_sums(
    chunks: list[HiddenGPTModel], micro_batches: list[Batch], shard: VocabShard | None
) -> list[torch.Tensor]:
    """``[CE, tokens]`` fp64 sums of each of this rank's micro-batches; empty off the last stage."""
    config = DistillationConfig(kd_weight=0.0, ce_weight=1.0, chunk_size=_CHUNK_SIZE)

    def loss_func(index: int, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        assert shard is not None
        labels, mask = tokens_first(batch)
        rows = gathered_hidden(hidden, chunks[-1])
        weight, cap = chunks[-1].output_weight(), chunks[-1].logit_cap
        _, parts = logit_loss(rows, weight, labels, mask.float(), config, shard, cap=cap)
        return torch.stack([parts[1].double(), mask.sum().double()])

    return run_schedule(chunks, micro_batches, loss_func, forward_only=True, collect_outputs=True)


@torch.no_grad()
def evaluate_lm(
    chunks: list[HiddenGPTModel],
    groups: ParallelGroups,
    vocab_size: int,
    dataset: Dataset[Batch],
    data: DataConfig,
) -> dict[str, float]:
    """Return the loss over all of ``dataset``; it does not depend on batch sizes or layout.

    Args:
        chunks: this rank's model chunks, returning hidden states.
        groups: this rank's process groups.
        vocab_size: true vocabulary.
        dataset: samples of all ranks, in global order.
        data: batch sizes.

    Returns:
        ``lm_loss`` (nats per token), ``perplexity``, ``tokens`` (that count), ``samples``,
        ``seconds`` and ``tokens_per_second``, the same on every rank.

    Raises:
        ValueError: the loss is NaN or infinite, or no token of the samples counts.
    """
    share = {"dp_rank": groups.dp.rank(), "dp_size": groups.dp.size()}
    loader = build_dataloader(dataset, data, drop_last=False, **share)
    steps = StepLoader(loader, data.global_batch_size // (data.micro_batch_size * share["dp_size"]))
    shard = vocab_shard(chunks, groups, vocab_size)
    total = torch.zeros(2, dtype=torch.float64, device=device())
    count = len(loader) // steps.micro_batches
    samples = len(dataset)  # type: ignore[arg-type]  # torch's Dataset declares no length
    start = time.monotonic()
    with progress("evaluating", count) as advance:
        for step in steps:
            micro_batches = [on_this_cp_rank(_on_device(batch), groups) for batch in step]
            sums = batch_sums(chunks, micro_batches, shard)
            total += torch.stack(sums).sum(0) if sums else 0
            advance()
    dist.all_reduce(total, group=groups.dp_cp)
    dist.broadcast(total, src=groups.last_stage_global_rank, group=groups.pp)
    loss, tokens = total.tolist()
    return figures(loss, tokens, samples, time.monotonic() - start)


def figures(loss: float, tokens: float, samples: int, seconds: float) -> dict[str, float]:
    """Return what ``evaluate_lm`` does, from its sums.

    Raises:
        ValueError: the loss is NaN or infinite, or no token counts.
    """
    if not math.isfinite(loss):
        raise ValueError(
            f"the LM loss is {loss}: the model's activations overflow or are NaN; set checkpoint "
            "to an intact result"
        )
    if not tokens:
        raise ValueError(
            f"no token of the {samples} samples counts for the loss; set data.num_samples or "
            "data.split_name to samples that hold answers"
        )
    return {
        "lm_loss": loss / tokens,
        "perplexity": math.exp(min(loss / tokens, _LARGEST)),
        "tokens": int(tokens),
        "samples": samples,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }


def _on_device(batch: Batch) -> Batch:
    return {key: value.to(device(), non_blocking=True) for key, value in batch.items()}
