"""Compare the results of another program's training loop with those of the stages."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_minitron.checkpoint.torch_dist import read_torch_dist
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.registry import family_of
from nemo_minitron.pruning.plan import Plan
from nemo_minitron.pruning.scores import Scores

SIZES = ("hidden_size=48", "ffn_hidden_size=96", "num_attention_heads=4", "num_layers=2")


def minitron(stage: str, *overrides: object) -> None:
    """Run a stage as a user does."""
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
    """Return the config of a model and its whole tensors."""
    config = ModelConfig.load(result / "checkpoint")
    found = read_torch_dist(result / "checkpoint", family_of(config), config)
    return config, {name: tensor.read() for name, tensor in found.items()}


def check_pruned(
    folder: Path, big: str, small: str, read: Sequence[dict[str, torch.Tensor]]
) -> list[tuple[ModelConfig, str]]:
    """Compare scores, plan and weights in ``folder`` with those of the stages.

    Args:
        folder: holds the checkpoints, and ``small/`` the scores and the plan.
        big: checkpoint of the model, in ``folder``.
        small: checkpoint of what was left of it, likewise.
        read: the micro-batches that it was scored on.

    Returns:
        Student and teacher: what they are, and their checkpoints.
    """
    np.save(folder / "ids.npy", torch.cat([batch["tokens"] for batch in read]).numpy())
    teacher, student = folder / "teacher", folder / "student"
    for source, result in ((big, teacher), (small, student)):
        minitron("import", f"source={folder / source}", f"output_dir={result}")
    data = (f"data.path={folder}/ids.npy", "data.seq_length=32", "data.num_samples=8")
    minitron("importance", f"checkpoint={teacher}", *data, f"output_dir={folder}/scores")
    targets = [f"pruning.target.{size}" for size in SIZES]
    inputs = (f"checkpoint={teacher}", f"importance={folder}/scores")
    minitron("prune", *inputs, *targets, f"output_dir={folder}/pruned")

    theirs, ours = (Scores.load(folder / name) for name in ("small", "scores"))
    assert theirs.keys() == ours.keys()
    for axis, values in ours.items():
        torch.testing.assert_close(theirs[axis], values, rtol=1e-5, atol=0)
    assert Plan.load(folder / "small") == Plan.load(folder / "pruned")
    config, found = weights(student)
    _, expected = weights(folder / "pruned")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    return [(config, f"{student}/checkpoint"), (weights(teacher)[0], f"{teacher}/checkpoint")]


def check_gradients(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> None:
    """Compare the gradients that a rank has."""
    assert theirs.keys() == ours.keys()
    for name, gradient in ours.items():
        # Without tensor parallelism their vocabulary alone is padded.
        difference = (theirs[name][: len(gradient)] - gradient).abs().max()
        assert difference < 1e-4 * gradient.abs().max(), name
