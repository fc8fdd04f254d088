"""Refit kept weights to replace pruned ones by least squares on second moments. Pure torch.

Cutting channels of x turns ``W x`` into ``W_k x_k``. With the second moments of x the cut channels
are predicted from the kept ones, ``x_c ~ P x_k``, and ``W_k + W_c P`` takes the place of ``W_k``:
the linear map of least squared error over the calibration, drawn by ridge towards plain cutting.

- ``ffn``, ``head``: the columns of ``linear_fc2`` and ``linear_proj``.
- ``hidden``: the columns of every linear layer that reads a norm. The norm itself divides by the
  root mean square of fewer channels; a factor on its weight restores what it was on average. A tied
  output layer is only cut: its columns are the input embeddings too.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.stages import PruningConfig
from nemo_minitron.families.table import Row
from nemo_minitron.pruning.scores import moment_file

_OUTPUT = "output_layer.weight"
# Norms whose output the moments of ``hidden`` are of; others (OLMo-2's) are only cut.
_INPUT_NORMS = ("input_layernorm.weight", "pre_mlp_layernorm.weight")


def column_map(moment: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """Return how the columns of a linear layer are added up into those that stay.

    Args:
        moment: ``[w, w]`` second moments of its input.
        kept: ``[k]`` indices of the columns that stay.
        ridge: multiple of the mean kept diagonal that is added to the diagonal.

    Returns:
        ``[w, k]`` fp32: kept channels stay themselves, cut ones are predicted from them.
    """
    moment = moment.double()
    cut = torch.ones(len(moment), dtype=torch.bool)
    cut[kept] = False
    inner = moment[kept][:, kept]
    inner = inner + ridge * inner.diagonal().mean() * torch.eye(len(kept), dtype=inner.dtype)
    columns = torch.zeros(len(moment), len(kept))
    columns[kept, torch.arange(len(kept))] = 1.0
    predicted = torch.cholesky_solve(moment[kept][:, cut], torch.linalg.cholesky(inner))
    columns[cut] = predicted.t().float()
    return columns


def norm_factor(moment: Tensor, weight: Tensor, kept: Tensor) -> float:
    """Return the ratio of the root mean squares of the kept channels and of all channels.

    Args:
        moment: ``[h, h]`` second moments of the norm's output.
        weight: ``[k]`` what the norm multiplies the kept channels by.
        kept: ``[k]`` indices of the channels that stay.
    """
    squares = moment.diagonal()[kept].double() / weight.double().square()
    return math.sqrt(squares[weight != 0].mean().item())


class Compensation:
    """Changes the tensors of one pruned model."""

    def __init__(
        self, axes: list[str], ridge: float, moment: Callable[[str, int], Tensor], maps: int = 2
    ) -> None:
        """Store the arguments; moments are read and systems solved later.

        Args:
            axes: out of ``config.stages.COMPENSATED_AXES``; each is cut by the plan.
            ridge: of all least squares.
            moment: axis, index (``pruning.scores.moment_file``) -> second moments.
            maps: column maps in memory at a time.
        """
        self.axes, self.ridge, self.moment = axes, ridge, moment
        self._columns = lru_cache(maxsize=maps)(self._solve)

    @classmethod
    def of_result(cls, folder: Path, pruning: PruningConfig, workers: int) -> "Compensation":
        """Create the compensation from the moments in a result of ``importance``."""
        from safetensors.torch import load_file

        def moment(axis: str, index: int) -> Tensor:
            return load_file(moment_file(folder, axis, index))["moment"]

        return cls(pruning.compensate, pruning.ridge, moment, maps=workers)

    def change(
        self, row: Row, config: ModelConfig, layer: int | None, kept: Tensor | None
    ) -> Callable[[Tensor], Tensor] | None:
        """Return the function that refits rows of a tensor whose rows, not columns, have been cut.

        Args:
            row: of the tensor.
            config: the model before pruning.
            layer: of the tensor, before pruning; None for tensors outside the layers.
            kept: indices of its last dim that stay, or None if all stay.

        Returns:
            ``[r, w]`` -> ``[r, k]``, or ``[k]`` -> ``[k]`` for the weight of a norm; None for a
            tensor that is only cut.
        """
        found = None if kept is None else self._input(row, config, layer or 0)
        if kept is None or found is None:
            return None
        (axis, index), channels = found, tuple(kept.tolist())
        if len(row.dims) == 2:
            return lambda rows: _mapped(rows, self._columns(axis, index, channels))
        around = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        return lambda weight: self._norm(weight, index, kept, around)

    def _input(self, row: Row, config: ModelConfig, layer: int) -> tuple[str, int] | None:
        """Return the axis and index of the moments of what a tensor reads or scales."""
        last = row.dims[-1]
        if last not in self.axes:
            return None
        if last in ("ffn", "head"):
            return (last, layer) if len(row.dims) == 2 else None
        norm = _norm_index(row, layer, config)
        return None if norm is None else ("hidden", norm)

    def _solve(self, axis: str, index: int, kept: tuple[int, ...]) -> Tensor:
        return column_map(self.moment(axis, index), torch.tensor(kept), self.ridge)

    def _norm(self, weight: Tensor, index: int, kept: Tensor, around: float) -> Tensor:
        """Return the weight of a norm that multiplies by ``around`` and the weight together."""
        gain = weight.double() + around
        factor = norm_factor(self.moment("hidden", index), gain, kept)
        return (gain * factor - around).to(weight.dtype)


def _mapped(rows: Tensor, columns: Tensor) -> Tensor:
    return (rows.float() @ columns).to(rows.dtype)


def _norm_index(row: Row, layer: int, config: ModelConfig) -> int | None:
    """Index of the norm that a tensor belongs to, or whose output it reads; None for others."""
    if row.name in ("decoder.final_layernorm.weight", _OUTPUT):
        return 2 * config.num_layers
    writes = row.dims[0] == "hidden" and not row.name.endswith(_INPUT_NORMS)
    if writes or not row.per_layer:
        return None
    if "self_attention." in row.name or "input_layernorm." in row.name:
        return 2 * layer
    return 2 * layer + 1
