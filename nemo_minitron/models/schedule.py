"""Runs micro-batches through Megatron's own pipeline schedule."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from nemo_minitron.models.build import HiddenGPTModel, unwrap
from nemo_minitron.models.documents import DOCUMENTS, shared_samples
from nemo_minitron.models.hidden import stopping_early
from nemo_minitron.runtime.groups import ParallelGroups
from nemo_minitron.runtime.megatron import batch_on_this_cp_rank

Batch = dict[str, Tensor]


def on_this_cp_rank(batch: Batch, groups: ParallelGroups) -> Batch:
    """Return this context-parallel rank's part of ``[b, s]`` tensors (Megatron's zigzag split).

    What documents share a sample stays whole: keys are gathered from all ranks.
    """
    if groups.cp.size() == 1:
        return batch
    whole = {name: batch[name] for name in (DOCUMENTS,) if name in batch}
    rest = {name: tensor for name, tensor in batch.items() if name not in whole}
    return {**batch_on_this_cp_rank(rest, groups.cp), **whole}


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[Batch],
    loss_func: Callable[[int, Batch, Tensor], Any],
    *,
    forward_only: bool,
    collect_outputs: bool = False,
) -> list[Any]:
    """Forward (and backward) of all micro-batches of one global batch on this rank.

    Args:
        chunks: this rank's model chunks; the last stage must return hidden states.
        micro_batches: ``tokens``, ``labels``, ``loss_mask``, ``position_ids``, each ``[b, s]``
            (local to the context-parallel rank).
        loss_func: ``(index of the micro-batch, batch, hidden [s, b, h])`` -> what Megatron's
            schedule expects of a loss function, called on the last stage.
        forward_only: no backward.
        collect_outputs: ``loss_func`` returns data to collect instead of a loss.

    Returns:
        On the last stage one entry per micro-batch: what ``loss_func`` reported. Else empty.
    """
    config = unwrap(chunks[0]).config
    b, s = micro_batches[0]["tokens"].shape

    def forward_step(
        iterator: Iterator[tuple[int, Batch]], model: torch.nn.Module
    ) -> tuple[Tensor, Callable[..., Any]]:
        index, batch = next(iterator)
        hidden = output_of(model, batch)

        def loss(output: Tensor, non_loss_data: bool = False) -> Any:
            return loss_func(index, batch, output)

        return hidden, loss

    iterators: Any = [iter(list(enumerate(micro_batches))) for _ in chunks]
    return list(
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=list(chunks) if len(chunks) > 1 else chunks[0],
            num_microbatches=len(micro_batches),
            seq_length=s * config.context_parallel_size,
            micro_batch_size=b,
            forward_only=forward_only,
            collect_non_loss_data=collect_outputs,
        )
    )


def output_of(model: torch.nn.Module, batch: Batch) -> Tensor:
    """Run a chunk, wrapped for training or not, on a micro-batch or on its input tensor."""
    chunk = unwrap(model)
    kwargs: dict[str, Any] = {}
    wrapped = model.module if isinstance(model, DistributedDataParallel) else model
    if isinstance(wrapped, Float16Module):
        kwargs["fp32_output"] = False
    shared = shared_samples(chunk, batch.get(DOCUMENTS))
    if shared is not None:
        kwargs["packed_seq_params"] = shared
    with stopping_early(chunk):
        output: Tensor = model(
            batch["tokens"], batch["position_ids"], batch.get("attention_mask"), **kwargs
        )
    return output


def tokens_first(batch: Batch) -> tuple[Tensor, Tensor]:
    """Labels and loss mask as ``[s * b]``, the order of a flattened ``[s, b, h]`` hidden state."""
    return batch["labels"].t().flatten(), batch["loss_mask"].t().flatten()


def gathered_hidden(hidden: Tensor, chunk: HiddenGPTModel, *, reduce: bool = True) -> Tensor:
    """Return the final hidden state of the full sequence, one row per token.

    Args:
        hidden: ``[s, b, h]``; under sequence parallelism the local ``[s / tp, b, h]``.
        chunk: the model it comes from.
        reduce: whether the gradient is a partial sum that the gather's backward must add up.

    Returns:
        ``[s * b, h]``.
    """
    if chunk.config.sequence_parallel:
        hidden = tensor_parallel.gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=reduce, group=chunk.pg_collection.tp
        )
    return hidden.flatten(0, 1)


class StepLoader:
    """Groups micro-batches into the list one optimizer step takes.

    It has no length on purpose: Lightning then ends training by ``max_steps`` alone, also after a
    resume in the middle of an epoch.
    """

    def __init__(self, loader: Iterable[Batch], micro_batches: int) -> None:
        self.loader = loader
        self.micro_batches = micro_batches

    def __iter__(self) -> Iterator[list[Batch]]:
        """Lists of ``micro_batches`` items; a shorter rest is dropped."""
        step: list[Batch] = []
        for micro_batch in self.loader:
            step.append(micro_batch)
            if len(step) == self.micro_batches:
                yield step
                step = []
