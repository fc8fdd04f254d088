"""``minitron importance``: forward passes over calibration text become scores."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.checkpoint.artifact import check_output
from nemo_minitron.config.layout import check_layout
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.stages import ImportanceConfig
from nemo_minitron.data.checks import check_batches, check_data
from nemo_minitron.pruning.scores import check_axes, check_block_sizes, check_moments
from nemo_minitron.runtime.ranks import launched_world_size
from nemo_minitron.stages.settings import check_settings, open_checkpoint

if TYPE_CHECKING:
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
    open_checkpoint(cfg, "size")
    folder = Path(cfg.checkpoint) / "checkpoint"
    config = ModelConfig.load(folder)
    check_axes(config, cfg.scores.axes)
    check_block_sizes(config, cfg.scores)
    check_moments(config, cfg.scores.moments)
    check_layout(config, cfg.parallel)
    check_settings(cfg, config)
    check_batches(cfg.data, cfg.parallel, cfg.parallel.world_size(launched_world_size()))
    check_data(
        cfg.data,
        vocab_size=config.vocab_size,
        tokenizer_dir=folder / "tokenizer",
        max_seq_length=config.max_seq_length,
    )
    if cfg.verify_inputs != "size":
        open_checkpoint(cfg, cfg.verify_inputs)


def run(cfg: ImportanceConfig) -> None:
    """Write ``scores.safetensors``, ``scores.json`` and ``metrics.json``; on every rank."""
    from nemo_minitron.checkpoint.artifact import Ranks, output_folder
    from nemo_minitron.runtime.launch import barrier, distributed
    from nemo_minitron.runtime.ranks import rank

    with distributed(cfg.parallel, cfg.data.seed):
        from nemo_minitron.stages.calibrate import calibrate

        ranks = Ranks(rank(), barrier)
        folder = output_folder(cfg, "importance", resumable=True, ranks=ranks)
        with folder as work:
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
            if ranks.rank == 0:
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


def _report(cfg: ImportanceConfig, scores: "Scores", metrics: dict[str, Any]) -> None:
    from nemo_minitron.runtime.console import show_table

    rows = [
        [
            axis,
            " x ".join(str(size) for size in tensor.shape),
            *(f"{x:.4g}" for x in (tensor.min(), tensor.median(), tensor.max())),
        ]
        for axis, tensor in scores.items()
    ]
    rows.append(["result", cfg.output_dir, "", "", ""])
    show_table(
        f"importance ({metrics['num_tokens']:,} tokens, {metrics['tokens_per_second']:,.0f} per s)",
        ("axis", "scores", "lowest", "median", "highest"),
        rows,
    )
