"""``minitron importance``: forward passes over calibration text become scores."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.checkpoint.artifact import check_output, open_result
from nemo_minitron.config.layout import check_layout
from nemo_minitron.config.model import MODEL_YAML, ModelConfig
from nemo_minitron.config.stages import ImportanceConfig
from nemo_minitron.data.checks import check_batches, check_data
from nemo_minitron.runtime.ranks import launched_world_size

if TYPE_CHECKING:
    from nemo_minitron.importance.scores import Scores


def check(cfg: ImportanceConfig) -> None:
    """Refuse bad input before any rank or weight exists.

    Raises:
        ValueError: the checkpoint is no intact result, the model does not fit the layout, the data
            are missing, too little or do not fit the layout, or the output folder is taken.
    """
    check_output(cfg, "importance")
    _open_checkpoint(cfg, "size")
    folder = Path(cfg.checkpoint) / "checkpoint"
    config = ModelConfig.load(folder)
    check_layout(config, cfg.parallel)
    check_batches(cfg.data, cfg.parallel, cfg.parallel.world_size(launched_world_size()))
    check_data(cfg.data, vocab_size=config.vocab_size, tokenizer_dir=folder / "tokenizer")
    if cfg.verify_inputs != "size":
        _open_checkpoint(cfg, cfg.verify_inputs)


def _open_checkpoint(cfg: ImportanceConfig, verify: str) -> None:
    open_result(
        cfg.checkpoint,
        verify,
        key="checkpoint",
        needs=f"checkpoint/{MODEL_YAML}",
        workers=cfg.workers,
    )


def run(cfg: ImportanceConfig) -> None:
    """Write ``scores.safetensors``, ``scores.json`` and ``metrics.json``; on every rank."""
    from nemo_minitron.checkpoint.artifact import Ranks, output_folder
    from nemo_minitron.runtime.launch import barrier, distributed
    from nemo_minitron.runtime.ranks import rank

    with distributed(cfg.parallel, cfg.data.seed):
        ranks = Ranks(rank(), barrier)
        with output_folder(cfg, "importance", ranks=ranks) as work:
            scores, seconds = _estimate(cfg)
            metrics = _metrics(scores, seconds)
            if ranks.rank == 0:
                scores.save(work)
                (work / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    _report(cfg, scores, metrics)


def _estimate(cfg: ImportanceConfig) -> "tuple[Scores, float]":
    """Data, model, forward passes; returns global scores and the seconds the passes took."""
    import torch

    from nemo_minitron.importance.estimate import estimate_scores
    from nemo_minitron.models.build import DTYPES, build_gpt
    from nemo_minitron.models.stage_data import stage_dataset
    from nemo_minitron.models.weights import load_weights
    from nemo_minitron.reporting.console import progress
    from nemo_minitron.runtime.groups import ParallelGroups
    from nemo_minitron.runtime.launch import device

    folder = Path(cfg.checkpoint) / "checkpoint"
    config = ModelConfig.load(folder)
    dataset = stage_dataset(cfg.data, config, folder, cfg.output_dir)
    groups = ParallelGroups.current()
    # CPUs have no fast path for half precision.
    dtype = DTYPES[config.dtype] if torch.cuda.is_available() else torch.float32
    chunks = build_gpt(config, cfg.parallel, groups, dtype=dtype)
    for chunk in chunks:
        chunk.to(device())
    load_weights(chunks, groups, folder)
    start = time.perf_counter()
    with progress("scoring samples", len(dataset)) as advance:
        scores = estimate_scores(chunks, config, groups, dataset, cfg.data, cfg.scores, advance)
    scores.meta["data"] = {
        key: getattr(cfg.data, key) for key in ("seq_length", "split", "split_name", "seed")
    }
    return scores, time.perf_counter() - start


def _metrics(scores: "Scores", seconds: float) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        "num_samples": scores.meta["num_samples"],
        "num_tokens": scores.meta["num_tokens"],
        "seconds": round(seconds, 3),
        "tokens_per_second": round(scores.meta["num_tokens"] / seconds, 1),
    }
    if scores.layer is not None:
        metrics["block_influence"] = [round(x, 6) for x in scores.layer.tolist()]
    return metrics


def _report(cfg: ImportanceConfig, scores: "Scores", metrics: dict[str, Any]) -> None:
    from nemo_minitron.reporting.console import show_table

    rows = [
        [
            axis,
            " x ".join(str(size) for size in tensor.shape),
            *(f"{x:.4g}" for x in (tensor.min(), tensor.median(), tensor.max())),
        ]
        for axis, tensor in scores.axes().items()
    ]
    rows.append(["result", cfg.output_dir, "", "", ""])
    show_table(
        f"importance ({metrics['num_tokens']:,} tokens, {metrics['tokens_per_second']:,.0f} per s)",
        ("axis", "scores", "lowest", "median", "highest"),
        rows,
    )
