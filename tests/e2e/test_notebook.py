"""``examples/laptop.ipynb``: its cells run one after the other, and the student learns."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).parents[2]
NOTEBOOK = REPO / "examples" / "laptop.ipynb"
_AFTER = "print('LOSSES', json.dumps(losses), len(plt.get_fignums()))\n"


def cells() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text())["cells"]


@pytest.mark.timeout(600)
def test_its_cells_run(tmp_path: Path) -> None:
    """In an empty folder; as in Jupyter, the program is in no file."""
    code = ["".join(cell["source"]) for cell in cells() if cell["cell_type"] == "code"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([*code, _AFTER])],
        capture_output=True,
        text=True,
        timeout=550,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPO), "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1].removeprefix("LOSSES ")
    losses, _, pictures = last.rpartition(" ")
    loss = json.loads(losses)
    assert int(pictures) == 2
    assert loss["teacher"] < 1.2
    assert loss["pruned"] > loss["teacher"] + 0.5
    assert loss["distilled"] < loss["teacher"] + 0.1


def test_it_is_small() -> None:
    assert NOTEBOOK.stat().st_size < 100_000
    assert sum(len(cell.get("outputs", [])) > 0 for cell in cells()) > 3, "run its cells"
