"""Communication of data parallelism beside the computation: what Megatron's training loop sets.

Megatron's DDP starts the reduction of a bucket of gradients as soon as it is complete, and gathers
the weights that the distributed optimizer has updated when the next forward pass reaches them.
Its schedule has to know when a batch is over, and whoever reads a weight outside of a forward pass
has to wait for it: the losses, which read the output layer's weight without calling the layer, and
checkpoints.
"""

from collections.abc import Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from torch import Tensor


def connect(chunks: Sequence[DistributedDataParallel]) -> None:
    """Tell Megatron's schedule how to reduce gradients once per batch, and when to gather weights.

    Args:
        chunks: this rank's wrapped chunks, which share one model config.
    """
    config, settings = chunks[0].config, chunks[0].ddp_config
    if settings.overlap_grad_reduce:
        config.no_sync_func = _each([chunk.no_sync for chunk in chunks])
    if settings.overlap_param_gather and settings.align_param_gather:
        config.param_sync_func = _each([chunk.start_param_sync for chunk in chunks])


def disconnect(chunks: Sequence[DistributedDataParallel]) -> None:
    """Undo ``connect`` and let the weights be read like any others (collective)."""
    gather_all(chunks)
    for chunk in chunks:
        chunk.config.no_sync_func = None
        chunk.config.param_sync_func = None
        if chunk.ddp_config.overlap_param_gather and chunk.remove_forward_pre_hook_handles:
            chunk.disable_forward_pre_hook(param_sync=False)


def _each(functions: list[Any]) -> Any:
    """Return what Megatron expects: a list for several chunks, one function for a single chunk."""
    return functions if len(functions) > 1 else functions[0]


def await_weight(chunk: Any, weight: Tensor) -> None:
    """Wait for a weight that is read without its module being called.

    Args:
        chunk: the module that a pipeline stage runs, wrapped for training or not.
        weight: a parameter of it.
    """
    wrapped = isinstance(chunk, DistributedDataParallel)
    if wrapped and chunk.ddp_config.overlap_param_gather and weight in chunk.param_to_bucket_group:
        bucket = chunk.param_to_bucket_group[weight]
        bucket.finish_param_sync(skip_next_bucket_dispatch=chunk.ddp_config.align_param_gather)


def gather_all(chunks: Sequence[Any]) -> None:
    """Make every weight current on every rank, for whoever reads them all (collective).

    Args:
        chunks: modules of this rank's pipeline stages, wrapped for training or not.
    """
    for chunk in chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
