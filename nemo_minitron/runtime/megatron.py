"""Hide the differences between the supported releases of Megatron-Core (0.16 to 0.19).

Every difference is looked up here, once, by the name or the argument that a release has or lacks;
no other module asks for a version. ``docs/versions.md`` says which release brought what.
"""

import importlib.util
import inspect
import multiprocessing
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, partial
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_minitron.runtime import endings
from nemo_minitron.runtime.extensions import before_megatron
from nemo_minitron.runtime.supervise import outlive_signals

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import ModuleSpec

before_megatron()

HAVE_HYBRID = importlib.util.find_spec("megatron.core.models.hybrid") is not None
"""Whether there is a model whose layers differ (0.18 and later)."""
_DELTA_NET = importlib.util.find_spec("megatron.core.ssm.gated_delta_net")
HAVE_DELTA_NET = bool(_DELTA_NET and _DELTA_NET.submodule_search_locations)
"""Whether the gated delta net is the package that ``models.delta_spec`` builds on; it was one
module in 0.16."""
_COMMON_PT = "common.pt"


@cache
def builds_prediction() -> bool:
    """Whether a layer for multi-token prediction is named inside as this package names it."""
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayerSubmodules

    return "mtp_model_layer" in _arguments(MultiTokenPredictionLayerSubmodules)


