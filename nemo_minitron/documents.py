"""Reads JSON and YAML that anybody may have written: bounded in size, in depth and in aliases.

A few hundred bytes of YAML can stand for gigabytes, since an alias repeats a whole part, and text
nested a hundred thousand deep ends Python's parsers. Every reader of this package goes through
here, so that each kind of wrong text is one ``ValueError`` that says what is wrong with it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

JsonObject = dict[str, Any]
"""A JSON object or a YAML mapping, of which only its reader knows what it holds."""
LARGEST_JSON = 64 << 20
"""Bytes; the largest files that are read as JSON, vocabularies of tokenizers, have half of that."""
LARGEST_YAML = 1 << 20
"""Bytes; configs have a few thousand."""
DEEPEST = 100
"""Maximum depth of nested lists and mappings."""
_MOST_VALUES = 50_000
"""Maximum number of values of a YAML document, an alias counting as all that it repeats."""
_TOO_DEEP = f"it is nested more than {DEEPEST} deep"
_TOO_MANY = f"it stands for more than {_MOST_VALUES} values"


class TooMuchError(ValueError):
    """A text that is larger, deeper or stands for more values than any that is meant to be read."""


def json_value(text: str | bytes) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: it is no JSON, or nested too deep; the message names no file.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise TooMuchError(_TOO_DEEP) from None
    opened = text.count("[") + text.count("{") if isinstance(text, str) else _opened(text)
    if opened > DEEPEST:
        _check_depth(value)
    return value


def _opened(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{")


def _check_depth(value: object) -> None:
    level: list[Any] = [value]
    for _ in range(DEEPEST + 1):
        inside = [item.values() if isinstance(item, dict) else item for item in level]
        level = [item for items in inside for item in items if isinstance(item, dict | list)]
        if not level:
            return
    raise TooMuchError(_TOO_DEEP)


def _bounded(path: Path, largest: int) -> bytes:
    with path.open("rb") as file:
        text = file.read(largest + 1)
    if len(text) > largest:
        raise ValueError(f"it is larger than {largest >> 20} MiB")
    return text


def read_json(path: Path, largest: int = LARGEST_JSON) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        largest: bytes that it may have.

    Raises:
        ValueError: it cannot be read, is too large, no JSON, or nested too deep; names the file.
    """
    try:
        return json_value(_bounded(path, largest))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_json_object(path: Path, largest: int = LARGEST_JSON) -> dict[str, Any]:
    """Read a JSON file that must hold an object.

    Args:
        path: the file.
        largest: bytes that it may have.

    Raises:
        ValueError: as ``read_json``, or it holds something else.
    """
    value = read_json(path, largest)
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return value


def check_kinds(path: Path, values: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    """Refuse values of other kinds than whoever wrote the file gives them.

    Args:
        path: the file, for the message.
        values: what it holds.
        kinds: key -> type of its value; keys that are missing are left to the caller.

    Raises:
        ValueError: names the file, the key and what stands there.
    """
    for key, kind in kinds.items():
        if key in values and not isinstance(values[key], kind):
            found = type(values[key]).__name__
            raise ValueError(f"{path} is damaged: {key} is of type {found}, not {kind.__name__}")


# What PyYAML raises for text that is YAML but gives no value, such as "!!timestamp x".
_YAML_ERRORS = (
    yaml.YAMLError,
    AttributeError,
    IndexError,
    KeyError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
)


class _Loader(yaml.SafeLoader):
    """PyYAML's loader of plain values, with bounds."""

    def __init__(self, text: str | bytes) -> None:
        super().__init__(text)
        self._depth = 0
        self._composed = 0
        self._values: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> Any:
        """Return a part of the document; counted, since an alias gives the same part once more."""
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._values:
                raise TooMuchError("an alias stands inside the part that it repeats")
            return node
        self._composed += 1
        if self._depth > DEEPEST:
            raise TooMuchError(_TOO_DEEP)
        if self._composed > _MOST_VALUES:
            raise TooMuchError(_TOO_MANY)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        inside = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for item in inside for part in (item if isinstance(item, tuple) else (item,))]
        count = 1 + sum(self._values[id(part)] for part in parts)
        if count > _MOST_VALUES:
            raise TooMuchError(_TOO_MANY)
        self._values[id(node)] = count
        return node


def yaml_value(text: str | bytes) -> Any:
    """Parse a YAML text into plain values.

    Raises:
        ValueError: it is no YAML, names classes, is too large, nested too deep, or stands for too
            many values; the message names no file.
    """
    if len(text) > LARGEST_YAML:
        raise ValueError(f"it is larger than {LARGEST_YAML >> 20} MiB")
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except RecursionError:
        raise TooMuchError(_TOO_DEEP) from None
    except TooMuchError:
        raise
    except _YAML_ERRORS as error:
        raise ValueError(" ".join(f"it is not plain YAML: {error}".split())) from error


def read_yaml(path: Path) -> Any:
    """Read a YAML file as plain values.

    Raises:
        ValueError: as ``yaml_value``, or it cannot be read; names the file.
    """
    try:
        return yaml_value(_bounded(path, LARGEST_YAML))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def refuse_too_much(path: Path) -> None:
    """Refuse a YAML file that another reader is going to read, and that would keep it busy.

    What else may be wrong with it is left to that reader.

    Raises:
        ValueError: names the file and what there is too much of.
    """
    try:
        yaml_value(path.read_bytes())
    except TooMuchError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except (OSError, ValueError):
        return


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that must hold a mapping.

    Raises:
        ValueError: as ``read_yaml``, or it holds something else.
    """
    value = read_yaml(path)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{path} must hold a mapping of names")
    return value
