"""``minitron search``: shapes within a budget, pruned, scored and ordered.

Lightweight architecture search of 2407.14679, section 2.3. Every candidate is really pruned, in
memory and on the loaded layout, and its LM loss measured; the best ones are distilled for a few
steps and measured again. What is known of a candidate is kept in the working folder, so a search
that was killed goes on with the next one.
"""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from nemo_minitron.checkpoint.artifact import check_output
from nemo_minitron.config.balance import balanced_layout
from nemo_minitron.config.layout import check_layout
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.stages import SearchConfig
from nemo_minitron.data.checks import check_batches, check_data
from nemo_minitron.data.sft import check_packing
from nemo_minitron.families.registry import longest_sequence
from nemo_minitron.pruning.scores import Scores, read_meta
from nemo_minitron.pruning.targets import check_importance, check_result
from nemo_minitron.runtime.ranks import launched_world_size, rank
from nemo_minitron.search import (
    candidates,
    kept_layers,
    objective,
    pareto_front,
    within_latency,
)
from nemo_minitron.stages.candidate_stages import distill_config, pruning_of, training_data
from nemo_minitron.stages.settings import (
    check_settings,
    check_training_settings,
    on_ranks,
    opened_inputs,
)
from nemo_minitron.stages.tasks import check_tasks

log = logging.getLogger(__name__)
_METRICS = ("parameters", "loss", "distilled_loss", "score", "distilled_score", "sizes")


def check(cfg: SearchConfig) -> None:
    """Refuse bad input before any rank or weight exists.

    Raises:
        ValueError: an empty search space, a budget that nothing meets, candidates that the scores
            or the layout cannot serve, bad data or folders.
    """
    check_output(cfg, "search")
    with opened_inputs(cfg):
        folder = Path(cfg.checkpoint) / "checkpoint"
        config = ModelConfig.load(folder)
        check_layout(config, cfg.parallel)
        check_settings(cfg, config)
        if cfg.layer_criterion != SearchConfig.layer_criterion and not cfg.search.num_layers:
            raise ValueError(
                f"layer_criterion={cfg.layer_criterion} chooses layers, but search.num_layers is "
                "not set; set it, or leave layer_criterion out"
            )
        meta = None if cfg.importance is None else read_meta(Path(cfg.importance))
        # Scores themselves only say which layers stay; all else is in their meta.
        scores = None
        if cfg.importance is not None and cfg.search.num_layers:
            scores = Scores.load(Path(cfg.importance))
        layers = kept_layers(config, cfg, scores)
        for one in candidates(config, cfg.search, layers, log.warning):
            pruning = pruning_of(cfg, config, one)
            check_result(config, pruning)
            check_importance(config, pruning, meta)
            small = config.resized(one.sizes, layers.get(one.sizes["num_layers"]))
            balanced_layout(config, small, cfg.parallel)
            if cfg.search.distill.steps:
                _check_distillation(cfg, config, small)
        check_batches(cfg.data, cfg.parallel, cfg.parallel.world_size(launched_world_size()))
        _check_data(cfg, config, folder)
        if cfg.tasks:
            check_tasks(cfg, config, export=False)


def _check_distillation(cfg: SearchConfig, config: ModelConfig, small: ModelConfig) -> None:
    try:
        check_training_settings(distill_config(cfg, config, small), small)
    except ValueError as error:
        raise ValueError(f"search.distill.*: {error}") from error


def _check_data(cfg: SearchConfig, config: ModelConfig, folder: Path) -> None:
    keys: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "tokenizer_dir": folder / "tokenizer",
        "max_seq_length": longest_sequence(config),
    }
    check_data(cfg.data, **keys)
    check_packing(cfg.data, config.without_prediction())
    if not cfg.search.distill.steps:
        return
    if cfg.data.split_name == "train":
        raise ValueError(
            "data.split_name=train holds what search.distill.steps trains on; set data.split_name="
            "validation, or search.distill.steps=0"
        )
    check_data(training_data(cfg), splits=("train",), **keys)