@cache
def _arguments(function: Callable[..., object]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def batch_on_this_cp_rank(batch: dict[str, Tensor], group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Return this rank's part of a batch under context parallelism (Megatron's zigzag split).

    Args:
        batch: ``[b, s]`` tensors of the whole sequence.
        group: the context-parallel group. Releases from 0.18 on split over the whole world where
            they are given none.

    Returns:
        ``[b, s / cp]`` tensors.
    """
    from megatron.core.utils import get_batch_on_this_cp_rank

    arguments: dict[str, object] = {"cp_group": group}
    if "is_hybrid_cp" in _arguments(get_batch_on_this_cp_rank):  # 0.18 and later; no default
        arguments["is_hybrid_cp"] = False
    out: dict[str, Tensor] = get_batch_on_this_cp_rank(dict(batch), **arguments)
    return {name: out[name] for name in batch}


def cached_forward(
    chunk: nn.Module, collection: "ProcessGroupCollection", batch: int, length: int, vocab_size: int
) -> Any:
    """Return Megatron's inference wrapper around a chunk, ready for a forward pass with a KV cache.

    Args:
        chunk: this rank's part of the model.
        collection: Megatron's ``ProcessGroupCollection`` of this rank.
        batch: sequences that go through the model together.
        length: tokens of the longest sequence, prompt and continuation.
        vocab_size: true vocabulary.

    Returns:
        A ``GPTInferenceWrapper``; its ``inference_context`` holds the cache.
    """
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
        GPTInferenceWrapper,
    )

    context = StaticInferenceContext(batch, length)
    if "inference_wrapper_config" in _arguments(GPTInferenceWrapper.__init__):
        settings = _wrapper_config(chunk, batch, length, vocab_size)
        wrapper = GPTInferenceWrapper(chunk, settings, context, collection)
    else:  # 0.17 and later read the groups from the context
        context.config.pg_collection = collection
        wrapper = GPTInferenceWrapper(chunk, context)
    wrapper.prep_model_for_inference()
    return wrapper


def keeping_states(chunk: nn.Module) -> AbstractContextManager[None]:
    """Provide a context in which the Mamba layers of a chunk keep their states between passes.

    They ask a flag of the process; attention keeps keys and values wherever it is given a cache.
    """
    if not any(hasattr(layer, "mixer") for layer in cast("Any", chunk).decoder.layers):
        return nullcontext()
    from megatron.core.inference.utils import InferenceMode  # 0.18 and later, as HybridModel

    context: AbstractContextManager[None] = InferenceMode.active()
    return context


def _wrapper_config(chunk: "GPTModel", batch: int, length: int, vocab_size: int) -> Any:
    """Return the settings that 0.16 takes beside the model."""
    from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import (
        InferenceWrapperConfig,
    )

    return InferenceWrapperConfig(
        hidden_size=chunk.config.hidden_size,
        params_dtype=chunk.config.params_dtype,
        inference_batch_times_seqlen_threshold=-1,  # never cut a batch into micro-batches
        padded_vocab_size=vocab_size,  # of logits, which the model does not return
        inference_max_requests=batch,
        inference_max_seq_length=length,
    )


def mlp_submodules(mlp: "ModuleSpec | partial[Any]") -> Any:
    """The submodules in a layer spec's MLP: 0.16 has a ``ModuleSpec`` there, 0.19 a ``partial``."""
    return mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules


@cache
def _writes_by_nvrx() -> bool:
    """Whether ``nvidia-resiliency-ext`` is there and new enough to write Megatron's checkpoints.

    From 0.19 on Megatron calls the writer of its own deprecated in favour of that one.
    """
    try:
        from megatron.core.dist_checkpointing.strategies.nvrx import has_nvrx_async_support
    except ImportError:  # before 0.19
        return False
    try:
        return bool(has_nvrx_async_support())
    except AssertionError:  # Megatron's way to say that the installed one is too old
        return False


def save_sharded(state: dict[str, object], folder: str) -> None:
    """Write a ``torch_dist`` checkpoint and wait until it is complete (collective).

    Args:
        state: sharded state dictionary; everything in it that is not sharded is common state.
        folder: an existing, empty folder.
    """
    from megatron.core import dist_checkpointing

    if _writes_by_nvrx():
        request_save(state, folder).execute_sync()
    else:
        dist_checkpointing.save(state, folder)
    settle_common(folder)


def saving_strategy() -> Any:
    """Return Megatron's strategy for several checkpoints of the same structure, one after another.

    From the third one on it takes the plan of the second, which equals that of the first, so that
    ranks gather none; nvidia-resiliency-ext makes every plan anew.
    """
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    return TorchDistSaveShardedStrategy(
        backend="torch_dist", version=1, cached_metadata=not _writes_by_nvrx()
    )


def request_save(
    state: dict[str, object], folder: str, strategy: Any = None, *, validate: bool = True
) -> Any:
    """Prepare a ``torch_dist`` checkpoint that a process beside this one is to write (collective).

    Args:
        state: as in ``save_sharded``; nothing of it is written yet.
        folder: an existing, empty folder.
        strategy: that of the checkpoints before (``saving_strategy``), or None for Megatron's.
        validate: whether the ranks compare who writes what; once is enough for one structure.

    Returns:
        Megatron's or nvidia-resiliency-ext's ``AsyncRequest``, for the queue of ``writer_queue``.
        After it, ``settle_common`` has to be called.
    """
    from megatron.core import dist_checkpointing

    settings: dict[str, Any] = {"async_sharded_save": True, "validate_access_integrity": validate}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:  # from 0.19 on
        settings["async_strategy"] = "nvrx" if _writes_by_nvrx() else "mcore"
    request = dist_checkpointing.save(state, folder, strategy, **settings)
    metadata: Any = getattr(strategy, "cached_global_metadata", None)
    if metadata is not None:
        # A plan that was used before names the files of its rank; .metadata never holds that.
        metadata.all_local_plans = [
            replace(plan, storage_data=None) for plan in metadata.all_local_plans
        ]
    return request


def writer_queue() -> Any:
    """Return the ``AsyncCallsQueue`` that runs each request in a forked process of its own."""
    if _writes_by_nvrx():
        from nvidia_resiliency_ext.checkpointing.async_ckpt.core import AsyncCallsQueue
    else:
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
    return AsyncCallsQueue(persistent=False)


def settle_common(folder: str) -> None:
    """Store common state in a file, where every release of Megatron-Core looks for it.

    From 0.19 on Megatron stores it among the tensors.
    """
    from megatron.core import dist_checkpointing

    common = Path(folder) / _COMMON_PT
    if dist.get_rank() == 0 and not common.exists():
        torch.save(dist_checkpointing.load_common_state_dict(folder), common)


def start_writer_helper() -> None:
    """Start the helper that Megatron would start at its first checkpoint, deaf to stop signals.

    SLURM signals every process of a job step and torchrun whole process groups. The helper
    collects what the writers of a checkpoint did: were it to die of the signal, the checkpoint that
    the signal asks for could not be written.
    """
    if _writes_by_nvrx():
        from nvidia_resiliency_ext.checkpointing.async_ckpt import filesystem_async
    else:
        from megatron.core.dist_checkpointing.strategies import filesystem_async
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        with endings.held():  # it starts with signals held back, and never takes them
            manager.start(initializer=outlive_signals)
        filesystem_async._results_queue = manager.Queue()  # it holds the manager
