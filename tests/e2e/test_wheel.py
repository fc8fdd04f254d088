"""The package as a wheel, installed where only light packages are, away from the repository.

``MINITRON_WHEEL=folder`` takes the wheel that is there: `make release-check`.
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from nemo_minitron.config.stages import STAGE_CONFIGS
from tests.helpers.snippets import snippets

REPO = Path(__file__).parents[2]
SOURCES = (
    "nemo_minitron",
    "conf",
    "launch",
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "LICENSE",
)
# All that help, --cfg job and refusals may need. A download would cost the test a network.
LIGHT = ("hydra-core", "omegaconf", "antlr4-python3-runtime", "PyYAML", "packaging")


def _run(*command: "str | Path", **options) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=100, **options
    )


def _wheel(folder: Path) -> Path:
    """The wheel to test, or one of a copy of the sources, so that none appear in the repository."""
    if given := os.environ.get("MINITRON_WHEEL"):
        (wheel,) = Path(given).glob("nemo_minitron-*.whl")
        return wheel
    source = folder / "source"
    source.mkdir()
    for name in (*SOURCES, "README.md", "CHANGELOG.md"):
        if (REPO / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(REPO / name, source / name, ignore=ignore)
        else:
            shutil.copy(REPO / name, source)
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
    built = _run(*pip, "--wheel-dir", folder, source)
    assert built.returncode == 0, built.stderr
    shutil.rmtree(source)
    (wheel,) = folder.glob("nemo_minitron-*.whl")
    return wheel


def _copy_distribution(name: str, site: Path) -> None:
    """Install what is installed here over there, file by file as its record lists them."""
    for file in importlib.metadata.distribution(name).files or ():
        if ".." not in file.parts and file.suffix != ".pyc":
            target = site / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(file.locate()), target)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return _wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory, wheel):
    """``bin/minitron`` of a fresh environment."""
    home = tmp_path_factory.mktemp("installed") / "env"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    done = _run(*pip, wheel)
    assert done.returncode == 0, done.stderr
    (site,) = home.glob("lib/python*/site-packages")
    for name in LIGHT:
        _copy_distribution(name, site)
    return home / "bin"


@pytest.fixture
def minitron(installed, tmp_path):
    """Run it in an empty folder, with nothing of this environment in reach."""
    clean = {key: os.environ[key] for key in ("HOME", "LANG") if key in os.environ}

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return _run(installed / "minitron", *arguments, cwd=tmp_path, env=clean)

    return run


def test_config_files_come_with_the_wheel(installed, tmp_path):
    code = (
        "import json, sys; from nemo_minitron.config.schema import conf_dir; "
        "print(json.dumps([str(conf_dir()), sorted(p.relative_to(conf_dir()).as_posix() "
        "for p in conf_dir().rglob('*.yaml'))]))"
    )
    done = _run(installed / "python", "-I", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder, names = json.loads(done.stdout)
    assert Path(folder).is_relative_to(installed.parent)
    conf = REPO / "conf"
    assert names == sorted(p.relative_to(conf).as_posix() for p in conf.rglob("*.yaml"))


def test_help_and_version(minitron):
    assert "stages:" in minitron("--help").stdout
    declared = importlib.metadata.version("nemo_minitron")
    assert minitron("--version").stdout.strip() == declared
    assert "pruning.target.hidden_size=null" in minitron("prune", "--help").stdout


@pytest.mark.parametrize("stage", STAGE_CONFIGS)
def test_configs_compose(minitron, stage):
    more = ("experiment=quickstart",) if stage == "pipeline" else ()
    done = minitron(stage, *more, "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert "output_dir:" in done.stdout


def test_config_groups_compose(minitron):
    done = minitron("prune", "pruning=llama31_minitron_4b_width", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert "hidden_size: 3072" in done.stdout


def test_bad_input_is_refused(minitron, tmp_path):
    done = minitron("prune", "pruning.target.hiden_size=1")
    assert done.returncode == 2
    assert "did you mean pruning.target.hidden_size?" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.timeout(300)
def test_the_page_of_the_interface_as_a_new_user_tries_it(wheel, tmp_path):
    """Every block of docs/api.md, with the packages that are here and the wheel before them."""
    site, folder = tmp_path / "site", tmp_path / "empty"
    folder.mkdir()
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site)
    assert _run(*pip, wheel).returncode == 0
    env = {**os.environ, "PYTHONPATH": str(site)}
    told = "import nemo_minitron; print(nemo_minitron.__file__)"
    said = _run(sys.executable, "-c", told, cwd=folder, env=env).stdout
    assert Path(said.strip()).is_relative_to(site)
    blocks = snippets(REPO / "docs" / "api.md")
    command = next(n for n, block in enumerate(blocks) if block.kind == "run")
    scripts = blocks[:command], blocks[command + 1 :]
    for before in (True, False):
        code = "\n".join(block.code for block in scripts[not before])
        done = _run(sys.executable, "-c", code, cwd=folder, env=env)
        assert done.returncode == 0, done.stderr
        for line in blocks[command].lines if before else ():
            _, *words = line.split()
            done = _run(sys.executable, "-m", "nemo_minitron", *words, cwd=folder, env=env)
            assert done.returncode == 0, done.stderr
    exported = json.loads((folder / "exported" / "config.json").read_text())
    assert (exported["intermediate_size"], exported["num_hidden_layers"]) == (64, 3)
