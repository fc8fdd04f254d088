"""``minitron prune``: scores and targets become a plan, the plan a smaller checkpoint.

Checkpoint in, checkpoint out, tensor by tensor: no model is built, no process group is needed, and
memory holds a few tensors whatever the size of the model. Only with ``data.path`` is a model run:
to score it here, once or in rounds (``stages/calibrate.py``).
"""

import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoint.artifact import Manifest, check_output, output_folder
from nemo_minitron.checkpoint.lineage import model_sizes, record
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.stages import PruneConfig, PruningConfig
from nemo_minitron.families.experts import warn_of_expert_sizes
from nemo_minitron.pruning.plan import Plan, make_plan, pruned_config
from nemo_minitron.pruning.rounds import ROUNDS, pruning_rounds
from nemo_minitron.pruning.scores import read_meta
from nemo_minitron.pruning.targets import (
    check_compensation,
    check_importance,
    needed_scores,
    target_sizes,
)
from nemo_minitron.runtime.ranks import rank
from nemo_minitron.stages.recipe import prune_entry
from nemo_minitron.stages.settings import check_forward, on_ranks, opened_inputs

log = logging.getLogger(__name__)

# Of ``model_sizes``: what the table leaves out.
_NO_SIZES = ("max_position_embeddings", "dtype")


def check(cfg: PruneConfig) -> None:
    """Refuse bad input; reads sizes and hashes files, builds nothing.

    Raises:
        ValueError: inputs that are no intact results, targets the model or the scores cannot serve,
            data or a layout that do not fit (or are not needed), or an output folder that cannot
            take the result.
    """
    check_output(cfg, "prune")
    with opened_inputs(cfg) as opened:
        _warn_of_other_weights(cfg, opened)
        config = ModelConfig.load(Path(cfg.checkpoint) / "checkpoint")
        rounds = pruning_rounds(config, cfg.pruning, cfg.parallel)
        warn_of_expert_sizes(config.resized(target_sizes(config, cfg.pruning)))
        meta = None if cfg.importance is None else read_meta(Path(cfg.importance))
        if meta is not None:
            check_importance(config, rounds[0], meta)
        check_compensation(config, cfg.pruning, meta)
        if _calibrates(cfg, config, rounds):
            check_forward(cfg, config, cfg.data)


def _warn_of_other_weights(cfg: PruneConfig, opened: dict[str, Manifest]) -> None:
    checkpoint, scores = opened["checkpoint"], opened.get("importance")
    if scores and scores.inputs.get("checkpoint") != f"{checkpoint.stage}:{checkpoint.id}":
        log.warning(
            "importance=%s was made from other weights of the same sizes than checkpoint=%s",
            cfg.importance,
            cfg.checkpoint,
        )


def _calibrates(cfg: PruneConfig, config: ModelConfig, rounds: list[PruningConfig]) -> bool:
    """Whether a model is scored here.

    Raises:
        ValueError: it has to be and there are no data, or there are and it has not to be.
    """
    needed = needed_scores(config, rounds[0])
    unserved = cfg.importance is None and bool(needed)
    if not cfg.data.given:
        if len(rounds) > 1:
            raise ValueError(
                f"pruning.iterations={cfg.pruning.iterations} scores the model again after every "
                "round; set data.path to the calibration text, or pruning.iterations=1"
            )
        if unserved:
            check_importance(config, rounds[0], None)
        default = PruneConfig(checkpoint="-", output_dir="-")
        for section in ("data", "parallel", "megatron", "scores"):
            if getattr(cfg, section) != getattr(default, section):
                raise ValueError(
                    f"{section}.* is for scoring, but nothing is scored here; set data.path to "
                    f"score the model here, or leave {section}.* out"
                )
        return False
    if len(rounds) == 1 and not unserved:
        raise ValueError(
            f"data.path={cfg.data.path} is not needed: "
            + (f"importance={cfg.importance} has the scores" if needed else "nothing is scored")
            + "; leave data.path out"
            + (", or leave importance out" if needed else "")
        )
    return True


