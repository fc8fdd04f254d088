"""``examples/megatron_bridge`` in Megatron-Bridge itself, against the stages on its checkpoints.

``MEGATRON_BRIDGE`` names a folder that has it (``tests/helpers/megatron_bridge.py`` says how it is
made, and what has to be worked round where there is no GPU). Without it nothing runs.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cases.live_truth import layout
from tests.cases.own_loop import gradients
from tests.helpers.own_loop import SIZES, check_gradients, check_pruned, together
from tests.helpers.pool import WorkerPool

REPO = Path(__file__).parents[2]
SCRIPT = REPO / "examples" / "megatron_bridge" / "recipe_minitron.py"
RECIPE = """--recipe small_cpu_config train.train_iters=2 train.global_batch_size=4
    train.micro_batch_size=2 validation.eval_iters=2 validation.eval_interval=100
    tokenizer.vocab_size=127 dataset.seq_length=32 optimizer.lr=1e-2 optimizer.clip_grad=0"""
LAYOUTS = {
    1: (layout(), ""),
    4: (
        layout(tp=2, pp=2),
        "model.tensor_model_parallel_size=2 model.pipeline_model_parallel_size=2",
    ),
}


def bridge(folder: Path, ranks: int, name: str, *arguments: str) -> tuple[list[Any], list[Any]]:
    """Run the example; what each rank read, and what each computed in every step."""
    known = f"{RECIPE} {LAYOUTS[ranks][1]}".split()
    command = [sys.executable, "-m", "tests.helpers.megatron_bridge", str(ranks)]
    log = folder / f"{name}.log"
    with log.open("w") as out:
        done = subprocess.run(
            [*command, str(folder / name), str(SCRIPT), *known, *arguments],
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=folder,  # its recipes write below it
            timeout=600,
            env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        )
    assert done.returncode == 0, log.read_text()[-3000:]
    kept = [torch.load(folder / name / f"{rank}.pt") for rank in range(ranks)]
    return together([rank["batches"] for rank in kept]), [rank["steps"] for rank in kept]


@pytest.mark.skipif(
    "MEGATRON_BRIDGE" not in os.environ, reason="MEGATRON_BRIDGE names no folder that has it"
)
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("world", LAYOUTS)
def test_its_own_recipe(world: int, ranks: WorkerPool, tmp_path: Path) -> None:
    """Trained, scored, pruned and distilled there: scores, indices, weights, loss, gradients."""
    big, small = f"{tmp_path}/big", f"{tmp_path}/small"
    bridge(tmp_path, world, "train", f"checkpoint.save={big}")
    targets = ("--targets", *SIZES, "--save-pruned", small)
    read, _ = bridge(tmp_path, world, "compress", f"checkpoint.load={big}", *targets)
    assert len(read) == 4
    models = check_pruned(tmp_path, "big/iter_0000002", "small/iter_0000000", read)

    pair = ("--student", f"{small}/iter_0000000", "--teacher", f"{big}/iter_0000002")
    read, steps = bridge(tmp_path, world, "distil", f"checkpoint.save={tmp_path}/distilled", *pair)
    own = ranks.run(world, gradients, models, LAYOUTS[world][0], read[:2])
    assert float(steps[-1][0]["losses"]["distillation loss"]) == pytest.approx(own[-1][0], rel=1e-5)
    for (first, _), (_, mine) in zip(steps, own, strict=True):
        check_gradients(first["gradients"], mine)
