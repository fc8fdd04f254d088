"""State of a calibration on disk, so that a killed one goes on where it was.

``<folder>/<number>/rank<r>.pt`` holds the accumulators of every rank, ``<folder>/latest.json``
names the newest complete number, the layout it belongs to and the hashes of these files.
Accumulators add in a fixed order, so a calibration that went on gives the scores of an undisturbed
one, bit for bit.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

from nemo_minitron.checkpoint.manifest import digest, hash_file
from nemo_minitron.documents import read_json_object
from nemo_minitron.runtime.agreement import agreed, from_first, together
from nemo_minitron.runtime.atomic import atomic_file

log = logging.getLogger(__name__)

_LATEST = "latest.json"


class SavedState:
    """Saves the state of all ranks now and then; collective throughout.

    Attributes:
        number: of the newest state.
        resumed: forward passes of a sample that the loaded state stands for.
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        layout: dict[str, Any],
        defaults: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Describe where and how often.

        Args:
            folder: for this state alone, the same on every rank.
            every: samples between two saves; 0 saves none.
            layout: JSON values that must be the same for a saved state to fit.
            defaults: what a state of a version that lacked one of them stands for.
        """
        self.folder, self.every = folder, every
        self.layout = {**layout, "world_size": dist.get_world_size()}
        self.defaults = defaults
        self.number = 0
        self.resumed = 0
        self._samples = 0

    def load(self) -> dict[str, Any] | None:
        """Return this rank's part of the newest state, or None if no saved state fits.

        Raises:
            ValueError: it is damaged, here or on another rank.
        """
        found = from_first(self._find)
        if found is None:
            return None
        number, samples, hashes = found
        path = self._file(number)
        visible: list[bool] = [False] * dist.get_world_size()
        dist.all_gather_object(visible, path.is_file(), group=dist.group.WORLD)
        if not all(visible):
            log.warning("not every rank finds its part of %s: scoring starts over", path.parent)
            return None
        agreed(partial(self._refuse_damage, path, hashes))
        self.number, self.resumed = number, samples
        log.info("scoring goes on after %d samples", samples)
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state

    def _refuse_damage(self, path: Path, hashes: list[str] | None) -> None:
        """Compare this rank's file with its hash."""
        if hashes is not None and hash_file(path).sha256 != hashes[dist.get_rank()]:
            raise self._damage(path)

    def _damage(self, name: str | Path) -> ValueError:
        return ValueError(
            f"{name} is damaged: it is not what was written; remove {self.folder}, then the same "
            "command scores all samples again"
        )

    def _find(self) -> tuple[int, int, list[str] | None] | None:
        """Return the newest complete state, samples done by then, hashes by rank (rank 0).

        States of earlier versions have no hashes.
        """
        path = self.folder / _LATEST
        if not path.is_file():
            return None
        try:
            latest = read_json_object(path)
        except ValueError:
            raise self._damage(path) from None
        own = latest.pop("sha256", None)
        if ("files" in latest or own is not None) and own != digest(latest):
            raise self._damage(path)
        before = {**self.defaults, **latest["layout"]}
        changed = [
            f"{key} {before.get(key)} -> {value}"
            for key, value in self.layout.items()
            if before.get(key) != value
        ]
        if changed:
            log.warning("the layout changed (%s): scoring starts over", ", ".join(changed))
            return None
        return latest["number"], latest["samples"], latest.get("files")

    def _file(self, number: int) -> Path:
        return self.folder / str(number) / f"rank{dist.get_rank()}.pt"

    def after(self, samples: int, done: int, state: Callable[[], dict[str, Any]]) -> None:
        """Save where it is due.

        Args:
            samples: forward passes of a sample since the last call.
            done: forward passes of a sample so far.
            state: what to save of this rank.

        Raises:
            OSError: a rank cannot write, on every rank.
        """
        self._samples += samples
        if not self.every or self._samples < self.every:
            return
        self._samples = 0
        before, self.number = self.number, self.number + 1
        path = self._file(self.number)
        together(partial(_write_state, path, state))
        hashes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(hashes, hash_file(path).sha256, group=dist.group.WORLD)
        from_first(partial(self._name_newest, before, done, hashes))

    def _name_newest(self, before: int, done: int, hashes: list[str]) -> None:
        """Say that the state of all ranks is whole, and remove the one before it."""
        latest = {"number": self.number, "samples": done, "layout": self.layout, "files": hashes}
        latest["sha256"] = digest(latest)
        with atomic_file(self.folder / _LATEST) as draft:
            draft.write_text(json.dumps(latest))
        shutil.rmtree(self.folder / str(before), ignore_errors=True)

    def remove(self) -> None:
        """Remove all saved states: the scores are there."""
        dist.barrier(group=dist.group.WORLD)
        if dist.get_rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)


def _write_state(path: Path, state: Callable[[], dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as draft:
        torch.save(state(), draft)
