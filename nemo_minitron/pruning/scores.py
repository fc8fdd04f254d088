"""Importance scores of a model and their files. Imports torch only where tensors are touched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.config.axes import AXES, axes_of, score_axes
from nemo_minitron.config.stages import BLOCK_CRITERIA, ScoreConfig
from nemo_minitron.documents import check_kinds, read_json_object

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_minitron.config.model import ModelConfig

SCORES_FILE = "scores.safetensors"
META_FILE = "scores.json"
MOMENTS = "moments"
_FORMAT = 1
# What must agree, besides the family and the sizes of all axes, between the model that was scored
# and the model that is pruned.
_MODEL_KEYS = ("kv_channels", "vocab_size", "kept_layers")


class Scores(dict[str, "Tensor"]):
    """Scores by name: one number per index, global, fp32, higher = keep.

    - The name of an axis (``config.axes``): ``[h]`` for ``hidden``, ``[layers, size]`` for an axis
      of scope ``LAYER``, ``[layers, experts, size]`` for one of scope ``EXPERT``. A query group has
      no scores of its own: those of its heads count.
    - ``layer``: ``[layers]`` block influence.
    - ``layer_lm_loss``: ``[layers]`` LM loss (nats per token) without the layer;
      ``meta["lm_loss"]`` is the loss with all of them.
    - ``<criterion>.<n>``: ``[layers - n + 1]``, one per block of n layers by its first layer.
      ``block_angular.n`` is the angle between its input and its output (1 is pi),
      ``block_lm_loss.n`` the LM loss without it.

    What was not scored is not in the mapping. The files do not depend on the layout that the scores
    were made at.

    Attributes:
        meta: ``model`` sizes, ``aggregation``, ``data``, ``num_samples``, ``num_tokens``.
    """

    def __init__(
        self,
        scores: Mapping[str, Tensor] | None = None,
        *,
        meta: dict[str, Any] | None = None,
        **named: Tensor,
    ) -> None:
        """Take scores by name, as ``dict`` does."""
        super().__init__(scores or {}, **named)
        self.meta: dict[str, Any] = {} if meta is None else meta

    def save(self, folder: Path) -> None:
        """Write ``scores.safetensors`` and ``scores.json`` into ``folder``."""
        from safetensors.torch import save

        tensors = {
            name: self[name].detach().cpu().contiguous() for name in sorted(self, key=stored_order)
        }
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
        scores = cls({name: tensors[name] for name in sorted(tensors, key=stored_order)}, meta=meta)
        check_finite(scores)
        return scores


def stored_order(name: str) -> tuple[int, str]:
    """Sort key of scores by name: the order in which they are shown and stored.

    Scores of layers come after those of the other axes, scores of blocks of layers come last.
    """
    order = [*(axis for axis in score_axes() if axis != "layer"), "layer", "layer_lm_loss"]
    return (order.index(name) if name in order else len(order)), name


def moment_file(folder: Path, axis: str, index: int) -> Path:
    """Return the file of one matrix of second moments.

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
    """Return the keys of ``minitron importance`` that make the scores called ``name``."""
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
    for axis, tensor in scores.items():
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
    owned = {axis.name for axis in axes_of(config)}
    if owned.isdisjoint(axes):
        what = "no experts" if dense else "experts in every layer"
        if not dense and shared is None:
            what += ", none of them shared"
        raise ValueError(
            f"scores.axes={axes} holds no axis of this model, which has {what}; set scores.axes to "
            f"some of {[axis for axis in score_axes() if axis in owned]}"
        )


def check_moments(config: ModelConfig, axes: list[str]) -> None:
    """Refuse second moments that would compensate nothing.

    Raises:
        ValueError: the model is a hybrid, the layers have experts in place of one ffn, or the norms
            are no RMSNorms.
    """
    if axes and config.hybrid_layer_pattern is not None:
        raise ValueError(
            f"scores.moments={axes} is not supported for hybrid models (hybrid_layer_pattern="
            f"{config.hybrid_layer_pattern}), whose layers cannot be compensated; set "
            "scores.moments=[], and leave pruning.compensate out"
        )
    if axes and config.linear_attention_freq is not None:
        raise ValueError(
            f"scores.moments={axes} is not supported for models with linear attention "
            "(linear_attention_freq), whose gated delta nets cannot be compensated; set "
            "scores.moments=[], and leave pruning.compensate out"
        )
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
    keys = dict.fromkeys(("family", *(axis.size for axis in AXES.values()), *_MODEL_KEYS))
    return {key: getattr(config, key) for key in keys}


def read_meta(folder: Path) -> dict[str, Any]:
    """Return ``scores.json`` of a result folder, without torch.

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
    if meta.get("format") != _FORMAT or not meta.keys() >= {"model", "axes"}:
        raise ValueError(
            f"{path} is not a format-{_FORMAT} scores file; run minitron importance again"
        )
    check_kinds(path, meta, {"model": dict, "axes": list, "aggregation": dict, "data": dict})
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
        f"{key}={scored.get(key)} (checkpoint: {value})"
        for key, value in mine.items()
        if scored.get(key) != value
    ]
    if different:
        raise ValueError(
            f"importance belongs to a different model: {', '.join(different)}; set importance to "
            "scores of this checkpoint (minitron importance checkpoint=<the same folder>)"
        )
