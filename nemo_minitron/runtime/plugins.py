"""Load what other packages add by entry points, as ``examples/plugin`` does.

A package that cannot be imported is named in one line and the rest works. Of two that give one
name, or one that this package has, neither is taken.
"""

import logging
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from nemo_minitron.runtime.ranks import rank

log = logging.getLogger(__name__)

KINDS = {
    "families": "family",
    "criteria": "criterion",
    "losses": "loss",
    "axes": "axis",
    "loggers": "logger",
}
"""Part of the group's name, ``nemo_minitron.<kind>`` -> what one of them is called."""
Added = TypeVar("Added")


def origin(point: EntryPoint) -> str:
    """Return the package that gives an entry point, and its version."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


@cache
def found(kind: str) -> tuple[EntryPoint, ...]:
    """Entry points of a kind by name; nothing of them is imported."""
    points = entry_points(group=f"nemo_minitron.{kind}")
    return tuple(sorted(points, key=lambda point: (point.name, origin(point))))


def added(kind: str, own: tuple[str, ...]) -> tuple[str, ...]:
    """Return names that other packages add to those of this one."""
    names = [point.name for point in found(kind)]
    return tuple(name for name in names if names.count(name) == 1 and name not in own)


def with_added(
    kind: str,
    own: Mapping[str, Added],
    checked: Callable[[str, Added], Added] = lambda name, one: one,
) -> dict[str, Added]:
    """Return a table of this package with what others add to it, imported.

    Args:
        kind: as in ``KINDS``.
        own: table of this package.
        checked: what is taken for a name and what was imported; it is left out where this raises.
    """
    table, taken = dict(own), added(kind, tuple(own))
    for point in found(kind):
        label = f"{KINDS[kind]} '{point.name}' of {origin(point)}"
        if point.name not in taken:
            _warn(f"{label} is left out: another package, or this one, has one of the name")
            continue
        try:
            table[point.name] = checked(point.name, point.load())
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            _warn(f"{label} cannot be used and is left out ({reason})")
    return table


def named(kind: str, own: Mapping[str, Added], name: str, key: str) -> Added:
    """Return the object that a config key names, from this package or from a plugin.

    Args:
        kind: as in ``KINDS``.
        own: table of this package.
        name: value of the key.
        key: the key, for the message.

    Raises:
        ValueError: nothing has the name, or the package that adds it cannot be imported.
    """
    known = with_added(kind, own)
    if name not in known:
        raise ValueError(f"{key}={name} is not known; known: {', '.join(known)}")
    return known[name]


def _warn(text: str) -> None:
    if rank() == 0:
        log.warning("%s", text)
