"""Two training loops beside each other, a step of one after a step of the other.

Each loop is a group of processes that prints a line for every step. While one makes a step the
other is stopped, so whatever else the machine does hits both alike.
"""

import argparse
import contextlib
import os
import re
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from benchmarks.docs_block import markdown_table, write_block

UNSEEN = 2
"""Steps of each loop that do not count, in which buffers are made."""
_TICKS = os.sysconf("SC_CLK_TCK")
_EVERY = 0.5  # seconds between two looks at the memory


@dataclass
class Loop:
    """A training loop.

    Attributes:
        command: starts its ranks.
        mark: found in the line that says a step is done.
        environment: besides that of this process.
        log: where everything it prints goes.
    """

    command: Sequence[str]
    mark: str
    environment: Mapping[str, str]
    log: Path
    steps: list[tuple[float, float]] = field(default_factory=list)
    """Seconds by the clock, and of all processors."""
    peak: int = 0
    """Most bytes that its processes held together, mapped files aside."""

    def start(self) -> None:
        """Begin, in a session of its own."""
        self._out: IO[str] = self.log.open("w")
        self._process: Any = subprocess.Popen(
            self.command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **self.environment, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )

    def step(self, count: bool) -> None:
        """Let it make one step, and stop it; the first one takes what comes before it, too."""
        os.killpg(self._process.pid, signal.SIGCONT)
        seen = threading.Event()
        watch = threading.Thread(target=self._watch, args=(seen,))
        watch.start()
        try:
            wall, cpu = time.monotonic(), self._processor_seconds()
            self._read_to_mark()
            spent = time.monotonic() - wall, self._processor_seconds() - cpu
            os.killpg(self._process.pid, signal.SIGSTOP)
        finally:
            seen.set()
            watch.join()
        if count:
            self.steps.append(spent)

    def _read_to_mark(self) -> None:
        for line in self._process.stdout:
            self._out.write(line)
            if re.search(self.mark, line):
                return
        self._out.flush()
        raise RuntimeError(f"{self.log} ends before its steps do:\n{self.log.read_text()[-3000:]}")

    def _watch(self, seen: threading.Event) -> None:
        while not seen.wait(_EVERY):
            self.peak = max(self.peak, sum(map(_held, self._members())))

    def _members(self) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if os.getpgid(int(path.name)) == self._process.pid:
                    found.append(int(path.name))
            except ProcessLookupError:
                continue
        return found

    def _processor_seconds(self) -> float:
        return sum(map(_spent, self._members()))

    def end(self) -> None:
        """Kill it: what follows the steps is not measured."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()
        self._out.close()

    def median(self, kind: int) -> float:
        """Of its counted steps: by the clock (0), or of all processors (1)."""
        return statistics.median(step[kind] for step in self.steps)


def alternate(loops: Sequence[Loop], steps: int, unseen: int) -> None:
    """Run loops by turns, so many steps of each that count after ``unseen`` that do not."""
    try:
        for loop in loops:
            loop.start()
            loop.step(count=False)
        for number in range(1, unseen + steps):
            for loop in loops if number % 2 else reversed(loops):
                loop.step(count=number >= unseen)
    finally:
        for loop in loops:
            loop.end()


class Ratios(NamedTuple):
    """A loop by another: medians over the turns of one step by the other's, and of the peaks."""

    seconds: float
    processor: float
    memory: float


def compare(name: str, ours: Loop, theirs: Loop, steps: int) -> tuple[list[str], Ratios]:
    """Run two loops by turns; returns a row of the table of ``report``, and its ratios."""
    alternate([ours, theirs], steps, UNSEEN)
    pairs = list(zip(ours.steps, theirs.steps, strict=True))
    clock, processor = (statistics.median(a[k] / b[k] for a, b in pairs) for k in (0, 1))
    found = Ratios(clock, processor, ours.peak / theirs.peak)
    seconds = [f"{loop.median(0):.2f}" for loop in (theirs, ours)]
    peaks = [f"{loop.peak / 1e9:.2f}" for loop in (theirs, ours)]
    row = [name, *seconds, *(f"{one:.3f}" for one in found[:2]), *peaks, f"{found.memory:.3f}"]
    print(row, flush=True)
    return row, found


def report(
    name: str,
    rows: Callable[[Path, int], tuple[list[list[str]], bool]],
    columns: tuple[str, str, str],
    said: str,
) -> int:
    """Make a table, show it, and with ``--write`` put it into docs/benchmarks.md.

    Args:
        name: of the block in that page, and of the module in ``benchmarks``.
        rows: makes the rows in a folder with so many counted steps, and says whether all of them
            are within their limits.
        columns: what the first column is, the other program, and our stage.
        said: heading, and what was run.

    Returns:
        The exit status: 1 where a limit is passed.
    """
    parser = argparse.ArgumentParser(description=said.splitlines()[0].lstrip("# "))
    parser.add_argument("--steps", type=int, default=12, help="of each that count")
    parser.add_argument("--keep", help="folder for what is made")
    parser.add_argument("--write", action="store_true", help="update docs/benchmarks.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="minitron-") as folder:
        table, within = rows(Path(args.keep or folder), args.steps)
    what, theirs, ours = columns
    head = (what, f"{theirs} s", f"{ours} s", "ratio", "of processor time",
            f"{theirs} GB", f"{ours} GB", "ratio")  # fmt: skip
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    text = (
        f"{said} Medians of {args.steps} steps that take turns, and of the ratios of "
        "neighbours; GB are the most that all processes hold together, mapped files aside. Load "
        f"of the machine at the end: {load}.\n\n{markdown_table(head, table)}"
    )
    print(text)
    if args.write:
        write_block(name, text)
    return int(not within)


def _held(pid: int) -> int:
    """Bytes of a process that no file holds; what forks share is counted once in all."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return 0
    return 1024 * sum(map(int, re.findall(r"^Pss_(?:Anon|Shmem):\s+(\d+)", text, re.MULTILINE)))


def _spent(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (ProcessLookupError, FileNotFoundError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS
