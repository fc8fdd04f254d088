"""``minitron export``: a Megatron checkpoint becomes a Hugging Face folder."""

import json
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.checkpoint.artifact import check_output, output_folder
from nemo_minitron.checkpoint.lineage import README, copy_licence_texts, model_sizes, read_lineage
from nemo_minitron.checkpoint.tokenizer import AUTO_MAP, TOKENIZER_CONFIG, save_tokenizer
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.stages import ExportConfig
from nemo_minitron.documents import read_json_object
from nemo_minitron.families.experts import warn_of_expert_sizes
from nemo_minitron.families.registry import family_of, written_config
from nemo_minitron.families.table import parameter_count
from nemo_minitron.reporting.model_card import model_card
from nemo_minitron.runtime.console import progress, show_table
from nemo_minitron.stages.settings import open_inputs

if TYPE_CHECKING:
    from nemo_minitron.checkpoint.lazy import Store


def _open(cfg: ExportConfig) -> "tuple[ModelConfig, Store]":
    """Sizes and store under Hugging Face names; only metadata is read."""
    from nemo_minitron.checkpoint.hf import to_hf
    from nemo_minitron.checkpoint.lazy import on_read, refuse_nonfinite
    from nemo_minitron.checkpoint.torch_dist import read_torch_dist

    folder = Path(cfg.checkpoint) / "checkpoint"
    config = ModelConfig.load(folder)
    family = family_of(config)
    store = read_torch_dist(folder, family, config)
    store = on_read(store, partial(refuse_nonfinite, key="checkpoint"))
    return config, to_hf(family, config, store)


def _drop_auto_map(path: Path) -> None:
    """Drop the key that names Python files, which are not carried over, and change nothing else."""
    values = read_json_object(path) if path.is_file() else {}
    if AUTO_MAP in values:
        del values[AUTO_MAP]
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")


def check(cfg: ExportConfig) -> None:
    """Refuse bad input; weights are hashed but not loaded.

    Raises:
        ValueError: the checkpoint is not a complete, intact result, max_shard_size is not a size,
            or the output folder cannot take the result.
    """
    check_output(cfg, "export")
    open_inputs(cfg, cfg.verify_inputs)
    from nemo_minitron.checkpoint.hf import split_shards  # torch: what is above needs none

    config, store = _open(cfg)
    warn_of_expert_sizes(config)
    split_shards(store, cfg.max_shard_size)


def run(cfg: ExportConfig) -> None:
    """Write config.json, safetensors, tokenizer, README.md and ``metrics.json``."""
    from nemo_minitron.checkpoint.hf import copy_generation_config, write_hf
    from nemo_minitron.checkpoint.lazy import on_done

    start = time.perf_counter()
    config, store = _open(cfg)
    tokenizer = Path(cfg.checkpoint) / "checkpoint" / "tokenizer"
    with output_folder(cfg, "export") as work:
        with progress("exporting tensors", len(store)) as advance:
            counted = on_done(store, advance)
            files = write_hf(work, counted, written_config(config), cfg.max_shard_size, cfg.workers)
        if tokenizer.is_dir():
            save_tokenizer(tokenizer, work)
            _drop_auto_map(work / TOKENIZER_CONFIG)
            copy_generation_config(tokenizer, work)
            copy_licence_texts(tokenizer, work)
        title = Path(cfg.output_dir).resolve().name
        card = model_card(title, config, read_lineage(tokenizer.parent))
        (work / README).write_text(card, encoding="utf-8")
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
