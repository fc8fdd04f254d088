"""Starts and ends the process group and Megatron's model-parallel state."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from nemo_minitron.runtime import cpu, peers, worlds
from nemo_minitron.runtime.agreement import from_first
from nemo_minitron.runtime.atomic import atomic_file
from nemo_minitron.runtime.extensions import before_megatron
from nemo_minitron.runtime.ranks import launched_ranks, rank, store_address

if TYPE_CHECKING:
    from nemo_minitron.config.parallel import ParallelConfig


def device() -> torch.device:
    """Return this rank's device."""
    if torch.cuda.is_available():
        # Schedulers may show each rank its own GPU alone (srun --gpus-per-task), as number 0.
        own = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        return torch.device("cuda", own)
    return torch.device("cpu")


def seen_by_all(path: Path) -> bool:
    """Whether a file or folder that rank 0 may make next is there already: one answer for all.

    It is that of rank 0: shared storage may show other ranks what was there some seconds ago.
    """
    return from_first(path.exists)


def init_process_group(timeout_minutes: int = 30) -> None:
    """Join the ranks the launcher started, or make a group of one that needs no network."""
    if dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    if launched_ranks() is None:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
    else:
        address = store_address()
        if address is None:
            store, *_ = next(dist.rendezvous("env://", timeout=timeout))
        else:
            store = _store(address, timeout)
        worlds.join(store, rank(), launched_ranks() or 1, backend, timeout)
        peers.introduce()


def _store(address: Path, timeout: timedelta) -> dist.Store:
    """Return the store where ranks of this machine meet: rank 0 chooses a free port."""
    if rank() == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        with atomic_file(address) as draft:
            draft.write_text(str(store.port))
        return store
    end = time.monotonic() + timeout.total_seconds()
    while not address.exists():
        if time.monotonic() > end:
            raise RuntimeError(f"rank {rank()} waited for rank 0 in vain")
        time.sleep(0.02)
    return dist.TCPStore("127.0.0.1", int(address.read_text()), is_master=False, timeout=timeout)


def init_model_parallel(parallel: "ParallelConfig", seed: int = 1234) -> None:
    """Create Megatron's groups for ``parallel`` over the initialised world."""
    before_megatron()
    from megatron.core import parallel_state, tensor_parallel

    parallel.world_size(dist.get_world_size())
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


@contextmanager
def distributed(parallel: "ParallelConfig", seed: int = 1234) -> Iterator[None]:
    """Set up what a stage needs around a model: stand-in, process group, parallel groups."""
    before_megatron()
    from megatron.core import parallel_state

    cpu.install()
    init_process_group()
    init_model_parallel(parallel, seed)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()
