"""``minitron import``: a model as others store it becomes a Megatron checkpoint of ours."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoint.artifact import check_output, output_folder
from nemo_minitron.checkpoint.lazy import (
    LazyTensor,
    Store,
    on_done,
    store_nbytes,
)
from nemo_minitron.checkpoint.lineage import copy_licence_texts, record
from nemo_minitron.checkpoint.source import Opened, open_source
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.stages import ImportConfig
from nemo_minitron.families.table import Family, parameter_count
from nemo_minitron.runtime.console import progress, show_table
from nemo_minitron.stages.recipe import import_entry

# Bytes of weights that ``check`` reads, in search of NaN: about a second on one core.
_READ_UP_TO = 1 << 30


def check(cfg: ImportConfig) -> None:
    """Refuse bad input; reads headers and the first weights.

    Raises:
        ValueError: see ``open_source``; or the output folder cannot take the result.
    """
    check_output(cfg, "import")
    opened = _open(cfg)
    _check_first_weights(opened.store, cfg.workers)


def _open(cfg: ImportConfig) -> Opened:
    arguments = (cfg.tokenizer, cfg.vocab_size, cfg.source_ignore, cfg.as_hybrid)
    return open_source(cfg.source, *arguments)


def _check_first_weights(store: Store, workers: int) -> None:
    """Read as many weights as takes a second; ``run`` finds NaN in the others as it reads them."""
    read, size = [], 0
    for tensor in store.values():
        size += tensor.nbytes
        if size <= _READ_UP_TO:
            read.append(tensor)
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(_read_and_drop, read):
            pass


def _read_and_drop(tensor: LazyTensor) -> None:
    tensor.read()


def run(cfg: ImportConfig) -> None:
    """Write ``checkpoint/`` (weights, model.yaml, tokenizer/) and ``metrics.json``."""
    from nemo_minitron.checkpoint.torch_dist import write_torch_dist  # a second to import

    start = time.perf_counter()
    opened = _open(cfg)
    family, config, store = opened.family, opened.config, opened.store
    with output_folder(cfg, "import") as work:
        folder = work / "checkpoint"
        (folder / "tokenizer").mkdir(parents=True)
        with progress("importing tensors", len(store)) as advance:
            counted = on_done(store, advance)
            write_torch_dist(folder, counted, family, config, workers=cfg.workers)
        config.save(folder)
        opened.save_extras(folder / "tokenizer")
        copy_licence_texts(Path(cfg.source), folder / "tokenizer")
        record(None, folder, import_entry(cfg, config))
        metrics = _metrics(family, config, store, time.perf_counter() - start)
        (work / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    _report(cfg, config, metrics)


def _metrics(family: Family, config: ModelConfig, store: Store, seconds: float) -> dict[str, Any]:
    count = parameter_count(family, config)
    return {
        "parameters": count["total"],
        "non_embedding_parameters": count["non_embedding"],
        "bytes": store_nbytes(store),
        "dtype": config.dtype,
        "seconds": round(seconds, 3),
    }


def _report(cfg: ImportConfig, config: ModelConfig, metrics: dict[str, Any]) -> None:
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    names = [*sizes, "num_query_groups", "kv_channels", "vocab_size"]
    if config.num_moe_experts is not None:
        names += ["num_moe_experts", "moe_ffn_hidden_size", "moe_router_topk"]
    if config.moe_shared_expert_intermediate_size is not None:
        names.append("moe_shared_expert_intermediate_size")
    rows = [
        ["family", config.family],
        ["parameters", f"{metrics['parameters']:,}"],
        *[[name, f"{getattr(config, name):,}"] for name in names],
        ["tied embeddings", str(config.share_embeddings_and_output_weights).lower()],
        ["dtype", config.dtype],
        ["size on disk", f"{metrics['bytes'] / 1e6:,.0f} MB"],
        ["seconds", f"{metrics['seconds']:.1f}"],
        ["result", cfg.output_dir],
    ]
    show_table("import", ("", Path(cfg.source).name), rows)
