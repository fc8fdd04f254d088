"""Errors that a person could make, put into the package one at a time: do the tests notice?

    python -m benchmarks.mutants                   all mutants of mutants.yaml
    python -m benchmarks.mutants --only 3 17-20    some of them, counted from 1
    python -m benchmarks.mutants --write           all, and the table into docs/benchmarks.md

Every mutant gets a copy of the package and the tests in a temporary folder; the working tree stays
as it is. The tests are those that have to notice, which are first run without any mutant. A mutant
is caught when one of them fails or does not end in time.
"""

import argparse
import ast
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.docs_block import markdown_table, write_block

REPO = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_suffix(".yaml")
COPIED = ("nemo_minitron", "tests", "benchmarks", "scripts", "conf", "docs", "pyproject.toml")
_WORDS = {0: "survived", 1: "caught", None: "caught (no end)"}


@dataclass(frozen=True)
class Mutant:
    """One error.

    Attributes:
        breaks: what is wrong with it, a sentence.
        file: path in the package.
        text: what stands there, exactly once.
        mutant: what takes its place.
        tests: files or ids in ``tests/`` that have to notice.
    """

    breaks: str
    file: str
    text: str
    mutant: str
    tests: list[str]

    def source(self, package: Path) -> str:
        """The file with the error in it.

        Raises:
            ValueError: the text is not there exactly once, or the result is no Python.
        """
        source = (package / self.file).read_text()
        if source.count(self.text) != 1:
            raise ValueError(
                f"{self.file} holds {self.text!r} {source.count(self.text)} times, not once; adapt "
                f"the mutant {self.breaks!r} in {TABLE.name} to what the file says now"
            )
        changed = source.replace(self.text, self.mutant)
        ast.parse(changed)
        return changed


def read_table() -> list[Mutant]:
    """All mutants, in the order of their numbers."""
    return [Mutant(**entry) for entry in yaml.safe_load(TABLE.read_text())]


@dataclass(frozen=True)
class Ended:
    """How a run of tests ended.

    Attributes:
        code: exit status of pytest, None when the time was over.
        seconds: how long it took.
        said: the end of what it said.
    """

    code: int | None
    seconds: float
    said: str

    @property
    def failed(self) -> str:
        """The first test that failed."""
        lines = [line for line in self.said.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return lines[0].split(" - ")[0].partition(" ")[2] if lines else ""


def run_tests(mutant: Mutant | None, tests: Sequence[str], limit: float) -> Ended:
    """Run tests in a copy of the package with a mutant in it, or without one."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name)
        for part in COPIED:
            if (REPO / part).is_dir():
                shutil.copytree(REPO / part, folder / part)
            else:
                shutil.copyfile(REPO / part, folder / part)
        if mutant is not None:
            (folder / "nemo_minitron" / mutant.file).write_text(
                mutant.source(REPO / "nemo_minitron")
            )
        words = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *words, *(f"tests/{test}" for test in tests)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=limit)
            code: int | None = process.returncode
        except subprocess.TimeoutExpired:
            code, said = None, ""
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return Ended(code, time.monotonic() - start, said[-20_000:])


def _numbers(words: Sequence[str], count: int) -> list[int]:
    """Numbers of mutants, from 1, of words like ``3`` and ``17-20``; all without words."""
    found: list[int] = []
    for word in words:
        first, _, last = word.partition("-")
        found += range(int(first), int(last or first) + 1)
    return [number for number in found if number <= count] or list(range(1, count + 1))


def main() -> None:
    """Run the mutants and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="numbers of mutants: 3 17-20")
    parser.add_argument("--limit", type=float, default=600, help="seconds for each mutant's tests")
    parser.add_argument(
        "--write", action="store_true", help="put the table into docs/benchmarks.md"
    )
    args = parser.parse_args()
    table = read_table()
    chosen = {number: table[number - 1] for number in _numbers(args.only, len(table))}
    for mutant in table:
        mutant.source(REPO / "nemo_minitron")
    tests = dict.fromkeys(test for mutant in chosen.values() for test in mutant.tests)
    plain = run_tests(None, list(tests), args.limit * len(chosen))
    if plain.code != 0:
        raise SystemExit(f"the tests fail without any mutant:\n{plain.said[-3000:]}")
    print(f"without a mutant: {plain.seconds:.0f} s", flush=True)
    rows = []
    for number, mutant in chosen.items():
        ended = run_tests(mutant, mutant.tests, args.limit)
        if ended.code not in _WORDS:
            raise SystemExit(f"mutant {number}: pytest ended with {ended.code}:\n{ended.said}")
        word = _WORDS[ended.code]
        row = [f"{number}. {mutant.breaks}", f"`{mutant.file}`", word, f"{ended.seconds:.0f}"]
        rows.append(row)
        print(" | ".join([*row, ended.failed]), flush=True)
    caught = sum(row[2] != "survived" for row in rows)
    text = f"{caught} of {len(rows)} errors were caught (seconds of a busy machine)."
    found = markdown_table(["what is wrong", "in", "the tests", "s"], rows)
    print(f"\n{found}\n\n{text}")
    if args.write:
        write_block("mutants", f"{text}\n\n{found}")


if __name__ == "__main__":
    main()
