"""Reads the files of ``modelopt_prune.py`` back into this package's shapes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


@dataclass(frozen=True)
class Peer:
    """What ModelOpt made of one model, read back from all its pipeline ranks."""

    folder: Path
    ranks: int
    samples: int

    def scores(self, model: str) -> dict[str, torch.Tensor]:
        """Axis -> scores shaped as ours."""
        found = self._merged(f"{model}.scores")
        layers = len(found["layer"])
        for axis in ("ffn", "head"):
            found[axis] = torch.stack([found.pop(f"{axis}.{layer}") for layer in range(layers)])
        found["layer"] /= self.samples  # summed over the forward calls
        return found

    def weights(self, model: str, target: str) -> dict[str, torch.Tensor]:
        """Megatron name -> pruned tensor in rank order."""
        return self._merged(f"{model}.{target}")

    def orders(self, model: str, target: str) -> dict[str, Any]:
        """Kept indices in rank order, shaped as a ``Plan``'s."""
        ranks = [json.loads(p.read_text()) for p in self._files(f"{model}.{target}", "json")]
        merged = {"layers": ranks[0]["layers"], "hidden": ranks[0]["hidden"]}
        for rank in ranks[1:]:
            assert (rank["layers"], rank["hidden"]) == (merged["layers"], merged["hidden"])
        for axis in ("ffn", "head"):
            by_layer = {int(k): v for rank in ranks for k, v in rank[axis].items()}
            merged[axis] = [by_layer[layer] for layer in range(len(by_layer))]
        return merged

    def _files(self, stem: str, suffix: str) -> list[Path]:
        return [self.folder / f"{stem}.{rank}.{suffix}" for rank in range(self.ranks)]

    def _merged(self, stem: str) -> dict[str, torch.Tensor]:
        merged: dict[str, torch.Tensor] = {}
        for file in self._files(stem, "safetensors"):
            part = load_file(file)
            assert not part.keys() & merged.keys()
            merged |= part
        return merged
