"""Reads pickles that others wrote without running anything that is in them.

A pickle names functions and calls them, so reading one can run any code. Here only the names of a
short list are looked up. Every other one becomes a stand-in that does nothing but say its name, so
a checkpoint's settings can be read whatever classes lie among them. Where Megatron itself is going
to read a pickle, the other names are refused instead.
"""

import io
import pickle
import struct
import sys
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from types import FunctionType
from typing import IO, Any, ClassVar, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata, planner

from nemo_minitron.checkpoint.lazy import LazyTensor
from nemo_minitron.checkpoint.parts import FileView, Part, read_into
from nemo_minitron.checkpoint.torch_dist_rows import (
    READ_ERRORS,
    in_native_order,
    member_start,
    refuse_packed,
)
from nemo_minitron.documents import JsonObject

PICKLE_ERRORS = (
    *READ_ERRORS,
    AttributeError,
    ImportError,
    IndexError,
    TypeError,
    struct.error,
    zipfile.BadZipFile,
)
"""What a damaged pickle, or torch.save file, raises."""

_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Inert:
    """Stands for an object, class or function that is not looked up; takes whatever it is given."""

    dotted: ClassVar[str] = ""
    """Module and name that the pickle asked for."""

    def __new__(cls, *args: object, **kwargs: object) -> "Inert":
        """Any arguments; they are dropped."""
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __call__(self, *args: object, **kwargs: object) -> "Inert":
        """Accept any arguments, as a function with an unknown name may take them."""
        return Inert()

    def _drop(self, *args: object) -> None:
        """Drop what a pickle puts into an object, a dictionary, a list or a set."""

    __setstate__ = __setitem__ = append = extend = add = _drop


def _inert(module: str, name: str) -> type[Inert]:
    return type(name.rpartition(".")[2], (Inert,), {"dotted": f"{module}.{name}"})


_PLAIN: JsonObject = {
    "argparse.Namespace": Namespace,
    "types.SimpleNamespace": Namespace,
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "torch.Size": torch.Size,
}
# Old versions of torch kept the last two elsewhere.
_OLD = "torch.distributed._shard.sharded_tensor.metadata"
_METADATA: JsonObject = {
    **{
        f"{metadata.__name__}.{name}": getattr(metadata, name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
        )
    },
    f"{_OLD}.TensorProperties": metadata.TensorProperties,
    f"{_OLD}.MEM_FORMAT_ENCODING": metadata._MEM_FORMAT_ENCODING,
    f"{filesystem.__name__}._StorageInfo": filesystem._StorageInfo,
    # Megatron keeps the plans of its ranks, from which the next checkpoint is written.
    **{
        f"{planner.__name__}.{name}": getattr(planner, name)
        for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")
    },
    "torch.serialization._get_layout": lambda name: torch.strided,
}


_build_as_python: Callable[..., None] = pickle._Unpickler.dispatch[pickle.BUILD[0]]


class _Unpickler(pickle._Unpickler):
    """Looks up the names of ``known`` and of torch's dtypes; all others are inert.

    It is Python's own reader in Python: the one in C sets memory aside for whatever number a few
    bytes declare.
    """

    # What Python's reader has, which is not written down for type checkers.
    stack: list[Any]
    memo: dict[int, Any]
    read: Callable[[int], bytes]
    readline: Callable[[], bytes]
    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, text: bytes, known: JsonObject) -> None:
        super().__init__(io.BytesIO(text))
        self._known = {**_PLAIN, **known}
        self._most = len(text)

    def find_class(self, module: str, name: str) -> Any:
        dotted = f"{module}.{name}"
        if dotted in self._known:
            return self._known[dotted]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return self.other(module, name)

    def other(self, module: str, name: str) -> Any:
        """Return the harmless object that stands for an unknown name."""
        return _inert(module, name)

    def _put(self) -> None:
        (index,) = struct.unpack("<I", self.read(4))
        if index > self._most:
            raise pickle.UnpicklingError(f"it numbers an object {index}, more than it has bytes")
        self.memo[index] = self.stack[-1]

    def _put_text(self) -> None:
        index = int(self.readline()[:-1])
        if not 0 <= index <= self._most:
            raise pickle.UnpicklingError(f"it numbers an object {index}, more than it has bytes")
        self.memo[index] = self.stack[-1]

    def _no_bytearray(self) -> None:
        raise pickle.UnpicklingError("it holds a bytearray, which no checkpoint has")

    def _build(self) -> None:
        # Instances are the pickle's own; classes and members of an Enum belong to the process.
        if isinstance(self.stack[-2], type | FunctionType | Enum):
            raise pickle.UnpicklingError(f"it changes {self.stack[-2]}, which is not its own")
        _build_as_python(self)

    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.LONG_BINPUT[0]] = _put
    dispatch[pickle.PUT[0]] = _put_text
    dispatch[pickle.BYTEARRAY8[0]] = _no_bytearray


