"""Importance scores of a model and their files. Imports torch only where tensors are touched."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.config.stages import BLOCK_CRITERIA, SCORE_AXES, ScoreConfig
from nemo_minitron.documents import read_json_object

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_minitron.config.model import ModelConfig

SCORES_FILE = "scores.safetensors"
META_FILE = "scores.json"
MOMENTS = "moments"
AXES = (
    "hidden",
    "ffn",
    "head",
    "expert",
    "expert_ffn",
    "shared_expert_ffn",
    "layer",
    "layer_lm_loss",
)
_FORMAT = 1
# What must agree between the model that was scored and the model that is pruned.
_MODEL_KEYS = (
    "family",
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "kept_layers",
    "num_moe_experts",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
)


@dataclass
class Scores:
    """One number per index of each scored axis: global, fp32, higher = keep.

    An axis that was not scored is None. The files do not depend on the layout they were made at.
    """

    hidden: Tensor | None = None
    """``[h]``, summed over all input and pre-MLP norms."""
    ffn: Tensor | None = None
    """``[layers, f]``."""
    head: Tensor | None = None
    """``[layers, n]`` query heads."""
    expert: Tensor | None = None
    """``[layers, num_moe_experts]``."""
    expert_ffn: Tensor | None = None
    """``[layers, num_moe_experts, f]``."""
    shared_expert_ffn: Tensor | None = None
    """``[layers, f]`` of the shared expert."""
    layer: Tensor | None = None
    """``[layers]`` block influence."""
    layer_lm_loss: Tensor | None = None
    """``[layers]`` LM loss (nats per token) without the layer; ``meta['lm_loss']`` is with all."""
    blocks: dict[str, Tensor] = field(default_factory=dict)
    """``<criterion>.<n>`` -> ``[layers - n + 1]``, one per block of n layers by its first layer:
    ``block_angular.n`` (angle between input and output, 1 is pi), ``block_lm_loss.n`` (LM loss
    without the block)."""
    meta: dict[str, Any] = field(default_factory=dict)
    """``model`` sizes, ``aggregation``, ``data``, ``num_samples``, ``num_tokens``."""

    def axes(self) -> dict[str, Tensor]:
        """The scored axes by name."""
        found = {axis: getattr(self, axis) for axis in AXES} | self.blocks
        return {axis: tensor for axis, tensor in found.items() if tensor is not None}

    def save(self, folder: Path) -> None:
        """Write ``scores.safetensors`` and ``scores.json`` into ``folder``."""
        from safetensors.torch import save

        tensors = {axis: tensor.detach().cpu().contiguous() for axis, tensor in self.axes().items()}
        (folder / SCORES_FILE).write_bytes(save(tensors))
        meta = {"format": _FORMAT, "axes": list(tensors), **self.meta}
        (folder / META_FILE).write_text(json.dumps(meta, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Scores:
        """Read what ``save`` wrote.

        Raises:
            ValueError: a file is missing or damaged, or a score is not finite.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        meta = read_meta(folder)
        try:
            tensors = load_file(folder / SCORES_FILE)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{folder / SCORES_FILE} cannot be read: {error}") from error
        blocks = {name: tensors.pop(name) for name in list(tensors) if "." in name}
        scores = cls(meta=meta, blocks=blocks, **tensors)
        check_finite(scores)
        return scores


def moment_file(folder: Path, axis: str, index: int) -> Path:
    """File of one matrix of second moments.

    Args:
        folder: result of ``importance``.
        axis: ``ffn``, ``head`` or ``hidden``.
        index: global layer; for ``hidden`` 2 x layer is its input norm, 2 x layer + 1 its pre-MLP
            norm, 2 x ``num_layers`` the final norm.
    """
    return folder / MOMENTS / f"{axis}.{index}.safetensors"


def layer_scores(criterion: str, dropped: int) -> str:
    """Name of the scores that choose which ``dropped`` layers go.

    Args:
        criterion: one of ``config.stages.LAYER_CRITERIA``.
        dropped: layers that go.
    """
    if criterion in BLOCK_CRITERIA:
        return f"{criterion}.{dropped}"
    return {"block_influence": "layer", "lm_loss": "layer_lm_loss"}[criterion]


