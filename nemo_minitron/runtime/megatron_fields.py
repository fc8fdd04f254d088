"""Values of the section ``megatron:`` against the dataclasses of the installed Megatron-Core.

Imports Megatron's configuration (not its models), which takes seconds: only where the section holds
something.
"""

import dataclasses
import difflib
import functools
import importlib.metadata
import math
import types
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from nemo_minitron.runtime.extensions import before_megatron

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "fp8": torch.uint8,  # as Megatron-LM's arguments say it
}
_PLAIN = {bool: "true or false", int: "an integer", float: "a finite number", str: "text"}
"""Plain types, and what a value of each is in words."""


@functools.cache
def dataclass_of(part: str) -> type:
    """Return Megatron's dataclass of a part of the section."""
    before_megatron()
    if part == "transformer":
        from megatron.core.transformer.transformer_config import TransformerConfig

        return TransformerConfig
    if part == "ddp":
        from megatron.core.distributed import DistributedDataParallelConfig

        return DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig

    return OptimizerConfig


@functools.cache
def annotations(part: str) -> dict[str, Any]:
    """Return field -> annotation; a field whose default is None may be None whatever it says."""
    cls = dataclass_of(part)
    hints = get_type_hints(cls)
    return {
        f.name: hints[f.name] | None if f.default is None else hints[f.name]
        for f in dataclasses.fields(cls)
    }


def resolved(part: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return field -> the value that Megatron's dataclass takes: enums and dtypes by name.

    Args:
        part: ``transformer``, ``ddp`` or ``optimizer``.
        values: field -> plain value, as in the config.

    Raises:
        ValueError: no such field (names the nearest one), or a value of another type.
    """
    known = annotations(part)
    found = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(_unknown(part, name))
        try:
            found[name] = _conform(known[name], value)
        except TypeError as error:
            raise ValueError(f"megatron.{part}.{name}={value} must be {error}") from None
    return found


def _unknown(part: str, name: str) -> str:
    cls, version = dataclass_of(part).__name__, importlib.metadata.version("megatron-core")
    message = (
        f"megatron.{part}.{name}: {cls} of the installed megatron-core {version} has no {name}"
    )
    for other in ("transformer", "ddp", "optimizer"):
        if name in annotations(other):
            return f"{message}; it is megatron.{other}.{name}"
    near = difflib.get_close_matches(name, annotations(part), n=1, cutoff=0.6)
    return f"{message}; did you mean megatron.{part}.{near[0]}?" if near else message


def _conform(annotation: Any, value: Any) -> Any:
    """Return the value as the annotation has it.

    Raises:
        TypeError: its text says what the value must be.
    """
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return _one_of(annotation, value)
    if annotation is types.NoneType and value is None:
        return None
    if origin is Literal and value in get_args(annotation) and not isinstance(value, bool):
        return value
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        return _sequence(origin, get_args(annotation), list(value))
    if annotation is list and isinstance(value, list):
        return value
    if annotation is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if annotation in _PLAIN and annotation is not float and type(value) is annotation:
        return value
    if annotation is torch.dtype and value in _DTYPES:
        return _DTYPES[value]
    is_enum = isinstance(annotation, type) and issubclass(annotation, Enum)
    if is_enum and value in annotation.__members__:
        return annotation[value]
    raise TypeError(expected(annotation))


def _one_of(annotation: object, value: object) -> Any:
    # An exact plain type first: 1 is an int where int and float are both allowed.
    choices = sorted(get_args(annotation), key=lambda choice: type(value) is not choice)
    for choice in choices:
        try:
            return _conform(choice, value)
        except TypeError:
            continue
    raise TypeError(expected(annotation))


def _sequence(origin: Callable[[Any], Any], items: tuple[Any, ...], value: list[Any]) -> Any:
    if origin is list or items[-1] is Ellipsis:
        return origin([_conform(items[0], item) for item in value])
    if len(items) != len(value):
        raise TypeError(f"a list of {len(items)}")
    return origin([_conform(kind, item) for kind, item in zip(items, value, strict=True)])


def expected(annotation: object) -> str:
    """Describe in words the values that an annotation allows."""
    origin, items = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        choices = [expected(item) for item in items if item is not types.NoneType]
        null = ["null"] if types.NoneType in items else []
        return " or ".join(dict.fromkeys([*choices, *null]))
    if origin is Literal:
        return " or ".join(map(str, items))
    if origin in (list, tuple):
        return f"a list of {expected(items[0])}" if items else "a list"
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    if annotation is torch.dtype:
        return " or ".join(_DTYPES)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " or ".join(annotation.__members__)
    return "left out: it takes an object that Python code alone can make"
