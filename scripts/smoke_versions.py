"""Runs a few distributed test files against other releases of Megatron-Core, and prints a table.

Usage (of an environment made by ``make setup``):
    python scripts/smoke_versions.py 0.17.1 0.18.2 [--tests FILE ...]

Each release's wheel for the running Python is downloaded and unpacked into a temporary folder,
which is put first on ``PYTHONPATH``: everything else stays what the environment has, and nothing is
installed. What this says for docs/versions.md is that those tests ran with that release, no more.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
TESTS = (
    "tests/dist/test_importance_scores.py",
    "tests/dist/test_distillation.py",
    "tests/dist/test_checkpoint_layouts.py",
)
LOADED = "import megatron.core as m; print(m.__version__, m.__file__)"


@dataclass(frozen=True)
class Outcome:
    """What a test file gave on one release.

    Attributes:
        version: release of Megatron-Core.
        test: path of the file in the repository.
        counts: ``passed``, ``failed``, ``error`` and ``skipped`` -> number of tests.
        seconds: wall-clock time.
        failed: names of the tests that failed or errored.
    """

    version: str
    test: str
    counts: Counter[str]
    seconds: float
    failed: list[str]


def unpack(version: str, folder: Path) -> Path:
    """Download and unpack a release's wheel; the folder to put first on ``PYTHONPATH``."""
    wheels = folder / f"{version}.wheel"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
    ]
    subprocess.run([*pip, "--dest", str(wheels), f"megatron-core=={version}"], check=True)
    target = folder / version
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def environment(release: Path) -> dict[str, str]:
    """Environment in which the release comes before the one that is installed."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(release), str(REPO)))}


def check_loaded(version: str, release: Path) -> None:
    """Make sure that it is that release which is imported, not the installed one."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED],
        env=environment(release),
        cwd=release,
        capture_output=True,
        text=True,
        check=True,
    )
    found, place = done.stdout.splitlines()[-1].split(" ", 1)
    if found != version or not Path(place).is_relative_to(release):
        raise SystemExit(f"megatron-core {version} was to be imported, and {found} of {place} was")


def run(version: str, release: Path, test: str) -> Outcome:
    """Run one test file on a release."""
    report = release.parent / f"{version}.xml"
    report.unlink(missing_ok=True)
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    subprocess.run([*command, f"--junitxml={report}"], cwd=REPO, env=environment(release))
    seconds = time.monotonic() - began
    if not report.exists():
        return Outcome(version, test, Counter({"error": 1}), seconds, ["pytest itself"])
    return Outcome(version, test, *_read(report, seconds))


def _read(report: Path, seconds: float) -> tuple[Counter[str], float, list[str]]:
    counts: Counter[str] = Counter()
    failed = []
    for case in ET.parse(report).iter("testcase"):
        marks = {child.tag for child in case} & {"failure", "error", "skipped"}
        mark = min(marks, default="passed")
        kind = "failed" if mark == "failure" else mark
        counts[kind] += 1
        if kind in ("failed", "error"):
            failed.append(str(case.get("name")))
    return counts, seconds, failed


def table(outcomes: list[Outcome]) -> str:
    """Markdown rows for docs/versions.md."""
    kinds = ("passed", "failed", "error", "skipped")
    lines = [f"| megatron-core | test file | {' | '.join(kinds)} | seconds |", "|---" * 7 + "|"]
    for o in outcomes:
        cells = [str(o.counts[kind]) for kind in kinds]
        lines.append(f"| {o.version} | `{o.test}` | {' | '.join(cells)} | {o.seconds:.0f} |")
    for o in outcomes:
        lines += [f"failed on {o.version}: {o.test}::{name}" for name in o.failed]
    return "\n".join(lines)


def main() -> int:
    """Run every file on every release; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("versions", nargs="+", help="releases of megatron-core, such as 0.18.2")
    parser.add_argument("--tests", nargs="+", default=list(TESTS), help="test files to run")
    arguments = parser.parse_args()
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="smoke-") as scratch:
        for version in arguments.versions:
            release = unpack(version, Path(scratch))
            check_loaded(version, release)
            outcomes += [run(version, release, test) for test in arguments.tests]
    print(table(outcomes))
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