def how_to_score(name: str) -> str:
    """The keys of ``minitron importance`` that make the scores called ``name``."""
    criterion, _, size = name.partition(".")
    if size:
        return f"scores.layer_criteria including {criterion}, scores.block_sizes including {size}"
    if name == "layer_lm_loss":
        return "scores.layer_criteria including lm_loss"
    if name == "layer":
        return "scores.axes including layer, scores.layer_criteria including block_influence"
    return f"scores.axes including {name}"


def check_block_sizes(config: ModelConfig, scores: ScoreConfig) -> None:
    """Refuse blocks that are as long as the model.

    Raises:
        ValueError: names them and the longest block there is.
    """
    long = [size for size in scores.block_sizes if size >= config.num_layers]
    if long:
        raise ValueError(
            f"scores.block_sizes holds {long}, but a block must leave at least one of the model's "
            f"num_layers={config.num_layers}; use at most {config.num_layers - 1}"
        )


def check_finite(scores: Scores) -> None:
    """Refuse scores that rank nothing.

    Raises:
        ValueError: a score is NaN or infinite.
    """
    for axis, tensor in scores.axes().items():
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise ValueError(
                f"{bad} of {tensor.numel()} {axis} scores are NaN or infinite: the model's "
                "activations are; check the checkpoint (minitron evaluate) and the calibration data"
            )


def check_axes(config: ModelConfig, axes: list[str]) -> None:
    """Refuse a scoring that would score nothing: axes that a model lacks are left out.

    Raises:
        ValueError: none of the axes exists in this model.
    """
    dense, shared = config.num_moe_experts is None, config.moe_shared_expert_intermediate_size
    lacking = ["expert", "expert_ffn"] if dense else ["ffn"]
    if shared is None:
        lacking.append("shared_expert_ffn")
    if set(axes) <= set(lacking):
        what = "no experts" if dense else "experts in every layer"
        if not dense and shared is None:
            what += ", none of them shared"
        raise ValueError(
            f"scores.axes={axes} holds no axis of this model, which has {what}; set scores.axes to "
            f"some of {[axis for axis in SCORE_AXES if axis not in lacking]}"
        )


def check_moments(config: ModelConfig, axes: list[str]) -> None:
    """Refuse second moments that would compensate nothing.

    Raises:
        ValueError: the layers have experts in place of one ffn, or the norms are no RMSNorms.
    """
    if "ffn" in axes and config.num_moe_experts is not None:
        raise ValueError(
            f"scores.moments={axes} holds ffn, but the layers of this model have experts, whose "
            "channels cannot be compensated; leave ffn out"
        )
    if "hidden" in axes and config.normalization != "RMSNorm":
        raise ValueError(
            f"scores.moments={axes} holds hidden, but this model has normalization="
            f"{config.normalization}: only RMSNorms are compensated; leave hidden out"
        )


def model_meta(config: ModelConfig) -> dict[str, Any]:
    """The part of a model's config that its scores depend on, for ``Scores.meta['model']``."""
    return {key: getattr(config, key) for key in _MODEL_KEYS}


def read_meta(folder: Path) -> dict[str, Any]:
    """``scores.json`` of a result folder, without torch.

    Raises:
        ValueError: the file is missing, damaged or of another version.
    """
    path = folder / META_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no {META_FILE}; set importance to the output_dir of "
            "minitron importance"
        )
    meta = read_json_object(path)
    if meta.get("format") != _FORMAT or not isinstance(meta.get("model"), dict):
        raise ValueError(
            f"{path} is not a format-{_FORMAT} scores file; run minitron importance again"
        )
    return meta


def check_model(config: ModelConfig, meta: dict[str, Any]) -> None:
    """Refuse scores of a different model.

    Args:
        config: the model to prune.
        meta: ``scores.json``.

    Raises:
        ValueError: names every size that differs.
    """
    scored, mine = meta["model"], model_meta(config)
    different = [
        f"{key}={scored.get(key)} (checkpoint: {mine[key]})"
        for key in _MODEL_KEYS
        if scored.get(key) != mine[key]
    ]
    if different:
        raise ValueError(
            f"importance belongs to a different model: {', '.join(different)}; set importance to "
            "scores of this checkpoint (minitron importance checkpoint=<the same folder>)"
        )
