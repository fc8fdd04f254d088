"""What a config key means for the identity of a result; it stands on the field itself.

    workers: int = field(default=2, metadata=NEUTRAL)

A field without any of these decides what its stage computes. What stands on a section holds for
every key in it. ``config/identity.py`` reads them.
"""

from typing import Any, Final

IDENTITY: Final = "identity"
RESUME: Final = "may_change"

NEUTRAL: Final[dict[str, Any]] = {IDENTITY: "neutral"}
"""The result is the same whatever the value."""
INPUT: Final[dict[str, Any]] = {IDENTITY: "input"}
"""A path: what counts is the content it names."""
ADDED: Final[dict[str, Any]] = {IDENTITY: "added"}
"""A key that earlier versions did not have; at its default the stage does what it did without it,
so that results keep their identity. Every new key that decides something gets this."""
MAY_CHANGE: Final[dict[str, Any]] = {RESUME: ("",)}
"""May differ when unfinished work is started again; the stage copes with it."""

TOKENS: Final[dict[str, Any]] = {"tokens": True}
"""Of ``data``: decides which tokens a sample holds, so what is stored of samples depends on it."""


def may_change(*names: str) -> dict[str, Any]:
    """``MAY_CHANGE`` for a part of a section.

    Args:
        names: keys of the section, or how they begin.
    """
    return {RESUME: names}
