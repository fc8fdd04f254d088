"""Find the keys to change if a stage does not fit the memory of its ranks."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from nemo_minitron.config.megatron import merged_recompute
from nemo_minitron.config.parallel import own_ranks
from nemo_minitron.config.pipeline import ClusterConfig
from nemo_minitron.config.stages import DistillConfig
from nemo_minitron.config.training import RECOMPUTE_KEYS
from nemo_minitron.config.training_stages import TrainingStageConfig
from nemo_minitron.planning.items import Run, check_job
from nemo_minitron.planning.memory import check_split, fits, fullest_rank

_Change = tuple[str, Callable[[Any], Any]]
# Keys that belong to the degrees of now: with other degrees they are set to null.
_FREED = (
    "data_parallel_size",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "pipeline_model_parallel_layout",
    "virtual_pipeline_model_parallel_size",
)


def advice(run: Run, cluster: ClusterConfig) -> str:
    """Return keys to set so that it fits: the cheapest that are enough.

    Changes are tried in order of what they cost, each on top of those before it, and then with
    more ranks for each replica.
    """
    for words, cfg in _tries(run.job.cfg, cluster):
        if _fits(run, cfg, cluster):
            return f"set {' '.join(words)}"
    return "no layout of these ranks fits; take more nodes, or GPUs with more memory"


def _tries(cfg: Any, cluster: ClusterConfig) -> Iterator[tuple[list[str], Any]]:
    words: list[str] = []
    for word, change in _changes(cfg):
        cfg, words = change(cfg), [*words, word]
        yield words, cfg
    for tp, pp in _degrees(cfg, cluster):
        freed = [name for name in _FREED if getattr(cfg.parallel, name) is not None]
        parallel = replace(
            cfg.parallel,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            sequence_parallel=tp > 1,
            **dict.fromkeys(freed),
        )
        keys = [
            f"parallel.tensor_model_parallel_size={tp}",
            f"parallel.pipeline_model_parallel_size={pp}",
            f"parallel.sequence_parallel={str(tp > 1).lower()}",
            *(f"parallel.{name}=null" for name in freed),
        ]
        with suppress(ValueError):  # a teacher on ranks of its own has other degrees
            yield [*words, *keys], replace(cfg, parallel=parallel)


def _changes(cfg: Any) -> list[_Change]:
    """Return changes of one key that are not made yet, cheapest first."""
    found: list[_Change] = []
    if isinstance(cfg, TrainingStageConfig) and not cfg.optim.use_distributed_optimizer:
        optim = replace(cfg.optim, use_distributed_optimizer=True)
        found.append(("optim.use_distributed_optimizer=true", lambda c: replace(c, optim=optim)))
    if cfg.data.micro_batch_size > 1:
        data = replace(cfg.data, micro_batch_size=1)
        found.append(("data.micro_batch_size=1", lambda c: replace(c, data=data)))
    if isinstance(cfg, TrainingStageConfig):
        found += _recompute(cfg)
    resident = isinstance(cfg, DistillConfig) and cfg.teacher and not own_ranks(cfg)
    if resident and not cfg.distillation.offload_teacher:
        section = replace(cfg.distillation, offload_teacher=True)
        word = "distillation.offload_teacher=true"
        found.append((word, lambda c: replace(c, distillation=section)))
    return found


def _recompute(cfg: TrainingStageConfig) -> list[_Change]:
    """Every layer run again, by the keys that are in use."""
    if merged_recompute(cfg.trainer, cfg.megatron).recompute_granularity == "full":
        return []
    values: dict[str, Any] = dict(zip(RECOMPUTE_KEYS, ("full", "uniform", 1, None), strict=True))
    trainer, megatron = replace(cfg.trainer, **values), cfg.megatron
    place = "trainer"
    if set(RECOMPUTE_KEYS) & set(megatron.transformer):
        place = "megatron.transformer"
        nothing: dict[str, Any] = dict.fromkeys(RECOMPUTE_KEYS)
        trainer = replace(cfg.trainer, **nothing)
        megatron = replace(megatron, transformer={**megatron.transformer, **values})
    words = [f"{place}.{key}={value}" for key, value in values.items() if value is not None]
    change = partial(replace, trainer=trainer, megatron=megatron)
    return [(" ".join(words), change)]


def _degrees(cfg: Any, cluster: ClusterConfig) -> Iterator[tuple[int, int]]:
    """(tensor, pipeline) degrees above those of now: first inside a node, then across nodes."""
    tp, pp = cfg.parallel.tensor_model_parallel_size, cfg.parallel.pipeline_model_parallel_size
    wider = [tp]
    while wider[-1] * 2 <= cluster.ranks_per_node:
        wider.append(wider[-1] * 2)
    yield from ((size, pp) for size in wider[1:])
    for deeper in (2, 4, 8, 16):
        yield wider[-1], pp * deeper


def _fits(run: Run, cfg: Any, cluster: ClusterConfig) -> bool:
    ranks, size = run.ranks - own_ranks(cfg), cfg.parallel.model_parallel_size
    job = replace(run.job, cfg=cfg, data_parallel_size=max(1, ranks // size))
    try:
        check_job(job)
        cfg.parallel.world_size(ranks)
        check_split(cfg, ranks)
    except ValueError:
        return False
    return fits(fullest_rank(job), cluster)
