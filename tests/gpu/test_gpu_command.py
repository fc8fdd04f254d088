"""``make gpu`` in small on a CPU: every part ends, finds what must hold and can tell when it fails.

The two runs of a part that a GPU would tell apart are both on the CPU here, so differences between
them must be zero, and those to transformers and plain torch rounding.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.__main__ import PARTS, describe
from tests.oracle.environment import ROOT

pytestmark = pytest.mark.timeout(1500)


def command(folder: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, "-m", "benchmarks.gpu", "--small"]
    line += ["--output", str(folder / "results"), "--work", str(folder / "work"), *more]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(
        line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1400
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where one run of all parts left its results."""
    folder = tmp_path_factory.mktemp("gpu")
    done = command(folder)
    log = (folder / "results" / "log.txt").read_text()
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{log[-6000:]}"
    return folder


def result(folder: Path, part: str) -> dict[str, Any]:
    return dict(json.loads((folder / "results" / f"{part}.json").read_text()))


@pytest.mark.parametrize("part", PARTS)
def test_every_part_ends_with_its_checks_held(folder, part):
    found = result(folder, part)
    assert found["checks"], part
    assert all(found["checks"].values()), found["checks"]
    assert found["small"]
    assert found["machine"]["device"] == "CPU"
    assert {len(row) for row in found["rows"]} == {len(found["header"])}


def test_logits(folder):
    for name, found in result(folder, "logits")["figures"].items():
        assert found["fp32_to_cpu"] < 1e-5, name
        if "mixtral" not in name:
            assert found["fp32_same_device"] == found["fp32_to_cpu"], name
            assert 1e-3 < found["bf16_ours"] < 0.05, name


def test_scores(folder):
    axes = result(folder, "scores")["figures"]["axes"]
    assert {axis: found["kept"] for axis, found in axes.items()} == {
        "hidden": 64,
        "ffn": 170,
        "head": 6,
        "layer": 1,
    }
    assert all(found["differ"] == 0 and found["error"] == 0 for found in axes.values())
    assert axes["hidden"]["gap"] > 0
    assert axes["ffn"]["gap"] > 0


def test_distillation_loss(folder):
    figures = result(folder, "kd_loss")["figures"]
    full, half = figures["float32"], figures["bfloat16"]
    assert full["ours"]["loss"] == pytest.approx(full["plain"]["loss"], rel=1e-6)
    assert 0 < full["ours"]["gradient_error"] < 2e-6
    assert full["plain"]["gradient_error"] == 0
    assert 1e-4 < half["ours"]["gradient_error"] < 0.05
    by_chunk = full["ours"]["by_chunk"]
    assert set(by_chunk) == {"32", "64"}
    assert full["ours"]["best_chunk"] in (32, 64)
    losses = [found["loss"] for found in by_chunk.values()]
    assert losses == pytest.approx([full["plain"]["loss"]] * 2, rel=1e-6)


def test_step(folder):
    figures = result(folder, "step")["figures"]
    assert figures["gradient_errors"] == [0.0, 0.0]
    assert figures["per_micro_batch"] == {}
    assert figures["micro_batches"] == [2, 4]
    assert {name: len(rounds) for name, rounds in figures["times"].items()} == {
        "step": 2,
        "teacher": 2,
        "student": 2,
    }


def test_quickstart(folder):
    figures = result(folder, "quickstart")["figures"]
    losses = {name: seeds[0] for name, seeds in figures["losses"].items()}
    assert set(losses) == {"teacher", "pruned", "KD", "CE"}
    assert losses["CE"] < losses["pruned"]
    assert len(set(losses.values())) == 4
    assert figures["gains"] == [pytest.approx(losses["CE"] - losses["KD"])]


def test_one_table_has_all_parts(folder):
    table = (folder / "results" / "table.md").read_text()
    for part in PARTS:
        assert describe(result(folder, part)) in table


def test_a_part_that_fails_takes_nothing_from_the_others(folder):
    """Its model cannot be written: the place is taken by a file."""
    before = {part: result(folder, part) for part in PARTS}
    blocked = folder / "blocked"
    blocked.mkdir()
    (blocked / "logits").write_text("")
    done = command(folder, "--work", str(blocked), "--parts", "logits")
    assert done.returncode == 1
    assert "NOT logits: ended with exit code 1" in done.stdout
    assert {part: result(folder, part) for part in PARTS} == before
