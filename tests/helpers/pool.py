"""Ranks that live as long as the test session: importing Megatron costs seconds per process.

A task is a top-level function of an importable module. It runs on the first ``n`` workers, each
with ``torch.distributed`` initialised (gloo); results come back in rank order, and a failure on any
rank raises one error with every traceback.
"""

import gc
import os
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import psutil
import torch.multiprocessing as mp

TIMEOUT_SECONDS = 180


def _run_task(rank: int, size: int, store: str, fn: Callable[..., Any], args: tuple) -> Any:
    import torch.distributed as dist
    from megatron.core import parallel_state

    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size)
    )
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )
    try:
        return fn(*args)
    finally:
        parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()


def kill_children(pid: int) -> None:
    """Megatron's checkpoint writer starts helper processes that outlive a killed parent."""
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children(recursive=True):
            child.kill()


def _free_groups() -> None:
    """Let go of the groups of a task.

    A gloo group that is kept after the other ranks left has a thread that spins, and there were
    hundreds after some hundred tests. Models hold their groups in cycles; Megatron caches the
    rotary embeddings of the last models with theirs; and autograd's nodes hold the hooks of its
    DDP, where Python's garbage collector cannot see them.
    """
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.common.embeddings import RotaryEmbedding, YarnRotaryEmbedding

    RotaryEmbedding.forward.cache_clear()
    YarnRotaryEmbedding.forward.cache_clear()
    gc.collect()
    for found in gc.get_objects():
        if type(found) is DistributedDataParallel:
            found.__dict__.clear()
    gc.collect()


def _worker(connection: Connection) -> None:
    import torch

    from nemo_minitron.runtime import cpu, extensions

    extensions.be_quiet()
    torch.set_num_threads(1)
    cpu.install()
    # Megatron collects garbage at every save; a million objects of imported modules are none.
    gc.freeze()
    while True:
        try:
            task = connection.recv()
        except EOFError:  # the test session is gone
            kill_children(os.getpid())
            os._exit(0)
        try:
            answer = (True, _run_task(*task))
        except BaseException:
            answer = (False, traceback.format_exc())
        _free_groups()
        connection.send(answer)


class WorkerPool:
    """Starts workers on demand and keeps them."""

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []

    def _grow(self, size: int) -> None:
        # Not daemons: Megatron's checkpoint writer starts processes of its own.
        # Forked from a server that has imported, and done, nothing else.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["nemo_minitron.models.distill"])
        while len(self._workers) < size:
            parent, child = context.Pipe()
            process = context.Process(target=_worker, args=(child,))
            process.start()
            self._workers.append((process, parent))

    def run(self, size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """Run ``fn(*args)`` on ``size`` ranks; returns their results in rank order."""
        self._grow(size)
        with tempfile.NamedTemporaryFile(suffix=".store", delete=False) as file:
            store = file.name
        os.unlink(store)
        try:
            for rank in range(size):
                self._workers[rank][1].send((rank, size, store, fn, args))
            return self._collect(size, fn.__name__)
        finally:
            if os.path.exists(store):
                os.unlink(store)

    def _collect(self, size: int, name: str) -> list[Any]:
        results: list[Any] = []
        errors: list[str] = []
        for rank in range(size):
            connection = self._workers[rank][1]
            if not connection.poll(TIMEOUT_SECONDS + 60):
                self.close()
                raise TimeoutError(
                    f"{name}: rank {rank} of {size} gave no answer\n" + "".join(errors)
                )
            ok, value = connection.recv()
            if ok:
                results.append(value)
            else:
                errors.append(f"--- rank {rank} of {size}\n{value}")
        if errors:
            self.close()
            raise RuntimeError(f"{name} failed\n" + "\n".join(errors))
        return results

    def close(self) -> None:
        """Stop every worker."""
        for process, _ in self._workers:
            kill_children(process.pid)
            process.kill()
            process.join()
        self._workers = []
