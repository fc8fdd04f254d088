"""Candidates of ``search``: pruned in memory, evaluated, and the best ones distilled shortly.

Collective, inside ``runtime.launch.distributed``. Each candidate's figures are a file of the
working folder, written when it is done; a candidate whose file is there is not run again.
"""

import gc
import json
import logging
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import OmegaConf

from nemo_minitron.api import prune
from nemo_minitron.checkpoint.seals import check_seal, sealed_file
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.stages import SearchConfig
from nemo_minitron.data.datasets import SampleSet, stage_dataset, training_datasets
from nemo_minitron.data.samples import FirstSamples
from nemo_minitron.documents import read_json_object
from nemo_minitron.evaluation.lm_loss import evaluate_lm
from nemo_minitron.evaluation.tasks import mean_metric
from nemo_minitron.models.build import HiddenGPTModel
from nemo_minitron.models.distill import DistillationGPTModel
from nemo_minitron.models.documents import check_shared
from nemo_minitron.models.training import fit
from nemo_minitron.models.weights import load_frozen
from nemo_minitron.pruning.plan import Plan, make_plan, pruned_config
from nemo_minitron.pruning.scores import Scores
from nemo_minitron.pruning.slicing import prune_checkpoint
from nemo_minitron.runtime.groups import ParallelGroups
from nemo_minitron.runtime.launch import seen_by_all
from nemo_minitron.runtime.ranks import rank
from nemo_minitron.runtime.worlds import barrier
from nemo_minitron.search import Candidate, candidates, kept_layers, objective, within_latency
from nemo_minitron.stages.candidate_stages import distill_config, pruning_of
from nemo_minitron.stages.distill import model_config
from nemo_minitron.stages.tasks import answer_tasks, ready_to_answer

log = logging.getLogger(__name__)

Record = dict[str, Any]
_LAYOUT = "layout"
"""Keys of a record that are kept to resume, and are no part of the result."""


def score_candidates(cfg: SearchConfig, config: ModelConfig, work: Path) -> list[Record]:
    """Return figures of every candidate, the same on every rank.

    Args:
        cfg: the stage.
        config: the model before pruning.
        work: working folder of the stage.
    """
    source = Path(cfg.checkpoint) / "checkpoint"
    scores = None if cfg.importance is None else Scores.load(Path(cfg.importance))
    dataset = stage_dataset(cfg.data, config, source, cfg.output_dir)
    check_shared(dataset, cfg.data, config, cfg.parallel)
    shapes = candidates(config, cfg.search, kept_layers(config, cfg, scores))
    plans = {one.name: make_plan(config, pruning_of(cfg, config, one), scores) for one in shapes}
    records = []
    for number, one in enumerate(shapes, start=1):
        kept = work / "scored" / f"{one.name}.json"
        if not seen_by_all(kept) or _at_another_layout(cfg, _kept(kept)):
            log.info("candidate %d of %d: %s", number, len(shapes), one.sizes)
            found = _zero_shot(cfg, config, plans[one.name], dataset)
            _keep(kept, {**found, _LAYOUT: _layout(cfg)})
        records.append(_record(one, _kept(kept)))
    if cfg.search.distill.steps:
        inside = within_latency(records, cfg.search.max_latency_ms)
        best = sorted(inside, key=objective)[: cfg.search.distill.top]
        for record in best:
            kept = work / "distilled" / f"{record['name']}.json"
            if not seen_by_all(kept):
                _keep(kept, _short_distillation(cfg, config, record, plans, dataset, work))
            found = _kept(kept)
            record |= {"distilled_loss": found["loss"], "distilled_score": found.get("score")}
    barrier()  # rank 0 removes these files later, and they are read by all
    return records


def _record(one: Candidate, measured: Record) -> Record:
    """A candidate and what is measured of it, right after pruning and, later, once distilled."""
    return {
        "name": one.name,
        "sizes": one.sizes,
        "parameters": one.parameters,
        "memory_gib": one.memory_gib,
        **{name: measured.get(name) for name in ("latency_ms", "loss", "score")},
        "distilled_loss": None,
        "distilled_score": None,
    }


