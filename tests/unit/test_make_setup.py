"""Which Python ``make setup`` takes, and what follows from it for the stack and its tests."""

import os
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
WANTED = ("3.12", "3.11", "3.10")


def fake_python(folder: Path, name: str, version: "str | None") -> Path:
    """A program that answers the two questions that are asked of a Python.

    Args:
        folder: where to put it.
        name: of the program.
        version: what it says it is; None for one that cannot run (pyenv has such entries).
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    # Asked whether it is usable it is given the wanted version to compare with, in quotes.
    answer = (
        "exit 1"
        if version is None
        else f"""case "$2" in
      *"!= '{version}'"*) exit 0;;
      *print*) echo {version};;
      *) exit 1;;
    esac"""
    )
    path.write_text(f"#!/bin/sh\n{answer}\n")
    path.chmod(0o755)
    return path


def find(home: Path, *versions: str) -> "subprocess.CompletedProcess[str]":
    for version in WANTED:  # hides what this machine has
        if not (home / "bin" / f"python{version}").exists():
            fake_python(home / "bin", f"python{version}", None)
    if not (home / "bin" / "python3").exists():
        fake_python(home / "bin", "python3", None)
    env = {"PATH": f"{home / 'bin'}:/usr/bin:/bin", "HOME": str(home)}
    command = ["sh", str(REPO / "scripts" / "find_python.sh"), *versions]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def test_the_newest_python_is_taken(tmp_path):
    fake_python(tmp_path / "bin", "python3.11", "3.11")
    new = fake_python(tmp_path / "bin", "python3.12", "3.12")
    assert find(tmp_path, *WANTED).stdout.strip() == str(new)


def test_a_python_that_does_not_run_is_passed_over(tmp_path):
    old = fake_python(tmp_path / "bin", "python3.11", "3.11")
    fake_python(tmp_path / "bin", "python3.12", None)
    assert find(tmp_path, *WANTED).stdout.strip() == str(old)


def test_python3_counts_by_its_version(tmp_path):
    plain = fake_python(tmp_path / "bin", "python3", "3.11")
    assert find(tmp_path, *WANTED).stdout.strip() == str(plain)


def test_pyenv_is_looked_through(tmp_path):
    fake_python(tmp_path / "bin", "python3", "3.11")
    place = tmp_path / ".pyenv" / "versions" / "3.12.7" / "bin"
    inside = fake_python(place, "python3.12", "3.12")
    assert find(tmp_path, *WANTED).stdout.strip() == str(inside)


def test_no_python_is_an_error_that_says_what_was_looked_for(tmp_path):
    done = find(tmp_path, *WANTED)
    assert done.returncode == 1
    assert "3.12 3.11 3.10" in done.stderr


@pytest.mark.parametrize(
    ("version", "says", "pins", "tests"),
    [
        ("3.12", "megatron-core 0.19", "tested-3.12.txt", '"not alone" '),
        ("3.11", "0.16: the older stack", "tested-3.11.txt", "tests/unit --ignore=tests/unit/test"),
        ("3.10", "0.16: the older stack", "", "tests/unit --ignore=tests/unit/test"),
    ],
)
def test_python_decides_on_the_stack(tmp_path, version, says, pins, tests):
    python = fake_python(tmp_path, "python", version)
    variables = [f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"]
    command = ["make", "--dry-run", "setup", "test", *variables]
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=60)
    assert says in done.stdout, done.stdout + done.stderr
    assert ("-c requirements/" + pins in done.stdout) if pins else "-c req" not in done.stdout
    assert tests in done.stdout


def test_an_environment_of_another_python_is_not_reused(tmp_path):
    fake_python(tmp_path / "venv" / "bin", "python", "3.11")
    python = fake_python(tmp_path, "python", "3.12")
    command = ["make", "setup", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"]
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "is of another Python" in done.stdout
