"""Names the rank that the others wait for, by what each does of a step before it has to wait."""

import logging
import socket
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_minitron.runtime.launch import device

log = logging.getLogger(__name__)


class Stragglers(Callback):
    """Compares the ranks' own parts of a step whenever one is logged.

    A whole step takes every rank as long as the slowest one. A rank's own part lasts from the end
    of the step before to where gradients are summed over replicas: reading data, forward and
    backward passes. Ranks of one replica wait for each other inside that part and show about the
    same, so what is found is the slowest replica, and with one rank per replica the slowest rank.
    On a GPU the ends are events in its stream, read when a step is logged: nothing waits for them.

    Args:
        ratio: to the median above which a rank is named; 0 measures nothing.

    Attributes:
        found: what was said of the steps that were logged last; empty if no rank was above.
    """

    def __init__(self, ratio: float) -> None:
        self.ratio, self.found = ratio, ""
        self._begin: Any = None
        self._parts: list[tuple[Any, Any]] = []
        self._nodes: list[str] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn the ranks' nodes, and be called where gradients are summed."""
        if not self.ratio:
            return
        nodes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(nodes, socket.gethostname(), group=dist.group.WORLD)
        self._nodes = nodes
        config = pl_module.last_chunk.config  # all chunks share it
        config.finalize_model_grads_func = partial(self._end, config.finalize_model_grads_func)

    def _end(self, finalize: Callable[..., None], *args: object, **kwargs: object) -> None:
        if self._begin is not None:
            self._parts.append((self._begin, _now()))
            self._begin = None
        finalize(*args, **kwargs)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: object
    ) -> None:
        """Compare if the step is logged; the next one begins."""
        if self._parts and pl_module.last_metrics:
            self._compare(pl_module)
        self._begin = _now() if self.ratio else None

    def on_save_checkpoint(self, *args: object) -> None:
        """Leave out a step after a checkpoint: what precedes it is not its own."""
        self._begin = None

    def on_validation_start(self, *args: object) -> None:
        """Leave out a step after a validation, for the same reason."""
        self._begin = None

    def _compare(self, pl_module: LightningModule) -> None:
        """Compare the seconds of all ranks, one number of each (collective)."""
        own = sum(_seconds(*part) for part in self._parts) / len(self._parts)
        self._parts = []
        mine = torch.tensor([own], dtype=torch.float64, device=device())
        gathered = [torch.empty_like(mine) for _ in self._nodes]
        dist.all_gather(gathered, mine, group=dist.group.WORLD)
        seconds = torch.cat(gathered).tolist()
        slowest, median = max(seconds), statistics.median_low(seconds)
        rank, ratio = seconds.index(slowest), slowest / max(median, 1e-9)
        self.found = ""
        if ratio <= self.ratio:
            return
        self.found = f"rank {rank} on {self._nodes[rank]}, {ratio:.2f} times the median"
        log.warning("slow: %s of %.3g s per step before ranks wait", self.found, median)
        for name, value in (("slowest_rank", rank), ("slowest_ratio", ratio)):
            pl_module.last_metrics[name] = value
            pl_module.log(f"train/{name}", float(value), batch_size=1)


def _now() -> Any:
    """Return this moment of the device: an event in its stream, or the clock."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(begin: Any, end: Any) -> float:
    """Return the seconds between two moments that are past."""
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000
