"""List the stages and their keys and register them with Hydra. Reads no config file."""

import ast
import dataclasses
import functools
import inspect
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

import nemo_minitron
from nemo_minitron.config.axes import targets
from nemo_minitron.config.base import WORDS
from nemo_minitron.config.pipeline import SubmitConfig
from nemo_minitron.config.stages import STAGE_CONFIGS

# Everything with keys of its own.
COMMANDS: dict[str, type] = {**STAGE_CONFIGS, "submit": SubmitConfig}

# Stages that run a model and so may need more than one rank.
RANKED_STAGES = frozenset(
    stage for stage, config in STAGE_CONFIGS.items() if "parallel" in config.__dataclass_fields__
)


@dataclass(frozen=True)
class Key:
    """One key of a stage: dotted name, type as written, default, meaning, words it can be."""

    name: str
    type: str
    default: Any
    doc: str
    words: str = ""


def conf_dir() -> Path:
    """Folder of the shipped YAML files: inside an installed package, beside it in a checkout."""
    package = Path(nemo_minitron.__file__).parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def flatten(value: object, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries -> dotted keys."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def schema_name(stage: str) -> str:
    """Name of the stage's dataclass in Hydra's ConfigStore, used in ``conf/<stage>.yaml``."""
    return f"{stage}_schema"


def register_schema(stage: str) -> None:
    """Put the dataclass of a stage into Hydra's ConfigStore (idempotent)."""
    from hydra.core.config_store import ConfigStore

    name, node = schema_name(stage), COMMANDS[stage]
    ConfigStore.instance().store(name=name, node=node, provider="nemo_minitron")


def summary(stage: str) -> str:
    """Return the first line of the stage dataclass's docstring."""
    return (COMMANDS[stage].__doc__ or "").strip().splitlines()[0]


def keys(cls: type, prefix: str = "") -> Iterator[Key]:
    """Yield the keys of a config dataclass, nested ones as ``section.key``, in order."""
    yield from _keys(cls, None, prefix)


def _keys(cls: type, instance: object, prefix: str) -> Iterator[Key]:
    docs = _docs(cls)
    for field in dataclasses.fields(cls):
        default = getattr(instance, field.name) if instance is not None else default_of(field)
        name = prefix + field.name
        if dataclasses.is_dataclass(default):
            yield from _keys(type(default), default, name + ".")
        elif isinstance(default, dict) and default:  # sizes after pruning
            for size, doc in targets().items():
                yield Key(f"{name}.{size}", "int | None", default[size], doc)
        else:
            words = " | ".join(field.metadata.get(WORDS, ()))
            yield Key(name, _type_name(field.type), default, docs.get(field.name, ""), words)


def default_of(field: "dataclasses.Field[Any]") -> Any:
    """Default of a field; ``MISSING`` where it must be given."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return MISSING if field.default is dataclasses.MISSING else field.default


def _type_name(annotation: object) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


@functools.cache
def _docs(cls: type) -> dict[str, str]:
    """Attribute docstrings (the string under each field), which Python itself throws away."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = _class_body(base)
        for node, following in itertools.pairwise(body):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                value = following.value if isinstance(following, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    docs[node.target.id] = " ".join(value.value.split())
    return docs


def _class_body(cls: type) -> list[ast.stmt]:
    tree = _module_tree(inspect.getsource(sys.modules[cls.__module__]))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == cls.__name__:
            return node.body
    return []


@functools.cache
def _module_tree(source: str) -> ast.Module:
    return ast.parse(source)
