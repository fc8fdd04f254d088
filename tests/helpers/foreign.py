"""Checkpoints that other programs wrote, in tests/data/foreign; README.md there says how."""

import tarfile
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parents[1] / "data" / "foreign"


def unpack(name: str, to: Path) -> Path:
    """The folder of a checkpoint as the program left it."""
    with tarfile.open(FOLDER / f"{name}.tar.xz", "r:xz") as tar:
        tar.extractall(to, filter="data")
    return to / name


def logits(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens ``[2, 24]`` and what the program's own forward pass makes of them, ``[2, 24, v]``."""
    said = np.load(folder / "logits.npz")
    return torch.from_numpy(said["ids"]), torch.from_numpy(said["logits"])