def _layout(cfg: SearchConfig) -> Record:
    """Return the settings that the latency of a candidate depends on."""
    batch = {"micro_batch_size": cfg.data.micro_batch_size}
    return {"ranks": dist.get_world_size(), **batch, **asdict(cfg.parallel)}


def _at_another_layout(cfg: SearchConfig, kept: Record) -> bool:
    """Whether a run of another layout or micro-batch measured a latency that has a limit here."""
    mine, then = _layout(cfg), kept.get(_LAYOUT, {})
    limited = cfg.search.max_latency_ms is not None
    return limited and any(mine.get(name) != value for name, value in then.items())


def _keep(path: Path, values: Record) -> None:
    """Write a file whole, by rank 0, and wait for it."""
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with sealed_file(path) as draft:
            draft.write_text(json.dumps(values))
    barrier()


def _kept(path: Path) -> Record:
    """Read what ``_keep`` wrote, perhaps in an earlier run."""
    check_seal(path, "remove it, then the same command runs this candidate again")
    return read_json_object(path)


def _zero_shot(cfg: SearchConfig, config: ModelConfig, plan: Plan, dataset: SampleSet) -> Record:
    """Load the model, prune it where it is, and evaluate."""
    source, groups = Path(cfg.checkpoint) / "checkpoint", ParallelGroups.current()
    small = prune(load_frozen(source, cfg.parallel, groups, megatron=cfg.megatron), plan)
    metrics = _evaluate(cfg, config.without_prediction(), small, dataset, timed=True)
    return {
        "latency_ms": 1000 * metrics["seconds"] / metrics["samples"],
        "loss": metrics["lm_loss"],
        "score": metrics.get("score"),
    }


def _evaluate(
    cfg: SearchConfig,
    config: ModelConfig,
    chunks: list[HiddenGPTModel],
    dataset: SampleSet,
    *,
    timed: bool = False,
) -> dict[str, float]:
    """Return the loss and speed of a candidate, and ``score`` if tasks are asked.

    If the speed counts, one micro-batch on every rank comes before: the first pass of a model loads
    kernels and chooses them by shape.
    """
    for chunk in chunks:
        chunk.eval()
        chunk.return_hidden = True
    groups = ParallelGroups.current()
    if timed:
        batch = cfg.data.micro_batch_size * groups.dp.size()
        few = FirstSamples(dataset, min(batch, len(dataset)))
        data = replace(cfg.data, global_batch_size=batch)
        evaluate_lm(chunks, groups, config.vocab_size, few, data)
    metrics = evaluate_lm(chunks, groups, config.vocab_size, dataset, cfg.data)
    if cfg.tasks:
        answers = ready_to_answer(cfg, config, chunks, groups)
        found = answer_tasks(cfg, config, answers)["tasks"]
        metrics["score"] = mean_metric(found, cfg.tasks, cfg.task_metric)
    return metrics


def _short_distillation(
    cfg: SearchConfig,
    config: ModelConfig,
    record: Record,
    plans: dict[str, Plan],
    dataset: SampleSet,
    work: Path,
) -> Record:
    """Return a candidate's loss and score after a few steps, from its last checkpoint on."""
    source, plan = Path(cfg.checkpoint) / "checkpoint", plans[record["name"]]
    folder = work / "distilled" / record["name"]
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / "pruned", ignore_errors=True)  # half of it, of a run that was killed
        prune_checkpoint(source, config, plan, folder / "pruned", cfg.workers)
    barrier()
    log.info("distilling %s for %d steps", record["name"], cfg.search.distill.steps)
    config = config.without_prediction()  # what is compared is the loss of the next token
    small = pruned_config(config, plan)
    distill = distill_config(cfg, config, small)
    keys = model_config(distill, small)
    model = DistillationGPTModel(OmegaConf.create({**keys, "teacher": asdict(config)}))
    model.load(folder / "pruned")
    model.load_teacher(source)
    samples = training_datasets(
        distill.data, distill.trainer, config, source, cfg.output_dir, ("train",)
    )
    fit(model, [samples], folder)
    metrics = _evaluate(cfg, config, model.chunks, dataset)
    del model
    gc.collect()  # Lightning and Megatron hold it in cycles, with the optimizer's state
    if rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    barrier()
    return {"loss": metrics["lm_loss"], "score": metrics.get("score")}