def run(cfg: SearchConfig) -> None:
    """Score, distil, rank; write ``candidates.json``, ``pareto.png`` and the winner."""
    records: list[dict[str, Any]] = []
    temporary = ("scored", "distilled")
    with on_ranks(
        cfg, "search", cfg.parallel, cfg.data.seed, resumable=True, temporary=temporary
    ) as work:
        from nemo_minitron.stages.candidates import score_candidates

        config = ModelConfig.load(Path(cfg.checkpoint) / "checkpoint")
        records = ranked(score_candidates(cfg, config, work), cfg.search.max_latency_ms)
        if rank() == 0:
            _write(cfg, config, records, work)
    _show(cfg, records)


def ranked(records: list[dict[str, Any]], max_latency_ms: float | None) -> list[dict[str, Any]]:
    """Return records by ``search.objective``, with ``rank`` from 1: distilled ones first.

    Raises:
        ValueError: every candidate takes longer than ``search.max_latency_ms``.
    """
    inside = within_latency(records, max_latency_ms)
    inside.sort(key=lambda r: (r["distilled_loss"] is None, objective(r), r["loss"]))
    slow = sorted((r for r in records if r not in inside), key=lambda r: r["latency_ms"])
    placed = [{**record, "rank": place} for place, record in enumerate(inside, start=1)]
    return placed + [{**record, "rank": None} for record in slow]


def _write(
    cfg: SearchConfig, config: ModelConfig, records: list[dict[str, Any]], work: Path
) -> None:
    from nemo_minitron.reporting.plots import png_bytes, search_front

    values = {"candidates": records, "winner": records[0]["name"], "search": asdict(cfg.search)}
    (work / "candidates.json").write_text(json.dumps(values, indent=1) + "\n")
    best = records[0]
    metrics = {key: best.get(key) for key in _METRICS}
    (work / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    (work / "pareto.png").write_bytes(png_bytes(search_front(records)))
    _write_winner(cfg, config, best, work / "pruning")


def _write_winner(
    cfg: SearchConfig, config: ModelConfig, best: dict[str, Any], folder: Path
) -> None:
    """Write ``winner.yaml`` for ``minitron prune --config-dir <output_dir> pruning=winner``."""
    target = {n: s for n, s in best["sizes"].items() if s != getattr(config, n)}
    values: dict[str, Any] = {"target": target}
    if "num_layers" in target:
        values["layer_criterion"] = cfg.layer_criterion
    folder.mkdir(exist_ok=True)
    text = f"# minitron prune --config-dir {cfg.output_dir} pruning=winner ...\n"
    (folder / "winner.yaml").write_text(text + yaml.safe_dump(values, sort_keys=False))


def _show(cfg: SearchConfig, records: list[dict[str, Any]]) -> None:
    from nemo_minitron.runtime.console import show_table

    points = [(record["parameters"], objective(record)) for record in records]
    front = {records[i]["name"] for i in pareto_front(points)}
    measured = ["loss", "distilled_loss", *(("score", "distilled_score") if cfg.tasks else ())]
    rows = []
    for record in records:
        sizes = [f"{size:,}" for size in record["sizes"].values()]
        rows.append(
            (
                "too slow" if record["rank"] is None else str(record["rank"]),
                *sizes,
                f"{record['parameters']:,}",
                f"{record['memory_gib']:.3g}",
                f"{record['latency_ms']:.4g}",
                *("" if record.get(name) is None else f"{record[name]:.4f}" for name in measured),
                "yes" if record["name"] in front else "",
            )
        )
    columns = (
        *map(_column, records[0]["sizes"]),
        "parameters",
        "GiB",
        "ms",
        *map(_column, measured),
    )
    show_table(f"search: {cfg.output_dir}", ("rank", *columns, "Pareto"), rows)


def _column(name: str) -> str:
    """Return the heading of a size or a figure."""
    return name.removeprefix("num_").replace("_", " ")
