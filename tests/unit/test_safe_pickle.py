"""Pickles, files of torch.save and archives that say more, or something else, than they hold."""

import argparse
import enum
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from nemo_minitron.checkpoint.parts import Part, archive_parts
from nemo_minitron.checkpoint.safe_pickle import PICKLE_ERRORS, read_metadata, read_torch_file


def whole(path: Path) -> Part:
    return Part(path, 0, path.stat().st_size)


def torch_file(path: Path, text: bytes) -> Part:
    """A file of torch.save that holds a pickle alone."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", text)
    return whole(path)


def changing(module: str, name: str, made: bytes = b"") -> bytes:
    """A pickle that sets an attribute of what a name stands for, or of what calling it gives."""
    found = f"c{module}\n{name}\n".encode() + made
    return b"\x80\x02" + found + b"N}X\x05\x00\x00\x00addedK\x01s\x86b."


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (argparse.Namespace, changing("argparse", "Namespace")),
        (torch._utils._rebuild_tensor_v2, changing("torch._utils", "_rebuild_tensor_v2")),
        (
            _MEM_FORMAT_ENCODING(0),
            changing(_MEM_FORMAT_ENCODING.__module__, "_MEM_FORMAT_ENCODING", b"K\x00\x85R"),
        ),
    ],
)
def test_nothing_of_this_process_is_changed(tmp_path: Path, target: object, text: bytes) -> None:
    if isinstance(target, enum.Enum):
        (tmp_path / ".metadata").write_bytes(text)
        read: Callable[[], object] = partial(read_metadata, whole(tmp_path / ".metadata"))
    else:
        read = partial(read_torch_file, torch_file(tmp_path / "a.pt", text))
    with pytest.raises(pickle.UnpicklingError, match=r"it changes .*, which is not its own"):
        read()
    assert not hasattr(target, "added")


def test_one_dictionary_many_times(tmp_path: Path) -> None:
    """Forty levels of two references each stand for 10 ** 12 dictionaries."""
    value: dict[str, object] = {"tensor": torch.arange(3)}
    for _ in range(40):
        value = {"a": value, "b": value}
    torch.save(value, tmp_path / "a.pt")
    found = read_torch_file(whole(tmp_path / "a.pt"))
    for _ in range(40):
        assert found["a"] is found["b"]
        found = found["a"]
    assert found["tensor"].read().tolist() == [0, 1, 2]


def test_a_dictionary_inside_itself(tmp_path: Path) -> None:
    value: dict[str, object] = {}
    value["a"] = value
    torch.save(value, tmp_path / "a.pt")
    with pytest.raises(PICKLE_ERRORS):
        read_torch_file(whole(tmp_path / "a.pt"))


def test_another_byte_order(tmp_path: Path) -> None:
    values = torch.arange(6, dtype=torch.float32)
    other = {"little": "big", "big": "little"}[sys.byteorder]
    torch.save({"w": values}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as archive,
        zipfile.ZipFile(tmp_path / "b.pt", "w") as turned,
    ):
        for name in archive.namelist():
            content = archive.read(name)
            if name.endswith("/byteorder"):
                content = other.encode()
            elif name.endswith("/data/0"):
                content = np.frombuffer(content, np.float32).byteswap().tobytes()
            turned.writestr(name, content)
    assert torch.equal(torch.load(tmp_path / "b.pt")["w"], values)
    with pytest.raises(ValueError, match=f"not in this machine's order, {sys.byteorder}"):
        read_torch_file(whole(tmp_path / "b.pt"))


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_archives_without_their_zeros(tmp_path: Path, form: str) -> None:
    """Bytes that follow one another there are apart in the file."""
    with (tmp_path / "weights").open("wb") as file:
        file.write(b"a" * 4096)
        file.seek(1 << 20)
        file.write(b"b" * 4096)
    command = ["tar", "--sparse", f"--format={form}", "-cf", "a.nemo", "weights"]
    if subprocess.run(command, cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("needs GNU tar")
    with tarfile.open(tmp_path / "a.nemo") as archive:
        if not archive.getmember("weights").issparse():
            pytest.skip("needs a file system with holes")
    with pytest.raises(ValueError, match=r"a\.nemo holds weights without its zeros.*; unpack it"):
        archive_parts(tmp_path / "a.nemo")


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
@pytest.mark.parametrize("size", [8 << 30, 1 << 60, 1 << 63])
def test_archives_that_declare_too_much(tmp_path: Path, kind: bytes, size: int) -> None:
    member = tarfile.TarInfo("x")
    member.type, member.size = kind, size
    (tmp_path / "a.nemo").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(ValueError, match=r"a\.nemo is not a tar archive, or is damaged"):
        archive_parts(tmp_path / "a.nemo")
