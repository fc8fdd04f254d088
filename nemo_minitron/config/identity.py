"""Which keys decide a result, and whether those of another run were the same.

Configs are compared key by key with what was stored beside a result, never by a hash alone: a key
that the stored config lacks is one that its version did not have, and counts as changed only if it
is not at its default. So a new version makes no result stale and no unfinished work useless.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nemo_minitron.config.base import EARLIER, IDENTITY, RESUME, StageConfig
from nemo_minitron.config.schema import default_of, flatten

# Keys of earlier versions that are no more -> the value at which they changed nothing.
REMOVED: Mapping[str, Any] = {}
_NOTHING: Any = object()


@dataclass(frozen=True)
class Meaning:
    """How one key counts when two configs are compared.

    Attributes:
        role: ``counts``, ``added``, ``neutral`` or ``input`` (see ``config/base.py``).
        default: its default.
        earlier: the default of earlier versions, if it was another that means the same.
        may_change: beginnings of what may differ on resume: "" is the key and all in it.
    """

    role: str
    default: Any
    may_change: tuple[str, ...]
    earlier: Any = None

    def plain(self, value: Any) -> Any:
        """Return a value of the key as earlier versions would have it."""
        return self.earlier if self.earlier is not None and value == self.default else value


def meanings(cls: type) -> dict[str, Meaning]:
    """Dotted key -> meaning, for every key of a config dataclass."""
    return dict(_meanings(cls, None, "", "counts", ()))


def _meanings(
    cls: type, instance: object, prefix: str, role: str, changing: tuple[str, ...]
) -> Iterator[tuple[str, Meaning]]:
    for field in dataclasses.fields(cls):
        default = getattr(instance, field.name) if instance is not None else default_of(field)
        name = prefix + field.name
        own = field.metadata.get(IDENTITY, role)
        inside = tuple(field.metadata.get(RESUME, ())) + _inside(changing, field.name)
        if dataclasses.is_dataclass(default):
            yield from _meanings(type(default), default, f"{name}.", own, inside)
        else:
            yield name, Meaning(own, default, inside, field.metadata.get(EARLIER))


def _inside(changing: tuple[str, ...], name: str) -> tuple[str, ...]:
    """Return the mark of a key inside a section whose keys may change."""
    return ("",) if any(name.startswith(beginning) for beginning in changing) else ()


def _find(known: Mapping[str, Meaning], key: str) -> tuple[str, Meaning | None]:
    """Return the field a key belongs to: itself, or the free-form dictionary that holds it."""
    name = key
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name, known.get(name)


def config_values(cfg: StageConfig) -> dict[str, Any]:
    """The keys of a stage config that decide its result, dotted; see ``input_paths`` for inputs."""
    known = meanings(type(cfg))
    values = {}
    for key, value in flatten(asdict(cfg)).items():
        name, meaning = _find(known, key)
        assert meaning is not None, key
        if value is None and _is_new_entry(meaning, name, key):
            continue
        added = meaning.role == "added" and value != meaning.default
        if meaning.role == "input" and (beside := _beside_paths(value)) is not None:
            values[key] = beside
        if meaning.role == "counts" or added:
            values[key] = meaning.plain(value)
    return values


def _is_new_entry(meaning: Meaning, name: str, key: str) -> bool:
    """Whether a key is an entry of a dictionary that earlier versions did not have."""
    known = meaning.earlier
    return name != key and isinstance(known, dict) and key[len(name) + 1 :] not in known


def _beside_paths(value: object) -> list[Any] | None:
    """Return weighted sources or phases without their paths; None for any other value."""
    if not isinstance(value, list) or any(isinstance(entry, str) for entry in value):
        return None
    return [_without_paths(entry) for entry in value]


def _without_paths(entry: Any) -> Any:
    if not isinstance(entry, dict):
        return entry
    if set(entry) == {"weight", "path"}:
        return entry["weight"]
    found = {key: value for key, value in entry.items() if key != "path"}
    if isinstance(entry.get("data"), dict):
        found["data"] = _without_paths(entry["data"])
    return found | ({"blend": _beside_paths(entry["blend"])} if entry.get("blend") else {})


def input_paths(cfg: StageConfig) -> dict[str, str]:
    """Return the config key -> path, for every input the stage config names.

    Keys are ``key.0``, ... for a list, ``key.0.path``, ... for one of weighted sources, and
    ``key.0.data.path``, ... for phases.
    """
    values = flatten(asdict(cfg))
    found: dict[str, str] = {}
    for key, meaning in meanings(type(cfg)).items():
        if meaning.role == "input":
            found.update(_named_paths(key, values.get(key)))
    return found


def _named_paths(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every path that an input names, with its key."""
    if isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _named_paths(f"{key}.{index}", entry)
    elif isinstance(value, dict):
        for name in ("path", "blend", "data"):
            yield from _named_paths(f"{key}.{name}", value.get(name))
    elif value not in (None, ""):
        yield key, value


def changes(
    cfg: StageConfig, stored: Mapping[str, Any], *, resuming: bool = False
) -> dict[str, tuple[Any, Any]]:
    """Return keys that decide a result and are others now: key -> value then and now.

    Args:
        cfg: the config now.
        stored: the flat config then, whole or as ``config_values`` gave it.
        resuming: pass over what may change when unfinished work is started again.
    """
    known = meanings(type(cfg))
    before, now = ({k: v for k, v in x.items() if v != {}} for x in (stored, flatten(asdict(cfg))))
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*before, *now}):
        name, meaning = _find(known, key)
        if meaning is None:
            if before[key] != REMOVED.get(key, _NOTHING):
                found[key] = (before[key], None)
            continue
        if meaning.role == "input":
            beside = _beside_paths(before.get(key)), _beside_paths(now.get(key))
            if beside[0] != beside[1]:
                found[key] = beside
            continue
        if meaning.role not in ("counts", "added") or (
            resuming and _may_change(meaning, name, key)
        ):
            continue
        default = meaning.default if name == key else None
        then, value = (meaning.plain(x.get(key, default)) for x in (before, now))
        if then != value:
            found[key] = (then, value)
    return found


def _may_change(meaning: Meaning, name: str, key: str) -> bool:
    rest = key[len(name) :].lstrip(".")
    return any(rest.startswith(beginning) for beginning in meaning.may_change)


def said(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Return changes in words."""
    return ", ".join(f"{key} {then} -> {now}" for key, (then, now) in changed.items())
