"""What a program that imports the package may rely on: nothing global changes, names stay."""

import ast
import hashlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import nemo_minitron

REPO = Path(__file__).resolve().parents[2]
# Imports the modules that are named, then all of the package, and prints what the latter changed.
_IMPORTS = """
import importlib, json, logging, os, pkgutil, signal, sys, warnings

def state():
    loggers = {
        name: [found.level, found.propagate, found.disabled, len(found.handlers)]
        for name, found in [("root", logging.getLogger()), *logging.root.manager.loggerDict.items()]
        if isinstance(found, logging.Logger) and not name.startswith("nemo_minitron")
    }
    loggers = {name: found for name, found in loggers.items() if found != [0, True, False, 0]}
    found = {
        "loggers": loggers,
        "environment": dict(os.environ),
        "warnings": [str(one) for one in warnings.filters],
        "signals": {n: str(signal.getsignal(n)) for n in signal.valid_signals()},
        "path": list(sys.path),
        "folder": sorted(os.listdir()),
        "excepthook": str(sys.excepthook),
    }
    if "torch" in sys.modules:
        import torch
        found["torch"] = [torch.get_num_threads(), str(torch.get_default_dtype()), str(torch.zeros)]
    if "nemo.lightning.callback_group" in sys.modules:
        from nemo.lightning.callback_group import CallbackGroup
        from nemo.utils import logging as nemo_logging
        callbacks = CallbackGroup.get_instance().callbacks
        found["nemo"] = [str(callbacks), nemo_logging.getEffectiveLevel()]
    return found

for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name)
    except Exception:
        pass
before = state()
import nemo_minitron
for found in pkgutil.walk_packages(nemo_minitron.__path__, "nemo_minitron."):
    if not found.name.endswith("__main__"):
        try:
            importlib.import_module(found.name)
        except ImportError as error:  # layers of a later Megatron-Core
            later = ("megatron.core.models.hybrid", "megatron.core.ssm.gated_delta_net")
            assert error.name in later, error
after = state()
changed = {}
for key, value in before.items():
    if value != after[key]:
        both = value, after[key]
        pairs = [one.items() if isinstance(one, dict) else one for one in both]
        ways = (pairs, pairs[::-1])
        changed[key] = [[str(x) for x in one if x not in other] for one, other in ways]
print(json.dumps(changed))
"""


def python(code: str, *arguments: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=250,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def libraries() -> list[str]:
    """Modules of others that those of the package import, as they are imported or later."""
    found = {
        name
        for path in (REPO / "nemo_minitron").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    return sorted(name for name in found if not name.startswith("nemo_minitron"))


def test_importing_changes_nothing_global(tmp_path):
    """Loggers and warnings of others, NeMo's callbacks, environment, signals, torch."""
    assert "nemo.lightning.callback_group" in libraries()
    assert json.loads(python(_IMPORTS, json.dumps(libraries()), folder=tmp_path)) == {}


def test_importing_is_fast_and_needs_no_torch(tmp_path):
    code = (
        "import sys, time; start = time.process_time(); import nemo_minitron; "
        "taken = time.process_time() - start; dir(nemo_minitron); "
        "assert 'torch' not in sys.modules and 'yaml' not in sys.modules; print(taken)"
    )
    assert min(float(python(code, folder=tmp_path)) for _ in range(2)) < 0.3


# ----------------------------------------------------------------- names

_LIST = REPO / "tests" / "data" / "public_api.txt"
# Of these the keys are public, which docs/keys.md lists and the tests of earlier results hold.
_CONFIGS = ("DistillationConfig", "ParallelConfig")


def arguments(function: object) -> str:
    """Names and defaults, without types: those of libraries have other names in other releases."""
    signature = inspect.signature(function)  # type: ignore[arg-type]
    bare = [
        one.replace(annotation=one.empty)
        for name, one in signature.parameters.items()
        if name != "self"
    ]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


def public_names() -> list[str]:
    lines = []
    for name in sorted(set(nemo_minitron.__all__) - {"__version__"}):
        found = getattr(nemo_minitron, name)
        if name in _CONFIGS:
            lines.append(name)
            continue
        lines.append(f"{name}{arguments(found)}")
        if isinstance(found, type):
            own = {key: value for base in found.__mro__[:1] for key, value in vars(base).items()}
            for method, value in sorted(own.items()):
                plain = getattr(value, "__func__", value)
                if not method.startswith("_") and inspect.isfunction(plain):
                    lines.append(f"{name}.{method}{arguments(plain)}")
    return lines


def test_a_public_name_changes_with_a_line_in_the_changes():
    """The list is checked in, and CHANGELOG.md has its fingerprint beside what changed."""
    text = "\n".join(public_names()) + "\n"
    if os.environ.get("MINITRON_WRITE_DOCS") == "1":
        _LIST.write_text(text)
    assert _LIST.read_text() == text, "write it with MINITRON_WRITE_DOCS=1, and say it in CHANGELOG"
    fingerprint = hashlib.sha256(text.encode()).hexdigest()[:8]
    lines = (REPO / "CHANGELOG.md").read_text().splitlines()
    assert any(f"interface {fingerprint}" in line for line in lines), (
        f"the public names changed: add a line to CHANGELOG.md that says how, with (interface "
        f"{fingerprint}) in it"
    )


def test_the_stub_and_the_page_have_all_names():
    names = set(nemo_minitron.__all__) - {"__version__"}
    stub = ast.parse((REPO / "nemo_minitron" / "__init__.pyi").read_text())
    imported = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    assert {alias.asname for node in imported for alias in node.names} == names
    page = (REPO / "docs" / "api.md").read_text()
    assert all(f"`{name}" in page for name in names)
    with pytest.raises(AttributeError, match="no attribute 'scores'"):
        getattr(nemo_minitron, "scores")


def test_a_dtype_that_no_weights_have():
    with pytest.raises(ValueError, match=r"^dtype=half must be one of float32, bfloat16, float16"):
        nemo_minitron.open_model("runs/teacher", dtype="half")
