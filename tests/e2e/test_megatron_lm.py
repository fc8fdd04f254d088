"""``examples/megatron_lm`` in Megatron-LM itself, against the stages on its checkpoints.

``MEGATRON_LM`` names a checkout of core 0.19; ``tests/helpers/megatron_lm.py`` says what has to be
worked round where there is no GPU. Without it nothing runs.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_minitron.checkpoint.torch_dist import read_torch_dist
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.registry import family_of
from nemo_minitron.pruning.plan import Plan
from nemo_minitron.pruning.scores import Scores
from tests.cases.live_truth import layout
from tests.cases.megatron_lm import gradients
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
SIZES = ("hidden_size=48", "ffn_hidden_size=96", "num_attention_heads=4", "num_layers=2")
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


def minitron(stage: str, *overrides: object) -> None:
    command = [sys.executable, "-m", "nemo_minitron", stage, *map(str, overrides)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def together(read: list[Any]) -> list[dict[str, torch.Tensor]]:
    """Micro-batches as one rank without a pipeline reads them."""
    return [
        {
            "tokens": first["tokens"],
            "labels": last["labels"],
            "loss_mask": last["loss_mask"],
            "position_ids": first["position_ids"],
        }
        for first, last in zip(read[0], read[-1], strict=True)
    ]


def weights(result: Path) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    config = ModelConfig.load(result / "checkpoint")
    found = read_torch_dist(result / "checkpoint", family_of(config), config)
    return config, {name: tensor.read() for name, tensor in found.items()}


@needs_tree
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("world", LAYOUTS)
def test_its_own_loop(world: int, ranks: WorkerPool, tmp_path: Path) -> None:
    """Trained, scored, pruned and distilled there: scores, indices, weights and gradients."""
    save = ("--minitron-save", str(tmp_path / "small"), "--save", str(tmp_path / "big"))
    sizes = ("--minitron-targets", *SIZES)
    read = together(megatron_lm(tmp_path, world, "compress", *MODEL.split(), *save, *sizes))
    ids = torch.cat([batch["tokens"] for batch in read[-4:]])
    np.save(tmp_path / "ids.npy", ids.numpy())
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    for source, result in (("big/iter_0000002", teacher), ("small/release", student)):
        # Its tokenizer without tokens has 127; until core 0.16 it had one more.
        minitron("import", f"source={tmp_path / source}", f"output_dir={result}", "vocab_size=127")
    data = (f"data.path={tmp_path}/ids.npy", "data.seq_length=32", "data.num_samples=8")
    minitron("importance", f"checkpoint={teacher}", *data, f"output_dir={tmp_path}/scores")
    targets = [f"pruning.target.{size}" for size in SIZES]
    inputs = (f"checkpoint={teacher}", f"importance={tmp_path}/scores")
    minitron("prune", *inputs, *targets, f"output_dir={tmp_path}/pruned")

    theirs, ours = (Scores.load(tmp_path / name) for name in ("small", "scores"))
    assert theirs.keys() == ours.keys()
    for axis, values in ours.items():
        torch.testing.assert_close(theirs[axis], values, rtol=1e-5, atol=0)
    assert Plan.load(tmp_path / "small") == Plan.load(tmp_path / "pruned")
    config, found = weights(student)
    _, expected = weights(tmp_path / "pruned")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    again = ("--load", str(tmp_path / "distilled"), "--save", str(tmp_path / "distilled"))
    start = ("--use-checkpoint-args", "--pretrained-checkpoint", str(tmp_path / "small"))
    distil = ("--minitron-teacher", str(tmp_path / "big"), "--save-wgrads-interval", "1")
    read = together(megatron_lm(tmp_path, world, "distil", *start, *again, *distil))
    parallel = LAYOUTS[world][0]
    models = [(config, str(student / "checkpoint")), (weights(teacher)[0], f"{teacher}/checkpoint")]
    own = ranks.run(world, gradients, models, parallel, read[:2])
    for rank, mine in enumerate(own):
        place = f"mp_rank_{rank % 2:02}" + (f"_{rank // 2:03}" if world > 1 else "")
        file = tmp_path / "distilled" / "wgrads" / "iter_0000001" / f"{place}.pth"
        there = torch.load(file)["model_chunk0"]
        assert there.keys() == mine.keys()
        for name, gradient in mine.items():
            # Without tensor parallelism its vocabulary alone is padded.
            difference = (there[name][: len(gradient)] - gradient).abs().max()
            assert difference < 1e-4 * gradient.abs().max(), name
