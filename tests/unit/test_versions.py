"""Installed versions against the tested ones, and the script that tries other ones."""

import logging
import re
from collections import Counter
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from nemo_minitron import cli
from nemo_minitron.runtime import extensions, versions
from scripts import smoke_versions
from tests.unit.test_repo import REPO, tomllib

RANGE = Requirement("megatron-core>=0.16.1,<0.20")


def installed(monkeypatch, **found: "str | None") -> None:
    """Let packages have these versions; None: not installed."""
    known = {name.replace("_", "-"): version for name, version in found.items()}
    ask = versions.version_of
    monkeypatch.setattr(
        versions, "version_of", lambda name: known[name] if name in known else ask(name)
    )
    monkeypatch.setattr(versions, "requirements", lambda: [RANGE])


@pytest.mark.parametrize("version", ["0.16.1", "0.18.0", "0.19.2", "0.19.0rc0", "0.18.0+d0b3b775"])
def test_a_tested_megatron_says_nothing(monkeypatch, caplog, version):
    installed(monkeypatch, megatron_core=version)
    versions.check_megatron()
    assert not caplog.records


@pytest.mark.parametrize("version", ["0.20.0", "0.20.0rc1", "0.21.1", "1.0"])
def test_a_newer_megatron_is_warned_of(monkeypatch, caplog, version):
    installed(monkeypatch, megatron_core=version)
    with caplog.at_level(logging.WARNING):
        versions.check_megatron()
    (record,) = caplog.records
    assert f"megatron-core {version} is newer" in record.message
    assert "pip install 'megatron-core<0.20,>=0.16.1'" in record.message


@pytest.mark.parametrize("version", ["0.16.0", "0.15.3", "0.16.1rc0"])
def test_an_older_megatron_is_refused(monkeypatch, version):
    installed(monkeypatch, megatron_core=version)
    message = rf"megatron-core {version} is installed, and <0.20,>=0.16.1 is needed: pip install"
    with pytest.raises(ValueError, match=message):
        versions.check_megatron()


def test_no_megatron_is_refused(monkeypatch):
    installed(monkeypatch, megatron_core=None)
    with pytest.raises(ValueError, match="megatron-core is not installed, and this stage needs it"):
        versions.check_megatron()


def test_a_stage_that_runs_a_model_looks_first(monkeypatch, capsys, tmp_path):
    installed(monkeypatch, megatron_core="0.16.0")
    line = ["evaluate", f"checkpoint={tmp_path}/none", f"output_dir={tmp_path}/out"]
    assert cli.main([*line, f"data.path={tmp_path}"]) == 2
    assert "megatron-core 0.16.0 is installed" in capsys.readouterr().err


def test_the_table_names_what_does_not_fit(monkeypatch, capsys):
    monkeypatch.setattr(extensions, "before_megatron", lambda: None)
    monkeypatch.setattr(versions, "PARTS", {"a part": "nemo_minitron.no_such", "another": "json"})
    installed(monkeypatch, megatron_core="0.20.0", apex="0.1", transformer_engine=None)
    assert versions.main() == 1
    out = capsys.readouterr()
    rows = {cells[0].strip(): [c.strip() for c in cells[1:]] for cells in table(out.out)}
    assert rows["megatron-core"] == ["<0.20,>=0.16.1", "0.20.0", "no"]
    assert rows["apex"] == ["used if there", "0.1", "yes"]
    assert rows["Transformer Engine"] == ["used if there", "not installed", "yes"]
    missing = "ModuleNotFoundError: No module named 'nemo_minitron.no_such'"
    assert rows["a part"] == ["imports", missing, "no"]
    assert rows["another"] == ["imports", "yes", "yes"]
    assert rows["Python"][2] == "yes"
    assert "do not fit: megatron-core <0.20,>=0.16.1: 0.20.0; a part imports: Module" in out.err


def table(text: str) -> "list[list[str]]":
    return [line.strip("│┃ ").split("│") for line in text.splitlines() if "│" in line]


