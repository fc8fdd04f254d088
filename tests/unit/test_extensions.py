"""Optional packages that are installed by half: never a stranger's error out of Megatron."""

import ast
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from nemo_minitron.runtime import extensions

REPO = Path(__file__).resolve().parents[2]
# What ``import transformer_engine.pytorch`` was seen to raise, and two that loaders raise.
FAULTS = {
    "no extension for torch": 'FileNotFoundError("Could not find shared object file for torch")',
    "no core library": 'RuntimeError("Found empty `transformer-engine` meta package installed")',
    "versions that differ": 'AssertionError("Transformer Engine package version mismatch")',
    "no CUDA library": 'OSError("libcudart.so.13: cannot open shared object file")',
    "built for another torch": 'ImportError("undefined symbol: _ZN3c105ErrorC2E")',
}


def package(folder: Path, name: str, **modules: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text("")
    for module, text in modules.items():
        (folder / name / f"{module}.py").write_text(text)


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A process that has not imported Megatron, with ``tmp_path`` first on its path."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in list(sys.modules):
        if name.split(".")[0] in ("megatron", "transformer_engine", "apex", "amp_C"):
            monkeypatch.delitem(sys.modules, name)
    yield monkeypatch
    for name in ("transformer_engine", "transformer_engine.pytorch", "apex", "apex.optimizers"):
        sys.modules.pop(name, None)


def settle() -> None:
    extensions.before_megatron.__wrapped__()


@pytest.mark.parametrize("fault", FAULTS.values(), ids=list(FAULTS))
def test_half_an_installation_is_refused_on_a_gpu(fresh, tmp_path, fault):
    fresh.setattr(torch.cuda, "is_available", lambda: True)
    package(tmp_path, "transformer_engine", pytorch=f"raise {fault}\n")
    with pytest.raises(ValueError, match=r"Transformer Engine is installed but does not work") as e:
        settle()
    name, message = fault.split("(", 1)
    assert f"{name}: {message[1:-2]}" in str(e.value)
    assert "transformer-engine[pytorch]" in str(e.value)
    assert "pip uninstall transformer-engine" in str(e.value)


@pytest.mark.parametrize("fault", [*FAULTS.values(), ""], ids=[*FAULTS, "nothing wrong"])
def test_without_cuda_it_is_set_aside(fresh, tmp_path, caplog, fault):
    package(tmp_path, "transformer_engine", pytorch=f"raise {fault}\n" if fault else "")
    settle()
    assert "Transformer Engine is installed, but it needs CUDA" in caplog.text
    with pytest.raises(ModuleNotFoundError):
        import transformer_engine.pytorch  # noqa: F401


def test_a_package_imported_in_vain_is_set_aside_too(fresh, tmp_path):
    """Transformer Engine itself takes the missing extension for a warning, and is half imported."""
    package(tmp_path, "transformer_engine", pytorch="raise FileNotFoundError('no library')\n")
    import transformer_engine

    assert transformer_engine.__name__ in sys.modules
    settle()
    with pytest.raises(ModuleNotFoundError):
        import transformer_engine.pytorch


def test_one_that_works_is_left_alone(fresh, tmp_path, caplog):
    fresh.setattr(torch.cuda, "is_available", lambda: True)
    fresh.setattr(extensions, "version", lambda package: "2.14.0+abc")
    package(tmp_path, "transformer_engine", pytorch="WORKS = True\n")
    settle()
    import transformer_engine.pytorch

    assert transformer_engine.pytorch.WORKS
    assert not caplog.text


def test_an_old_one_is_named(fresh, tmp_path, caplog):
    fresh.setattr(torch.cuda, "is_available", lambda: True)
    fresh.setattr(extensions, "version", lambda package: "1.7.0")
    package(tmp_path, "transformer_engine", pytorch="")
    settle()
    assert "Transformer Engine 1.7.0 is older than 2.9.0a0" in caplog.text


def test_one_without_metadata_has_no_age(fresh, tmp_path, caplog):
    def unknown(package: str) -> str:
        raise PackageNotFoundError(package)

    fresh.setattr(torch.cuda, "is_available", lambda: True)
    fresh.setattr(extensions, "version", unknown)
    package(tmp_path, "transformer_engine", pytorch="")
    settle()
    assert not caplog.text


def test_apex_without_its_cuda_extensions_is_set_aside(fresh, tmp_path, caplog):
    """Megatron would take its optimizer, which refuses to be built without them."""
    fresh.setattr(torch.cuda, "is_available", lambda: True)
    package(tmp_path, "apex", optimizers="FusedAdam = None\n", multi_tensor_apply="")
    settle()
    assert "apex is installed but does not work (ModuleNotFoundError: No module named 'amp_C'" in (
        caplog.text
    )
    with pytest.raises(ModuleNotFoundError):
        import apex  # noqa: F401


_ENTRIES = """
import importlib, sys
import torch
torch.cuda.is_available = lambda: {cuda}
failed = {{}}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        failed[name] = error
print({{type(error).__name__ for error in failed.values()}}, len(failed), len(sys.argv) - 1)
print(next(iter(failed.values()), ""))
print([name for name in ("megatron.core",) if name in sys.modules])
"""


def importing_megatron() -> dict[Path, bool]:
    """Our files that import Megatron anywhere -> whether they do so as they are imported."""
    found: dict[Path, bool] = {}
    for path in sorted((REPO / "nemo_minitron").rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron"):
                found[path] = found.get(path, False) or node in tree.body
    return found


def test_every_import_of_megatron_is_behind_the_check():
    """Either the file's package looks first, or the file does."""
    for path in importing_megatron():
        assert path.parent.name == "models" or "before_megatron()" in path.read_text(), path


@pytest.mark.parametrize("cuda", [False, True])
def test_every_door_into_the_package(tmp_path, cuda):
    """Every module that imports Megatron, in a process where Transformer Engine is broken."""
    package(tmp_path, "transformer_engine", pytorch="raise FileNotFoundError('no library')\n")
    names = [
        ".".join(path.relative_to(REPO).with_suffix("").parts)
        for path, at_once in importing_megatron().items()
        if at_once and (cuda or path.name == "build.py")
    ]
    done = subprocess.run(
        [sys.executable, "-c", _ENTRIES.format(cuda=cuda), *names],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": f"{tmp_path}:{REPO}", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    kinds, message, megatron = done.stdout.strip().splitlines()
    if cuda:
        assert kinds == f"{{'ValueError'}} {len(names)} {len(names)}"
        assert message.startswith("Transformer Engine is installed but does not work")
        assert megatron == "[]"
    else:
        assert kinds == f"set() 0 {len(names)}"
        assert megatron == "['megatron.core']"


@pytest.mark.parametrize("found", ["0.4.1", None])
def test_an_old_checkpoint_writer_is_set_aside(fresh, tmp_path, found, caplog):
    """Beside it ``import megatron.core`` 0.19 would end in AttributeError or AssertionError."""
    package(tmp_path, "nvidia_resiliency_ext")
    if found:
        info = tmp_path / f"nvidia_resiliency_ext-{found}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: nvidia-resiliency-ext\nVersion: {found}\n")
    settle()
    with pytest.raises(ImportError):
        import nvidia_resiliency_ext  # noqa: F401
    assert "is older than 0.6.0" in caplog.text
    assert "pip uninstall nvidia-resiliency-ext" in caplog.text
    sys.modules.pop("nvidia_resiliency_ext")


def test_a_new_checkpoint_writer_stays_without_cuda(fresh, tmp_path):
    package(tmp_path, "nvidia_resiliency_ext")
    info = tmp_path / "nvidia_resiliency_ext-0.6.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: nvidia-resiliency-ext\nVersion: 0.6.0\n")
    settle()
    import nvidia_resiliency_ext

    assert nvidia_resiliency_ext.__file__.startswith(str(tmp_path))
    sys.modules.pop("nvidia_resiliency_ext")