def run(cfg: PruneConfig) -> None:
    """Write ``checkpoint/`` (weights, model.yaml, tokenizer/), ``plan.json``, ``metrics.json``."""
    start = time.perf_counter()
    config = ModelConfig.load(Path(cfg.checkpoint) / "checkpoint")
    rounds = pruning_rounds(config, cfg.pruning, cfg.parallel)
    if cfg.data.given:
        return _score_and_prune(cfg, config, rounds, start)
    if rank():
        return log.debug("rank 0 alone prunes a checkpoint")
    from nemo_minitron.pruning.scores import Scores

    scores = None if cfg.importance is None else Scores.load(Path(cfg.importance))
    plan = make_plan(config, rounds[0], scores)
    with output_folder(cfg, "prune") as work:
        metrics = _write(cfg, config, plan, work, start)
    _report(cfg, metrics)


def _score_and_prune(
    cfg: PruneConfig, config: ModelConfig, rounds: list[PruningConfig], start: float
) -> None:
    """Do what ``run`` does, on every rank and with a model to score."""
    metrics: dict[str, Any] = {}
    with on_ranks(cfg, "prune", cfg.parallel, cfg.data.seed, resumable=True) as work:
        from nemo_minitron.stages.calibrate import run_rounds

        plan, costs = run_rounds(cfg, config, rounds, work)
        if rank() == 0:
            metrics = _write(cfg, config, plan, work, start, costs)
    if rank() == 0:
        _report(cfg, metrics)


def _write(
    cfg: PruneConfig,
    config: ModelConfig,
    plan: Plan,
    work: Path,
    start: float,
    costs: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Write the files of the result, and return the metrics."""
    from nemo_minitron.pruning.compensate import Compensation
    from nemo_minitron.pruning.slicing import prune_checkpoint

    plan.save(work)
    source, target = Path(cfg.checkpoint) / "checkpoint", work / "checkpoint"
    shutil.rmtree(target, ignore_errors=True)  # a part of it, of a run that was killed
    compensation = None
    if cfg.pruning.compensate:
        assert cfg.importance is not None
        compensation = Compensation.of_result(Path(cfg.importance), cfg.pruning, cfg.workers)
    prune_checkpoint(source, config, plan, target, cfg.workers, compensation)
    small = pruned_config(config, plan)
    metrics = _metrics(config, small, plan)
    entry = prune_entry(cfg, small, metrics["dropped_layers"], work / ROUNDS)
    record(source, target, entry)
    if costs is not None:
        metrics["rounds"] = costs
    metrics["seconds"] = round(time.perf_counter() - start, 3)
    (work / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


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
        "sizes": _sizes(small),
        "sizes_before": _sizes(config),
        "kept_layers": [layer + 1 for layer in plan.layers],
        "dropped_layers": [i + 1 for i in range(config.num_layers) if i not in set(plan.layers)],
    }


def _sizes(config: ModelConfig) -> dict[str, int]:
    """Return the sizes that a model has."""
    return {name: size for name, size in model_sizes(config).items() if name not in _NO_SIZES}


def _report(cfg: PruneConfig, metrics: dict[str, Any]) -> None:
    from nemo_minitron.runtime.console import show_table

    def row(name: str, before: int, after: int) -> list[str]:
        return [name, f"{before:,}", f"{after:,}", f"{after / before:.1%}"]

    rows = [
        row("parameters", metrics["parameters_before"], metrics["parameters"]),
        row(
            "without embeddings",
            metrics["non_embedding_parameters_before"],
            metrics["non_embedding_parameters"],
        ),
        *[
            row(name, size, metrics["sizes"][name])
            for name, size in metrics["sizes_before"].items()
        ],
    ]
    if metrics["dropped_layers"]:
        dropped = ", ".join(str(layer) for layer in metrics["dropped_layers"])
        rows.append(["layers dropped (1-indexed)", dropped, "", ""])
    rows.append(["result", cfg.output_dir, "", ""])
    show_table(f"prune ({metrics['seconds']:.1f} s)", ("", "before", "after", "kept"), rows)
