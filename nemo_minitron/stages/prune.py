"""``minitron prune``: scores and targets become a plan, the plan a smaller checkpoint.

Checkpoint in, checkpoint out, tensor by tensor: no model is built, no process group is needed, and
memory holds a few tensors whatever the size of the model.
"""

import json
import logging
import shutil
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.checkpoint.artifact import check_output, open_result, output_folder
from nemo_minitron.config.model import MODEL_YAML, ModelConfig
from nemo_minitron.config.stages import PruneConfig
from nemo_minitron.importance.scores import META_FILE, read_meta
from nemo_minitron.pruning.plan import Plan, make_plan, pruned_config
from nemo_minitron.pruning.targets import check_importance, check_pruning

if TYPE_CHECKING:
    from nemo_minitron.importance.scores import Scores

log = logging.getLogger(__name__)

_SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
)


def check(cfg: PruneConfig) -> None:
    """Refuse bad input; reads sizes and hashes files, builds nothing.

    Raises:
        ValueError: inputs that are no intact results, targets the model or the scores cannot serve,
            or an output folder that cannot take the result.
    """
    check_output(cfg, "prune")
    # Targets before whole-file hashes: a typing mistake should not cost a pass over the weights.
    _open_inputs(cfg, "size")
    config = ModelConfig.load(Path(cfg.checkpoint) / "checkpoint")
    check_pruning(config, cfg.pruning)
    meta = None if cfg.importance is None else read_meta(Path(cfg.importance))
    check_importance(config, cfg.pruning, meta)
    if cfg.verify_inputs != "size":
        _open_inputs(cfg, cfg.verify_inputs)


def _open_inputs(cfg: PruneConfig, verify: str) -> None:
    checkpoint = open_result(
        cfg.checkpoint,
        verify,
        key="checkpoint",
        needs=f"checkpoint/{MODEL_YAML}",
        workers=cfg.workers,
    )
    if cfg.importance is None:
        return
    scores = open_result(
        cfg.importance, verify, key="importance", needs=META_FILE, workers=cfg.workers
    )
    if scores.inputs.get("checkpoint") != f"{checkpoint.stage}:{checkpoint.id}":
        log.warning(
            "importance=%s was made from other weights of the same sizes than checkpoint=%s",
            cfg.importance,
            cfg.checkpoint,
        )


def run(cfg: PruneConfig) -> None:
    """Write ``checkpoint/`` (weights, model.yaml, tokenizer/), ``plan.json``, ``metrics.json``."""
    start = time.perf_counter()
    source = Path(cfg.checkpoint) / "checkpoint"
    config = ModelConfig.load(source)
    plan = make_plan(config, cfg.pruning, _scores(cfg))
    with output_folder(cfg, "prune") as work:
        plan.save(work)
        _write_checkpoint(cfg, config, plan, source, work / "checkpoint")
        metrics = _metrics(config, pruned_config(config, plan), plan)
        metrics["seconds"] = round(time.perf_counter() - start, 3)
        (work / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    _report(cfg, metrics)


def _scores(cfg: PruneConfig) -> "Scores | None":
    from nemo_minitron.importance.scores import Scores

    return None if cfg.importance is None else Scores.load(Path(cfg.importance))


def _write_checkpoint(
    cfg: PruneConfig, config: ModelConfig, plan: Plan, source: Path, folder: Path
) -> None:
    """The streaming executor: lazy store in, lazy store out, one writer."""
    from nemo_minitron.checkpoint.lazy import on_read, refuse_nonfinite
    from nemo_minitron.checkpoint.torch_dist import read_torch_dist, write_torch_dist
    from nemo_minitron.families.registry import family_of
    from nemo_minitron.pruning.slicing import prune_store
    from nemo_minitron.reporting.console import progress

    family, small = family_of(config), pruned_config(config, plan)
    whole = on_read(
        read_torch_dist(source, family, config), partial(refuse_nonfinite, key="checkpoint")
    )
    store = prune_store(family, config, plan, whole)
    folder.mkdir()
    with progress("pruning tensors", len(store)) as advance:
        counted = on_read(store, lambda name, tensor: advance())
        write_torch_dist(folder, counted, family, small, workers=cfg.workers)
    small.save(folder)
    if (source / "tokenizer").is_dir():
        shutil.copytree(source / "tokenizer", folder / "tokenizer")


def _metrics(config: ModelConfig, small: ModelConfig, plan: Plan) -> dict[str, Any]:
    from nemo_minitron.families.registry import family_of
    from nemo_minitron.families.table import parameter_count

    before = parameter_count(family_of(config), config)
    after = parameter_count(family_of(config), small)
    return {
        "parameters": after["total"],
        "non_embedding_parameters": after["non_embedding"],
        "parameters_before": before["total"],
        "non_embedding_parameters_before": before["non_embedding"],
        "sizes": {name: getattr(small, name) for name in _SIZES},
        "sizes_before": {name: getattr(config, name) for name in _SIZES},
        "kept_layers": [layer + 1 for layer in plan.layers],
        "dropped_layers": [i + 1 for i in range(config.num_layers) if i not in set(plan.layers)],
    }


def _report(cfg: PruneConfig, metrics: dict[str, Any]) -> None:
    from nemo_minitron.reporting.console import show_table

    def row(name: str, before: int, after: int) -> list[str]:
        return [name, f"{before:,}", f"{after:,}", f"{after / before:.1%}"]

    rows = [
        row("parameters", metrics["parameters_before"], metrics["parameters"]),
        row(
            "without embeddings",
            metrics["non_embedding_parameters_before"],
            metrics["non_embedding_parameters"],
        ),
        *[row(name, metrics["sizes_before"][name], metrics["sizes"][name]) for name in _SIZES],
    ]
    if metrics["dropped_layers"]:
        dropped = ", ".join(str(layer) for layer in metrics["dropped_layers"])
        rows.append(["layers dropped (1-indexed)", dropped, "", ""])
    rows.append(["result", cfg.output_dir, "", ""])
    show_table(f"prune ({metrics['seconds']:.1f} s)", ("", "before", "after", "kept"), rows)
