"""Imports the real Transformer Engine where neither its kernels nor a GPU are.

Only what is compiled is made up: the module ``transformer_engine_torch``, of which Transformer
Engine takes enumerations as it is imported. Its classes, and Megatron's on top of them, are real.
They refuse to be built without CUDA, so ``cuda()`` says that there is some while they are built.
"""

import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

_CUDNN = 91900  # what ``get_cudnn_version`` answers: 9.19.0
_HOPPER = (9, 0)
# Imported for exports to ONNX, which nothing here does.
_EXPORT_ONLY = ("onnxscript",)


class _Enumeration(type):
    """Members appear, and get the next number, as they are asked for."""

    made: dict[str, int]

    def __getattr__(cls, name: str) -> Any:
        members = cls.made
        if name == "__members__":
            return members
        if name.startswith("__"):
            raise AttributeError(name)
        return members.setdefault(name, len(members))


class _Compiled(types.ModuleType):
    """A module where every name is an enumeration, or a function that says a version."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Enumeration(name, (), {"made": {}, "__new__": lambda cls, *args, **kwargs: _CUDNN})
        setattr(self, name, made)
        return made


@contextmanager
def cuda() -> Iterator[None]:
    """Torch says that there is a GPU: as Transformer Engine's and our modules are built."""
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=_HOPPER),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),
    ):
        yield


def import_transformer_engine() -> None:
    """Import it and everything of this package that asks whether it is there."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # it then looks for no library
    sys.modules["transformer_engine_torch"] = _Compiled("transformer_engine_torch")
    for name in _EXPORT_ONLY:
        sys.modules.setdefault(name, mock.MagicMock())
    spec = importlib.util.find_spec("transformer_engine")
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["transformer_engine"] = package
    from transformer_engine import common

    common.load_framework_extension = lambda framework: None
    with cuda():
        spec.loader.exec_module(package)
        import nemo_minitron.models.build  # noqa: F401
