"""``examples/megatron_lm`` in Megatron-LM itself, against the stages on its checkpoints.

``MEGATRON_LM`` names a checkout of core 0.19; ``tests/helpers/megatron_lm.py`` says what has to be
worked round where there is no GPU. Without it nothing runs.
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
SCRIPT = REPO / "examples" / "megatron_lm" / "pretrain_minitron.py"
MODEL = """--num-layers 4 --hidden-size 64 --ffn-hidden-size 160 --num-attention-heads 8
    --group-query-attention --num-query-groups 4 --max-position-embeddings 32"""
FORM = """--swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0"""
TRAINING = """--mock-data --tokenizer-type NullTokenizer --vocab-size 127 --seq-length 32
    --make-vocab-size-divisible-by 64 --micro-batch-size 2 --global-batch-size 4 --train-iters 2
    --eval-iters 2 --eval-interval 100 --lr 1e-2 --lr-decay-style constant
    --calculate-per-token-loss --ckpt-format torch_dist --save-interval 100"""
CPU = """--use-cpu-initialization --distributed-backend gloo --num-workers 0
    --transformer-impl local --no-gradient-accumulation-fusion --no-masked-softmax-fusion
    --no-persist-layer-norm
    --no-bias-dropout-fusion --no-bias-swiglu-fusion --no-rope-fusion --attention-backend unfused"""
LAYOUTS = {
    1: (layout(), ""),
    4: (
        layout(tp=2, pp=2),
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
    ),
}
needs_tree = pytest.mark.skipif(
    "MEGATRON_LM" not in os.environ, reason="MEGATRON_LM names no checkout of Megatron-LM"
)


def megatron_lm(folder: Path, ranks: int, name: str, *arguments: str) -> list[Any]:
    """Run the example; what each rank read."""
    known = " ".join([FORM, TRAINING, CPU, LAYOUTS[ranks][1]]).split()
    command = [sys.executable, "-m", "tests.helpers.megatron_lm", str(ranks), str(folder / name)]
    log = folder / f"{name}.log"
    with log.open("w") as out:
        done = subprocess.run(
            [*command, str(SCRIPT), *known, *arguments],
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=REPO,
            timeout=600,
            env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        )
    assert done.returncode == 0, log.read_text()[-3000:]
    return [torch.load(folder / name / f"{rank}.pt") for rank in range(ranks)]


@needs_tree
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("world", LAYOUTS)
def test_its_own_loop(world: int, ranks: WorkerPool, tmp_path: Path) -> None:
    """Trained, scored, pruned and distilled there: scores, indices, weights and gradients."""
    save = ("--minitron-save", str(tmp_path / "small"), "--save", str(tmp_path / "big"))
    sizes = ("--minitron-targets", *SIZES)
    read = together(megatron_lm(tmp_path, world, "compress", *MODEL.split(), *save, *sizes))
    models = check_pruned(tmp_path, "big/iter_0000002", "small/release", read[-4:])

    again = ("--load", str(tmp_path / "distilled"), "--save", str(tmp_path / "distilled"))
    start = ("--use-checkpoint-args", "--pretrained-checkpoint", str(tmp_path / "small"))
    distil = ("--minitron-teacher", str(tmp_path / "big"), "--save-wgrads-interval", "1")
    read = together(megatron_lm(tmp_path, world, "distil", *start, *again, *distil))
    own = ranks.run(world, gradients, models, LAYOUTS[world][0], read[:2])
    for rank, (_, mine) in enumerate(own):
        place = f"mp_rank_{rank % 2:02}" + (f"_{rank // 2:03}" if world > 1 else "")
        file = tmp_path / "distilled" / "wgrads" / "iter_0000001" / f"{place}.pth"
        check_gradients(torch.load(file)["model_chunk0"], mine)
