"""Names, links and sizes that somebody else wrote down, in the readers that take them."""

import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from nemo_minitron.checkpoint.foreign.megatron_sources import find_source
from nemo_minitron.checkpoint.inside import inside, refuse_links_out
from nemo_minitron.checkpoint.manifest import read_manifest
from nemo_minitron.checkpoint.parts import Part
from nemo_minitron.checkpoint.safe_pickle import PICKLE_ERRORS, read_metadata
from nemo_minitron.config.training import DataConfig
from nemo_minitron.data.checks import check_npy
from tests.helpers import sources
from tests.helpers.tiny import LLAMA


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "", "a\0b", "C:\\x", "."])
def test_names_that_lead_out(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="which does not lie in it"):
        inside(tmp_path, name)


def test_links(tmp_path: Path) -> None:
    """One that leads out is refused, one inside the folder or into the hub's cache is not."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "hash").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/hash")
    (snapshot / "real.json").write_text("{}")
    (snapshot / "same.json").symlink_to("real.json")
    assert inside(snapshot, "config.json") == snapshot / "config.json"
    refuse_links_out(snapshot)
    (tmp_path / "secret").write_text("secret")
    (snapshot / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"tokenizer\.json is a link to .*secret, out of its"):
        refuse_links_out(snapshot)
    (snapshot / "folder").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="out of its folder"):
        inside(snapshot, "folder/secret")


@pytest.mark.parametrize("link", ["bridge/tokenizer", "nemo2/context/nemo_tokenizer"])
def test_folders_of_tokenizers(tmp_path: Path, link: str) -> None:
    sources.write_bridge(tmp_path / "bridge", LLAMA)
    sources.write_nemo2(tmp_path / "nemo2", LLAMA)
    (tmp_path / "nemo2" / "weights").mkdir()
    root = tmp_path / link.partition("/")[0]
    assert "tokenizer.json" in find_source(root).tokenizer
    (tmp_path / link).rename(tmp_path / "elsewhere")
    (tmp_path / link).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"tokenizer is a link to .*, out of its folder"):
        find_source(root)


def test_generation_config_of_nemo2(tmp_path: Path) -> None:
    sources.write_nemo2(tmp_path / "nemo2", LLAMA)
    (tmp_path / "nemo2" / "weights").mkdir()
    artifacts = tmp_path / "nemo2" / "context" / "artifacts"
    artifacts.mkdir()
    (artifacts / "generation_config.json").write_text('{"top_p": 0.5}')
    assert find_source(tmp_path / "nemo2").generation == {"top_p": 0.5}
    (artifacts / "generation_config.json").rename(tmp_path / "secret.json")
    (artifacts / "generation_config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(ValueError, match=r"generation_config\.json is a link to .*, out of its"):
        find_source(tmp_path / "nemo2")


def test_manifests(tmp_path: Path) -> None:
    values = {
        "complete": True,
        "id": "0",
        "stage": "import",
        "config_hash": "0",
        "inputs": {},
        "files": {"../x": {"size": 1, "sha256": "0"}},
        "versions": {},
        "created": "now",
    }
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"names '\.\./x', which does not lie in the folder"):
        read_manifest(tmp_path)
    for over in (
        {"inputs": {"a": 1}},
        {"stage": None},
        {"files": {"x": {"size": "1", "sha256": "0"}}},
    ):
        path.write_text(json.dumps({**values, "files": {}, **over}))
        with pytest.raises(ValueError, match="values of other types than a stage writes"):
            read_manifest(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        pickle.PROTO + b"\x04" + pickle.FRAME + struct.pack("<Q", 1 << 60),
        pickle.PROTO + b"\x05" + pickle.BYTEARRAY8 + struct.pack("<Q", 1 << 34) + b".",
        pickle.BINBYTES8 + struct.pack("<Q", 1 << 40) + b".",
        pickle.BINUNICODE8 + struct.pack("<Q", 1 << 40) + b".",
        pickle.LONG4 + struct.pack("<i", (1 << 31) - 1) + b".",
        pickle.NONE + pickle.LONG_BINPUT + struct.pack("<I", (1 << 31)) + b".",
        pickle.NONE + b"p4000000000\n.",
        pickle.dumps({"a": 1}),
    ],
)
def test_sizes_in_pickles(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / ".metadata"
    path.write_bytes(text)
    with pytest.raises(PICKLE_ERRORS):
        read_metadata(Part(path, 0, len(text)))


@pytest.mark.parametrize(
    "header", [b"{'descr': \0", b"{" * 60_000, b"{'descr': '<i8', 'shape': 1}"]
)
def test_headers_of_npy(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "ids.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    with pytest.raises(ValueError, match=r"ids\.npy is not a readable \.npy file"):
        check_npy(path, DataConfig(path=str(path)), None, None)
    np.save(path, np.zeros((2, 4), np.int64))
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"(2, 4)", b"(9, 4)"))
    with pytest.raises(ValueError, match=r"ids\.npy is not a readable \.npy file"):
        check_npy(path, DataConfig(path=str(path)), None, None)
