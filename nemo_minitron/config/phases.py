"""``trainer.phases``: parts of a training that read other data, longer samples or other batches."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_minitron.config.blend import is_blend, parse_blend
from nemo_minitron.config.training import DataConfig, TrainerConfig

_NOT_OF_A_PHASE = ("blend_changes", "num_samples", "split_name", "cache_dir")
_OWN = tuple(key.name for key in fields(DataConfig) if key.name not in _NOT_OF_A_PHASE)


@dataclass(frozen=True)
class Phase:
    """Some steps of a training, one after another.

    Attributes:
        index: number of phases before it.
        begin: steps of the phases before it.
        end: steps when it is over.
        data: what its steps read.
        own: keys of ``data`` that the phase sets itself.
    """

    index: int
    begin: int
    end: int
    data: DataConfig
    own: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """Number of optimizer steps of the phase."""
        return self.end - self.begin

    def steps_between(self, first: int, last: int) -> int:
        """Number of its steps among those after step ``first`` up to step ``last``."""
        return max(0, min(last, self.end) - max(first, self.begin))

    def naming(self) -> AbstractContextManager[None]:
        """Let an error about ``data.*`` name the key of this phase, where it has one."""
        return _naming(self.index, self.own)


def phases_of(data: DataConfig, trainer: TrainerConfig) -> list[Phase]:
    """The phases of a training, whose steps add up to ``trainer.max_steps``; one if none are set.

    Args:
        data: keys of every phase that sets none of its own.
        trainer: gives the phases.

    Raises:
        ValueError: names the phase, its key and what is wrong.
    """
    if trainer.phases is None:
        return [Phase(0, 0, trainer.max_steps, data)]
    entries = parse_phases(trainer.phases)
    ends = list(accumulate(entry["steps"] for entry in entries))
    if ends[-1] != trainer.max_steps:
        raise ValueError(
            f"the steps of trainer.phases add up to {ends[-1]}, which must be trainer.max_steps="
            f"{trainer.max_steps}; change one of them"
        )
    if data.blend_changes:
        raise ValueError(
            "data.blend_changes and trainer.phases both change the data at steps; give each phase "
            "its own data.blend"
        )
    found = []
    for index, (entry, end) in enumerate(zip(entries, ends, strict=True)):
        section = _data(index, data, entry["data"])
        found.append(Phase(index, end - entry["steps"], end, section, tuple(entry["data"])))
    return found


def parse_phases(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the entries of ``trainer.phases``, each with ``steps`` and ``data``.

    Args:
        entries: as given; what this function returned stays what it is.

    Raises:
        ValueError: names the entry and what is wrong with it.
    """
    if not entries:
        raise ValueError("trainer.phases=[] has no phase; leave it out, or name steps of each")
    return [_checked(index, dict(entry)) for index, entry in enumerate(entries)]


def _checked(index: int, entry: dict[str, Any]) -> dict[str, Any]:
    """Return an entry with both of its keys, and its sources in one form."""
    where = f"trainer.phases.{index}"
    if not {"steps"} <= set(entry) <= {"steps", "data"} or not isinstance(
        entry.setdefault("data", {}), dict
    ):
        raise ValueError(f"{where}={entry} must have steps, and may have data (keys of data.*)")
    steps = entry["steps"]
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{where}.steps={steps} must be a number of steps of at least 1")
    unknown = sorted(set(entry["data"]) - set(_OWN))
    if unknown:
        raise ValueError(
            f"{where}.data.{unknown[0]} is not a key of a phase; those are {', '.join(_OWN)}"
        )
    data = entry["data"]
    if data.get("blend") is None and is_blend(data.get("path")):
        data = {**data, "blend": data["path"]}
        del data["path"]
    if data.get("blend") is None:
        return entry
    with _naming(index, data):
        return {**entry, "data": {**data, "blend": parse_blend(data["blend"])}}


def _data(index: int, data: DataConfig, own: dict[str, Any]) -> DataConfig:
    """Return the keys of ``data`` with those of a phase in their place."""
    values = with_own(asdict(data), own)
    with _naming(index, own):
        try:
            typed = OmegaConf.merge(OmegaConf.structured(type(data)), values)
            section = OmegaConf.to_object(typed)
        except OmegaConfBaseException as error:
            said = str(error).splitlines()[0]
            key = getattr(error, "full_key", None)
            raise ValueError(f"trainer.phases.{index}.data.{key}: {said}") from error
    assert isinstance(section, DataConfig)
    return section


def with_own(data: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return keys of ``data`` with those of a phase in their place; of two sources its own stays.

    Args:
        data: keys of every phase.
        own: keys of one, in the form that ``parse_phases`` gives them.
    """
    gone: dict[str, Any] = {}
    if "path" in own:
        gone = {"blend": None, "blend_max_epochs": None}
    elif "blend" in own:
        gone = {"path": ""}
    return {**data, **gone, **own}


@contextmanager
def _naming(index: int, own: Iterable[str]) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        keys = "|".join(map(re.escape, own))
        if not keys:
            raise
        prefix = f"trainer.phases.{index}.data."
        said = re.sub(rf"(?<![\w.])data\.(?=(?:{keys})\b)", prefix, str(error))
        raise ValueError(said) from error


def phase_of(phases: Sequence[Phase], step: int) -> int:
    """Return the index of the phase that a step is in, counted from 1."""
    return next(index for index, phase in enumerate(phases) if step <= phase.end)


def samples_before(phases: Sequence[Phase], step: int) -> list[int]:
    """Return samples of each phase that are consumed when a step, counted from 1, is done."""
    return [phase.steps_between(0, step) * phase.data.global_batch_size for phase in phases]