def test_a_broken_transformer_engine_is_a_line_of_the_table(monkeypatch):
    def broken() -> None:
        raise ValueError("Transformer Engine is installed but does not work")

    monkeypatch.setattr(extensions, "before_megatron", broken)
    *_, last = versions.findings()
    assert last.name == "Transformer Engine"
    assert not last.fits


def test_this_environment_fits(monkeypatch):
    """Versions alone: what is imported as a proof, other tests import in earnest."""
    monkeypatch.setattr(versions, "PARTS", {})
    assert [f for f in versions.findings() if not f.fits] == []


@pytest.mark.parametrize("module", versions.PARTS.values())
def test_the_parts_are_there(module):
    top, *inner = module.split(".")
    spec = find_spec(top)
    assert spec is not None
    folders = [Path(folder, *inner) for folder in spec.submodule_search_locations or ()]
    assert any(f.with_suffix(".py").exists() or (f / "__init__.py").exists() for f in folders)


def test_without_metadata_nothing_is_compared(monkeypatch):
    def nothing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", nothing)
    monkeypatch.setattr(extensions, "version", nothing)
    assert versions.requirements() == []
    assert not next(versions.findings()).fits


# ------------------------------------------------------------------------------ container images

OF_THE_IMAGE = {"torch", "megatron-core", "transformers", "tokenizers", "safetensors", "numpy"}


def lines_of(path: Path) -> "dict[str, Requirement]":
    lines = [line for line in path.read_text().splitlines() if line and line[0] != "#"]
    found = [Requirement(line) for line in lines]
    return {r.name.lower().replace("_", "-"): r for r in found}


def test_the_image_gets_what_the_package_needs_and_keeps_its_own():
    ours = lines_of(REPO / "docker" / "requirements.txt")
    assert not {*OF_THE_IMAGE, "transformer-engine", "apex", "triton", "nvidia-modelopt"} & {*ours}
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"]:
        needed = Requirement(text)
        name = needed.name.lower().replace("_", "-")
        assert name in OF_THE_IMAGE or ours[name].specifier == needed.specifier, text


def test_the_image_gets_what_nemo_imports():
    """The lines for NeMo are its own requirements, as far as they are among them."""
    ours = lines_of(REPO / "docker" / "requirements.txt")
    for text in metadata.requires("nemo_toolkit") or []:
        needed = Requirement(text)
        if re.search("extra == ['\"]common['\"]", str(needed.marker)) and "nv_one" in needed.name:
            assert ours[needed.name.replace("_", "-")].specifier == needed.specifier


# ----------------------------------------------------------------------------------------- smoke


def test_smoke_reads_what_pytest_reports(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase name="good"/><testcase name="bad"><failure/></testcase>'
        '<testcase name="broken"><error/></testcase><testcase name="left"><skipped/></testcase>'
        "</testsuite></testsuites>"
    )
    counts, seconds, failed = smoke_versions._read(report, 3.0)
    assert counts == Counter(passed=1, failed=1, error=1, skipped=1)
    assert failed == ["bad", "broken"]
    outcome = smoke_versions.Outcome("0.18.2", "tests/x.py", counts, seconds, failed)
    text = smoke_versions.table([outcome])
    assert "| 0.18.2 | `tests/x.py` | 1 | 1 | 1 | 1 | 3 |" in text
    assert "failed on 0.18.2: tests/x.py::bad" in text


def test_smoke_does_not_take_one_release_for_another(tmp_path):
    for version, said in (("0.18.2", "0.18.2"), ("0.17.1", "0.19.2")):
        core = tmp_path / version / "megatron" / "core"
        core.mkdir(parents=True)
        (core / "__init__.py").write_text(f"__version__ = {said!r}\n")
    smoke_versions.check_loaded("0.18.2", tmp_path / "0.18.2")
    with pytest.raises(SystemExit, match=r"0\.17\.1 was to be imported, and 0\.19\.2 of"):
        smoke_versions.check_loaded("0.17.1", tmp_path / "0.17.1")
