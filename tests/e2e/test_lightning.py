"""``examples/lightning``: a teacher, its pruned student, and what distillation gives back."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

REPO = Path(__file__).parents[2]


@pytest.mark.timeout(600)
def test_the_loss_of_validation_falls(tmp_path: Path) -> None:
    script = REPO / "examples" / "lightning" / "prune_and_distil.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line.split() for line in done.stdout.splitlines()]
    loss = {line[0]: float(line[1]) for line in said if len(line) == 2}
    assert loss["teacher"] < loss["distilled"] < 0.4 < 1 < loss["pruned"]
    # What was exported goes on counting: two numbers say the step, and the rest follows.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    rows = (np.array([[3], [7], [20]]) + np.array([[2], [5], [1]]) * np.arange(16)) % 32
    with torch.no_grad():
        next_number = model(torch.from_numpy(rows)).logits.argmax(-1).numpy()
    assert (next_number[:, 2:-1] == rows[:, 3:]).mean() > 0.9
