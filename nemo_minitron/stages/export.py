"""``minitron export``: a Megatron checkpoint becomes a Hugging Face folder."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.checkpoint.artifact import check_output, output_folder
from nemo_minitron.checkpoint.lineage import model_sizes
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.stages import ExportConfig
from nemo_minitron.families.experts import warn_of_expert_sizes
from nemo_minitron.families.registry import family_of
from nemo_minitron.families.table import parameter_count
from nemo_minitron.reporting.hf_folder import open_store, write_folder
from nemo_minitron.runtime.console import show_table
from nemo_minitron.stages.settings import open_inputs

if TYPE_CHECKING:
    from nemo_minitron.checkpoint.lazy import Store


def check(cfg: ExportConfig) -> None:
    """Refuse bad input; weights are hashed but not loaded.

    Raises:
        ValueError: the checkpoint is not a complete, intact result, max_shard_size is not a size,
            or the output folder cannot take the result.
    """
    check_output(cfg, "export")
    open_inputs(cfg, cfg.verify_inputs)
    from nemo_minitron.checkpoint.hf import split_shards  # torch: what is above needs none

    config, store = open_store(Path(cfg.checkpoint) / "checkpoint")
    family_of(config).to_hf(config)  # refuses sizes that config.json cannot say
    warn_of_expert_sizes(config)
    split_shards(store, cfg.max_shard_size)


def run(cfg: ExportConfig) -> None:
    """Write config.json, safetensors, tokenizer, README.md and ``metrics.json``."""
    start, checkpoint = time.perf_counter(), Path(cfg.checkpoint) / "checkpoint"
    config, store = open_store(checkpoint)
    with output_folder(cfg, "export") as work:
        files = write_folder(
            checkpoint,
            work,
            title=Path(cfg.output_dir).resolve().name,
            max_shard_size=cfg.max_shard_size,
            workers=cfg.workers,
        )
        metrics = _metrics(config, store, files, time.perf_counter() - start)
        (work / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    _report(cfg, config, metrics)


def _metrics(
    config: ModelConfig, store: "Store", files: list[str], seconds: float
) -> dict[str, Any]:
    from nemo_minitron.checkpoint.lazy import store_nbytes

    return {
        "parameters": parameter_count(family_of(config), config)["total"],
        "bytes": store_nbytes(store),
        "dtype": config.dtype,
        "files": files,
        "seconds": round(seconds, 3),
    }


def _report(cfg: ExportConfig, config: ModelConfig, metrics: dict[str, Any]) -> None:
    rows = [
        ["parameters", f"{metrics['parameters']:,}"],
        *[[name, str(size)] for name, size in model_sizes(config).items()],
        ["files", str(len(metrics["files"]))],
        ["size on disk", f"{metrics['bytes'] / 1e6:,.0f} MB"],
        ["seconds", f"{metrics['seconds']:.1f}"],
        ["result", cfg.output_dir],
    ]
    show_table("export", ("", config.family), rows)
