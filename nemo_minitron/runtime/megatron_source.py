"""Names, types and defaults of Megatron-Core's settings, read in its source.

For what has to know the fields of the installed version and must not import Megatron, which imports
torch: the command line that translates arguments of other programs. ``megatron_fields.py`` checks
values against the dataclasses themselves.
"""

import ast
import functools
import importlib.metadata
import importlib.util
from pathlib import Path

_SOURCES = {
    "transformer": (
        ("model_parallel_config.py", "ModelParallelConfig"),
        ("transformer/transformer_config.py", "TransformerConfig"),
    ),
    "ddp": (("distributed/distributed_data_parallel_config.py", "DistributedDataParallelConfig"),),
    "optimizer": (("optimizer/optimizer_config.py", "OptimizerConfig"),),
}
"""Part of the section ``megatron:`` -> files of Megatron-Core and the classes of its fields."""


@functools.cache
def fields_in_source(part: str) -> dict[str, tuple[str, object]]:
    """Return field -> annotation and default, read in the source of the installed Megatron-Core.

    Nothing of it is imported, which would import torch. A default that is no literal is ``...``;
    without Megatron-Core there is no field.
    """
    spec = importlib.util.find_spec("megatron")
    found: dict[str, tuple[str, object]] = {}
    for file, name in _SOURCES[part]:
        places = [Path(p) / "core" / file for p in (spec and spec.submodule_search_locations) or ()]
        for path in [p for p in places if p.is_file()][:1]:
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and node.name == name:
                    found |= _annotated(node)
    return found


def _annotated(cls: ast.ClassDef) -> dict[str, tuple[str, object]]:
    found: dict[str, tuple[str, object]] = {}
    for node in cls.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            default: object = ...
            if isinstance(node.value, ast.Constant):
                default = node.value.value
            elif isinstance(node.value, ast.Attribute):  # an enum or a dtype
                default = node.value.attr
            found[node.target.id] = (ast.unparse(node.annotation), default)
    return found


def installed_version() -> str:
    """Return which Megatron-Core is installed, for messages."""
    try:
        return importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return "(none)"
