"""``minitron importance``: forward passes over calibration text become scores."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.checkpoint.artifact import check_output
from nemo_minitron.config.axes import AXES, Scope, layers_with
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.stages import ImportanceConfig
from nemo_minitron.pruning.scores import check_axes, check_block_sizes, check_moments
from nemo_minitron.runtime.ranks import rank
from nemo_minitron.stages.settings import check_forward, on_ranks, opened_inputs

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_minitron.pruning.scores import Scores
    from nemo_minitron.stages.calibrate import Calibrated


def check(cfg: ImportanceConfig) -> None:
    """Refuse bad input before any rank or weight exists.

    Raises:
        ValueError: the checkpoint is no intact result, the model does not fit the layout, the data
            are missing, too little or do not fit the layout, blocks do not fit the model, or the
            output folder is taken.
    """
    check_output(cfg, "importance")
    with opened_inputs(cfg):
        config = ModelConfig.load(Path(cfg.checkpoint) / "checkpoint")
        check_axes(config, cfg.scores.axes)
        check_block_sizes(config, cfg.scores)
        check_moments(config, cfg.scores.moments)
        check_forward(cfg, config, cfg.data)


def run(cfg: ImportanceConfig) -> None:
    """Write ``scores.safetensors``, ``scores.json`` and ``metrics.json``; on every rank."""
    with on_ranks(cfg, "importance", cfg.parallel, cfg.data.seed, resumable=True) as work:
        from nemo_minitron.stages.calibrate import calibrate

        calibrated = calibrate(
            Path(cfg.checkpoint) / "checkpoint",
            cfg.data,
            cfg.parallel,
            cfg.scores,
            cfg.megatron,
            output_dir=cfg.output_dir,
            work=work,
            save_every=cfg.save_every_n_samples,
        )
        metrics = _metrics(calibrated)
        if rank() == 0:
            calibrated.scores.save(work)
            (work / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    _report(cfg, calibrated.scores, metrics)


def _metrics(calibrated: "Calibrated") -> dict[str, Any]:
    metrics, scores = calibrated.figures(), calibrated.scores
    if "layer" in scores:
        metrics["block_influence"] = [round(x, 6) for x in scores["layer"].tolist()]
    if "lm_loss" in scores.meta:
        metrics["lm_loss"] = whole = scores.meta["lm_loss"]
        metrics["lm_loss_increase"] = {
            name: [round(x - whole, 6) for x in values.tolist()]
            for name, values in scores.items()
            if "lm_loss" in name
        }
    return metrics


def _of_layers_that_have_it(result: Path, scores: "Scores") -> dict[str, "Tensor"]:
    """Return the scores without the zeros of layers that do not have the axis."""
    config = ModelConfig.load(result / "checkpoint")
    inside = {a.name: layers_with(config, a) for a in AXES.values() if a.scope is not Scope.MODEL}
    return {
        axis: tensor[inside[axis]] if axis in inside else tensor for axis, tensor in scores.items()
    }


def _report(cfg: ImportanceConfig, scores: "Scores", metrics: dict[str, Any]) -> None:
    from nemo_minitron.runtime.console import show_table

    rows = [
        [
            axis,
            " x ".join(str(size) for size in tensor.shape),
            *(f"{x:.4g}" for x in (tensor.min(), tensor.median(), tensor.max())),
        ]
        for axis, tensor in _of_layers_that_have_it(Path(cfg.checkpoint), scores).items()
    ]
    rows.append(["result", cfg.output_dir, "", "", ""])
    show_table(
        f"importance ({metrics['num_tokens']:,} tokens, {metrics['tokens_per_second']:,.0f} per s)",
        ("axis", "scores", "lowest", "median", "highest"),
        rows,
    )
