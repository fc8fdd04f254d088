"""The plan of a pipeline: every item with its model, ranks, memory and work."""

from dataclasses import dataclass, replace
from typing import Any

from nemo_minitron.config.layout import check_layout, check_prediction, check_recompute
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import own_ranks
from nemo_minitron.config.pipeline import ClusterConfig, PlanConfig
from nemo_minitron.config.stages import DistillConfig, PruneConfig, SearchConfig
from nemo_minitron.config.training_stages import TrainingStageConfig
from nemo_minitron.pipeline.plan import Item
from nemo_minitron.planning.compute import Work, built_teacher, work
from nemo_minitron.planning.memory import Job, Memory, check_split, fits, fullest_rank
from nemo_minitron.planning.models import Models, stated_model


@dataclass(frozen=True)
class Run:
    """Ranks, memory and work of an item that runs a model.

    Attributes:
        job: the item on its ranks.
        ranks: how many those are, with those of a teacher on ranks of its own.
        memory: of the fullest one.
        work: what they compute.
    """

    job: Job
    ranks: int
    memory: Memory
    work: Work


@dataclass(frozen=True)
class ItemPlan:
    """One item.

    Attributes:
        name: of the item.
        stage: what runs.
        before: sizes of the model it reads, or None if it reads no model.
        after: sizes of the model it leaves.
        run: None for an item that runs no model (import, prune, export), or reads no samples
            (generate, benchmark).
    """

    name: str
    stage: str
    before: ModelConfig | None
    after: ModelConfig | None
    run: Run | None


def plan_items(cfg: PlanConfig, items: list[Item]) -> list[ItemPlan]:
    """Plan every item.

    Raises:
        ValueError: sizes nobody knows, or a layout that cannot run at all; names the item.
    """
    models, found = Models(stated_model(cfg)), []
    for item in items:
        try:
            found.append(_plan_item(cfg, item, models))
        except ValueError as error:
            raise ValueError(f"{item.name} ({item.stage}): {error}") from error
    return found


def _plan_item(cfg: PlanConfig, item: Item, models: Models) -> ItemPlan:
    before, config = models.add(item), item.config
    if before is None:
        return ItemPlan(item.name, item.stage, None, None, None)
    after = models.made_by(item)
    teacher = None
    if isinstance(config, DistillConfig) and config.teacher is not None:
        teacher = models.of("teacher", config.teacher)
    # What ``generate`` and ``benchmark`` take depends on texts, not on samples of one length, and
    # what ``search`` trains on the candidates that it finds.
    runs = hasattr(config, "parallel") and hasattr(config, "data")
    if isinstance(config, SearchConfig) and config.search.distill.steps:
        runs = False
    if isinstance(config, PruneConfig):
        runs = config.data.given
    run = _place(cfg, config, before, teacher) if runs else None
    return ItemPlan(item.name, item.stage, before, after, run)


def _place(cfg: PlanConfig, config: Any, model: ModelConfig, teacher: ModelConfig | None) -> Run:
    """On all nodes if the stage trains, else on as many as its batch can fill."""
    trains = isinstance(config, TrainingStageConfig)
    if not trains:
        model = model.without_prediction()  # only a training builds these layers
    if teacher is not None:
        teacher = built_teacher(config, model, teacher)
    job = Job(config, model, teacher, 1, cfg.cluster.gpus_per_node > 0)
    check_job(job)
    choices = [cfg.nodes] if trains else range(cfg.nodes, 0, -1)
    failure: ValueError | None = None
    for nodes in choices:
        try:
            ranks = _ranks(config, cfg.cluster, nodes)
        except ValueError as error:
            failure = error
            continue
        job = replace(job, data_parallel_size=ranks // config.parallel.model_parallel_size)
        return Run(job, ranks + own_ranks(config), fullest_rank(job), work(job))
    raise failure or ValueError(f"nodes={cfg.nodes} must be at least 1")


def _ranks(config: Any, cluster: ClusterConfig, nodes: int) -> int:
    """Return ranks of the layout ``parallel`` on some nodes, batches checked."""
    there, parallel = nodes * cluster.ranks_per_node - own_ranks(config), config.parallel
    where = f"nodes={nodes} x cluster.gpus_per_node={cluster.gpus_per_node}"
    if there < 1:
        raise ValueError(
            f"{where} has no ranks for the student beside teacher_parallel.own_ranks="
            f"{own_ranks(config)}; use more nodes"
        )
    if parallel.data_parallel_size is not None and parallel.world_size() <= there:
        ranks: int = parallel.world_size()
    else:
        try:
            ranks = parallel.world_size(there)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    try:
        check_split(config, ranks)
    except ValueError as error:
        raise ValueError(f"{where}: {error}; or use fewer nodes") from error
    return ranks


def check_job(job: Job) -> None:
    """Refuse what cannot run on any number of ranks.

    Raises:
        ValueError: the layout, recomputation, or multi-token prediction does not fit a model.
    """
    check_layout(job.model, job.parallel)
    if isinstance(job.cfg, TrainingStageConfig):
        check_recompute(job.trainer, job.model, job.parallel)
        check_prediction(job.model, job.parallel, job.trainer)
    if job.teacher is not None and isinstance(job.cfg, DistillConfig):
        check_layout(job.teacher, job.cfg.teacher_parallel.of(job.parallel))


def room(run: Run, cluster: ClusterConfig) -> bool:
    """Whether the ranks have room for the item."""
    return fits(run.memory, cluster)