class _Strict(_Unpickler):
    """Refuses the names that are not known."""

    def other(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, which no checkpoint needs and which could run anything"
        )


def read_metadata(part: Part, *, strict: bool = False) -> metadata.Metadata:
    """Return the ``.metadata`` file of a torch.distributed.checkpoint folder.

    Args:
        part: the file.
        strict: refuse names that a checkpoint does not need, for what others will read besides.

    Raises:
        OSError, ValueError, ...: one of ``PICKLE_ERRORS``, where the file is damaged.
    """
    found = (_Strict if strict else _Unpickler)(part.read(), _METADATA).load()
    if not isinstance(found, metadata.Metadata):
        raise ValueError(f"it holds a {type(found).__name__}, not checkpoint metadata")
    if found.storage_meta is None or isinstance(found.storage_meta, Inert):
        found.storage_meta = metadata.StorageMeta()
    return found


@dataclass(frozen=True)
class _Stored:
    """A tensor of a torch.save file: its values are where the storage starts, plus an offset."""

    storage: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _stored(
    storage: tuple[str, torch.dtype],
    offset: int,
    size: Iterable[int],
    stride: Iterable[int],
    *_: object,
) -> _Stored:
    key, dtype = storage
    return _Stored(key, dtype, offset, tuple(size), tuple(stride))


_TENSORS: JsonObject = {
    "torch._utils._rebuild_tensor_v2": _stored,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    **{f"torch.{name}": dtype for name, dtype in _DTYPES.items()},
}


class _TorchUnpickler(_Unpickler):
    """Records where tensors lie instead of reading them."""

    def persistent_load(self, pid: tuple[str, object, str, str, int]) -> tuple[str, torch.dtype]:
        kind, dtype, key, _, _ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise ValueError(f"it holds a {dtype}, which no weight is stored in")
        return key, dtype


def read_torch_file(part: Part) -> Any:
    """Read a file of ``torch.save``; tensors become ``LazyTensor``, unknown objects ``Inert``.

    Only dictionaries are searched for tensors.

    Raises:
        OSError, ValueError, ...: one of ``PICKLE_ERRORS``, where the file is damaged.
    """
    with part.path.open("rb") as file:
        view = FileView(file, part.offset, part.size)
        with zipfile.ZipFile(cast("IO[bytes]", view)) as archive:
            members = {m.filename.partition("/")[2]: m for m in archive.infolist()}
            if "data.pkl" not in members:
                raise ValueError("it is not a file of torch.save, or of a version before 1.6")
            refuse_packed(members.values(), part.size)
            found = _TorchUnpickler(archive.read(members["data.pkl"]), _TENSORS).load()
            native = in_native_order(archive)

        def place(key: str, needed: int) -> int:
            if not native:
                raise ValueError(f"its numbers are not in this machine's order, {sys.byteorder}")
            member = members[f"data/{key}"]
            if needed > member.file_size:
                raise ValueError(f"its member {member.filename} is too short for its tensor")
            return part.offset + member_start(view, member)

        return _with_tensors(found, partial(_lazy, part, place), {})


def _with_tensors(
    value: object, lazy: Callable[[_Stored], LazyTensor], done: dict[int, object]
) -> object:
    if isinstance(value, _Stored):
        return lazy(value)
    if not isinstance(value, dict):
        return value
    # Once each: a few bytes can stand for billions of references to one dictionary.
    if id(value) not in done:
        done[id(value)] = {key: _with_tensors(item, lazy, done) for key, item in value.items()}
    return done[id(value)]


def _lazy(part: Part, place: Callable[[str, int], int], stored: _Stored) -> LazyTensor:
    itemsize = stored.dtype.itemsize
    numbers = (stored.offset, *stored.shape, *stored.stride)
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError(f"it holds a tensor of shape {stored.shape}, stride {stored.stride}")
    steps = zip(stored.shape, stored.stride, strict=True)
    span = 1 + sum((size - 1) * step for size, step in steps)
    if 0 in stored.shape:
        span = 0
    first = stored.offset * itemsize
    start = place(stored.storage, first + span * itemsize) + first

    def read() -> Tensor:
        flat = torch.empty(span, dtype=stored.dtype)
        read_into(part.path, start, flat)
        return flat.as_strided(stored.shape, stored.stride).contiguous()

    def read_rows(first: int, stop: int) -> Tensor:
        flat = torch.empty((stop - first) * stored.stride[0], dtype=stored.dtype)
        read_into(part.path, start + first * stored.stride[0] * itemsize, flat)
        return flat.view(stop - first, *stored.shape[1:])

    plain = torch.empty(stored.shape, dtype=stored.dtype, device="meta")
    contiguous = plain.dim() > 0 and plain.stride() == stored.stride
    return LazyTensor(stored.shape, stored.dtype, read, read_rows if contiguous else None)
