"""Training checkpoints on their way to disk: while training waits, or beside it.

Beside it, training waits only until the state has been copied. A process that is forked from every
rank writes and hashes that rank's files; when all ranks have theirs, the folder gets its name.
Until then the checkpoint before it stays, even if it is the only one and its turn to go has come.
"""

import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from torch import Tensor

from nemo_minitron.checkpoint.manifest import FileEntry, files_in
from nemo_minitron.checkpoint.seals import dumped, entries_of, loaded, write_seal
from nemo_minitron.models.weights import plain_errors
from nemo_minitron.runtime.agreement import from_first, together
from nemo_minitron.runtime.atomic import atomic_file, rename_folder
from nemo_minitron.runtime.megatron import (
    request_save,
    save_sharded,
    saving_strategy,
    settle_common,
    writer_queue,
)
from nemo_minitron.runtime.supervise import outlive_signals

UNFINISHED = ".tmp"
"""Suffix of a checkpoint that is being written or deleted."""
_HASHES = "hashes"


def checkpoint_name(step: int) -> str:
    """Return the folder name of a training checkpoint."""
    return f"step={step}"


def step_of(path: Path) -> int:
    """Steps done at a training checkpoint, by its folder name."""
    return int(path.name.split("=")[1])


def complete_checkpoints(folder: Path) -> list[Path]:
    """Training checkpoints below ``folder``, without those that are being written or deleted."""
    return [
        path
        for path in folder.glob("step=*")
        if path.suffix != UNFINISHED and dist_checkpointing.check_is_distributed_checkpoint(path)
    ]


class Saver:
    """Writes the training checkpoints of one run; every method is collective.

    Args:
        background: whether training goes on while a checkpoint is written.
    """

    def __init__(self, background: bool) -> None:
        self._queue: Any = writer_queue() if background else None
        # Weights and optimizer state have one structure for as long as a run goes.
        self._strategy, self._validated = saving_strategy() if background else None, False
        self._writing: Path | None = None
        self._removals: list[Path] = []

    def save(self, state: dict[str, object], target: Path) -> None:
        """Write ``state`` to ``target``, or begin to.

        Raises:
            OSError: writing failed; in the background that of the checkpoint before.
        """
        self.settle(wait=True)
        work = _fresh_folder(target, shared=self._queue is None)
        with plain_errors(work):
            if self._queue is None:
                save_sharded(state, str(work))
                _publish(work, target, hashes_by_rank(work))
                return
            _spare_copies(state)
            validate, self._validated = not self._validated, True
            request = request_save(state, str(work), self._strategy, validate=validate)
            write = partial(_write_and_hash, request.async_fn, work, dist.get_rank())
            request = request._replace(async_fn=write)
            request.add_finalize_fn(partial(_finish, work, target))
            self._queue.schedule_async_request(request)
        self._writing = work

    def settle(self, *, wait: bool) -> None:
        """Give the checkpoint that is being written its name, if all ranks have written theirs.

        Args:
            wait: until they have.

        Raises:
            OSError: writing failed, on every rank.
        """
        if self._writing is not None:
            with plain_errors(self._writing):
                if not self._queue.maybe_finalize_async_calls(blocking=wait):
                    return
            self._writing = None
        for path in self._removals:
            _remove(path)
        self._removals = []

    def remove(self, path: Path) -> None:
        """Delete a checkpoint, once the one that takes its place is complete."""
        if self._writing is None:
            _remove(path)
        else:
            self._removals.append(path)


def hashes_by_rank(folder: Path) -> dict[str, FileEntry]:
    """Hashes of the files of a checkpoint; every rank reads its share (collective)."""
    names = from_first(partial(files_in, folder))
    return _gathered(entries_of(folder, names[dist.get_rank() :: dist.get_world_size()]))


def _gathered(mine: dict[str, FileEntry]) -> dict[str, FileEntry]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine, group=dist.group.WORLD)
    return {name: entry for part in found for name, entry in part.items()}


def _fresh_folder(target: Path, *, shared: bool) -> Path:
    """Return an empty folder beside ``target`` (collective).

    Args:
        target: the final name.
        shared: whether another save of the same step may have the same folder. In the background it
            must not: what a killed job's writer still writes belongs to that job.
    """

    def make() -> Path:
        token = "" if shared else f".{secrets.token_hex(4)}"
        folder = target.with_name(f"{target.name}{token}{UNFINISHED}")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    return from_first(make)


def _spare_copies(state: dict[str, object]) -> None:
    """Keep Megatron from copying what is in host memory: the forked process has it as it is now.

    Megatron copies a tensor whose storage is larger than itself, as in the flat buffers of weights
    and of the optimizer, because whole storages are written.
    """
    apply_factories(state)
    for part in nested_values(state):
        if isinstance(part, ShardedTensor) and part.data is not None:
            part.data = of_own_storage(part.data)


def of_own_storage(tensor: Tensor) -> Tensor:
    """Return a tensor on the same memory whose storage ends where the tensor ends.

    Tensors on a GPU, empty ones and those that are not contiguous are returned as they are.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.numel():
        return tensor
    memory = torch.from_numpy(tensor.detach().view(-1).view(torch.uint8).numpy())
    return memory.view(tensor.dtype).view(tensor.shape)


def _write_and_hash(
    write: Callable[..., None] | None, folder: Path, rank: int, *args: object, **kwargs: object
) -> None:
    """Runs in a process of its own: writes the files of one rank and hashes them."""
    outlive_signals()
    if write is not None:
        write(*args, **kwargs)
    names = [name for name in files_in(folder) if name.startswith(f"__{rank}_")]
    with atomic_file(folder / f"{_HASHES}.{rank}") as draft:
        draft.write_text(dumped(entries_of(folder, names)))


def _finish(work: Path, target: Path) -> None:
    """A checkpoint that all ranks have written gets its name (collective).

    Raises:
        OSError: the process that wrote a rank's files ended before it was done, on every rank.
    """
    own, mine = work / f"{_HASHES}.{dist.get_rank()}", dict[str, FileEntry]()

    def read() -> None:
        settle_common(str(work))
        if not own.is_file():
            raise OSError(f"{work}: the process that writes rank {dist.get_rank()}'s files ended")
        mine.update(loaded(own))
        own.unlink()

    together(read)
    _publish(work, target, _gathered(mine))


def _publish(work: Path, target: Path, entries: dict[str, FileEntry]) -> None:
    """Hash what no rank has hashed, and give a checkpoint its name (collective).

    Raises:
        OSError: it failed, on every rank.
    """

    def publish() -> None:
        rest = entries_of(work, set(files_in(work)) - set(entries))
        shutil.rmtree(target, ignore_errors=True)
        write_seal(target, entries | rest)
        rename_folder(work, target)

    together(publish if dist.get_rank() == 0 else None)


def _remove(path: Path) -> None:
    """Delete a checkpoint; renamed first, so that half of one is never read."""
    if dist.get_rank() == 0 and path.exists():
        with suppress(OSError):  # it is not in anybody's way, and the other ranks go on
            shutil.rmtree(path.rename(path.with_name(path.name + UNFINISHED)), ignore_errors=True)
