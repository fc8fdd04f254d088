"""The keys of every stage, and what a key means for the identity of a result.

The meaning stands on the field itself:

    workers: int = field(default=2, metadata=NEUTRAL)

A field without any of these decides what its stage computes. What stands on a section holds for
every key in it. ``config/identity.py`` reads them.
"""

import math
import os
from dataclasses import dataclass, field, fields
from typing import Any, Final

from omegaconf import MISSING

IDENTITY: Final = "identity"
RESUME: Final = "may_change"
WORDS: Final = "words"

NEUTRAL: Final[dict[str, Any]] = {IDENTITY: "neutral"}
"""The result is the same whatever the value."""
INPUT: Final[dict[str, Any]] = {IDENTITY: "input"}
"""A path: what counts is the content it names."""
ADDED: Final[dict[str, Any]] = {IDENTITY: "added"}
"""A key that earlier versions did not have; at its default the stage does what it did without it,
so that results keep their identity. Every new key that decides something gets this."""
EARLIER: Final = "earlier"


def with_earlier_default(value: Any) -> dict[str, Any]:
    """Return field metadata that records the default of earlier versions.

    The two mean the same for every model that an earlier version could open, so results that were
    made with it keep their identity.
    """
    return {EARLIER: value}


MAY_CHANGE: Final[dict[str, Any]] = {RESUME: ("",)}
"""May differ when unfinished work is started again; the stage copes with it."""

TOKENS: Final[dict[str, Any]] = {"tokens": True}
"""Of ``data``: decides which tokens a sample holds, so what is stored of samples depends on it."""


def may_change(*names: str) -> dict[str, Any]:
    """Return ``MAY_CHANGE`` for a part of a section.

    Args:
        names: keys of the section, or how they begin.
    """
    return {RESUME: names}


def one_of(*words: str | None) -> dict[str, Any]:
    """Return metadata of a field that takes a few words alone; None is written null."""
    return {WORDS: tuple("null" if word is None else word for word in words)}


def check_values(section: Any, prefix: str = "") -> None:
    """Refuse numbers that are not finite, and values that are not one of a field's words.

    Every comparison with NaN is false, so no check of a range would find it.

    Args:
        section: a config dataclass.
        prefix: of its keys, like ``trainer.``.

    Raises:
        ValueError: names the key, and the words if it has some.
    """
    for key in fields(section):
        value, words = getattr(section, key.name), key.metadata.get(WORDS)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{prefix}{key.name}={value} must be a finite number")
        if words and ("null" if value is None else value) not in words:
            listed = f"{', '.join(words[:-1])} or {words[-1]}"
            if len(words) > 3:
                listed = f"one of {', '.join(words)}"
            raise ValueError(f"{prefix}{key.name}={value} must be {listed}")


@dataclass(kw_only=True)
class StageConfig:
    """Keys that every stage has."""

    output_dir: str = field(default=MISSING, metadata=NEUTRAL)
    """Folder of the result. It appears, complete, when the stage ends well."""
    overwrite: bool = field(default=False, metadata=NEUTRAL)
    """Replace a complete result; without it a complete result is an error."""
    verify_inputs: str = field(default="full", metadata={**NEUTRAL, **one_of("full", "size")})
    """Check of input folders: ``full`` hashes every file, ``size`` compares sizes only."""
    workers: int = field(default=2, metadata=NEUTRAL)
    """Threads for tensor and file work."""

    def __post_init__(self) -> None:
        """Check values and ranges."""
        check_values(self)
        _check_paths(self)
        if self.workers < 1:
            raise ValueError(f"workers={self.workers} must be at least 1")


def _check_paths(stage: StageConfig) -> None:
    """Refuse paths that are empty, which would mean the working directory, and ``output_dir=/``."""
    for key in fields(stage):
        if getattr(stage, key.name) == "" and (
            key.name == "output_dir" or key.metadata.get(IDENTITY) == INPUT[IDENTITY]
        ):
            raise ValueError(
                f"{key.name}= is empty (a variable of the shell that is not set?); "
                f"set {key.name} to a path"
            )
    if os.path.realpath(stage.output_dir) == os.path.sep:
        raise ValueError(
            f"output_dir={stage.output_dir} is the root of the file system, which no result can "
            "take the place of; set output_dir to a folder below it"
        )
