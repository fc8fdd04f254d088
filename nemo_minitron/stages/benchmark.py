"""``minitron benchmark``: prefill and decode speed, latency and memory of models side by side."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.checkpoint.artifact import check_output
from nemo_minitron.config.inference import BenchmarkConfig
from nemo_minitron.config.layout import check_cached, check_layout, check_writes
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.registry import family_of
from nemo_minitron.families.table import parameter_count
from nemo_minitron.runtime.ranks import launched_world_size, rank
from nemo_minitron.stages.settings import check_settings, on_ranks, opened_inputs

if TYPE_CHECKING:
    from nemo_minitron.evaluation.speed import Candidate


def check(cfg: BenchmarkConfig) -> None:
    """Refuse bad input before any rank or weight exists.

    Raises:
        ValueError: names the value, the relation and the key to set.
    """
    check_output(cfg, "benchmark")
    check_cached(cfg.parallel, "benchmark lets models write")
    cfg.parallel.world_size(launched_world_size())
    with opened_inputs(cfg):
        for path in cfg.checkpoint:
            model = ModelConfig.load(Path(path) / "checkpoint")
            try:
                check_layout(model, cfg.parallel)
                check_writes(model, "benchmark lets models write")
                check_settings(cfg, model, precision=cfg.precision)
                _check_size(cfg, model)
            except ValueError as error:
                raise ValueError(f"checkpoint={path}: {error}") from error


def _check_size(cfg: BenchmarkConfig, model: ModelConfig) -> None:
    tokens = cfg.prompt_length + cfg.new_tokens
    if tokens > model.max_written_length:
        raise ValueError(
            f"prompt_length={cfg.prompt_length} and new_tokens={cfg.new_tokens} exceed the "
            f"{model.max_written_length} positions of the model; lower prompt_length"
        )
    if cfg.memory_limit_gb is None:
        return
    size = 2 if cfg.precision == "bf16-mixed" else 4
    total = parameter_count(family_of(model), model)["total"] * size
    share = total / cfg.parallel.model_parallel_size / 1e9
    if share > cfg.memory_limit_gb:
        raise ValueError(
            f"memory_limit_gb={cfg.memory_limit_gb:g} is less than the {share:.3g} GB of weights "
            "on each rank; raise memory_limit_gb, or split the model further (parallel.*)"
        )


def run(cfg: BenchmarkConfig) -> None:
    """Measure and write ``metrics.json``."""
    with on_ranks(cfg, "benchmark", cfg.parallel, cfg.seed) as work:
        metrics = _measure(cfg)
        if rank() == 0:
            (work / "metrics.json").write_text(json.dumps(metrics, indent=1))
    _show(metrics)


def _measure(cfg: BenchmarkConfig) -> dict[str, Any]:
    from nemo_minitron.evaluation.speed import EQUAL, LARGEST, Work, largest_batch, take_turns
    from nemo_minitron.runtime.console import progress

    found = [_candidate(cfg, path) for path in cfg.checkpoint]
    work = Work(cfg.batch_size, cfg.prompt_length, cfg.new_tokens, cfg.seed)
    batches = {EQUAL: [cfg.batch_size] * len(found)}
    limit = _limit(cfg)
    if limit is not None:
        batches[LARGEST] = [largest_batch(c, work, limit, cfg.max_batch_size) for c in found]
    runs: dict[str, list[dict[str, Any]]] = {}
    with progress("measuring", len(batches) * len(found) * (cfg.rounds + 1)) as advance:
        for name, sizes in batches.items():
            runs[name] = take_turns(found, sizes, work, cfg.rounds, advance)
    models = [
        {
            "label": candidate.label,
            "parameters": _parameters(path),
            **{name: figures[number] for name, figures in runs.items()},
        }
        for number, (candidate, path) in enumerate(zip(found, cfg.checkpoint, strict=True))
    ]
    return {"device": _device(), "memory_limit_bytes": limit, "models": models}


def _candidate(cfg: BenchmarkConfig, path: str) -> "Candidate":
    from nemo_minitron.evaluation.speed import Candidate
    from nemo_minitron.models.build import PRECISION_DTYPES
    from nemo_minitron.models.inference import CachedModel
    from nemo_minitron.models.weights import load_frozen
    from nemo_minitron.runtime.groups import ParallelGroups

    folder, groups = Path(path) / "checkpoint", ParallelGroups.current()
    chunks = load_frozen(
        folder, cfg.parallel, groups, dtype=PRECISION_DTYPES[cfg.precision], megatron=cfg.megatron
    )
    model = CachedModel(chunks[0], groups, ModelConfig.load(folder).vocab_size)
    return Candidate(_label(path, cfg.checkpoint), model)


def _label(path: str, others: list[str]) -> str:
    """Name of the folder, or the whole path where two have the same name."""
    name = Path(path).name
    return name if [Path(other).name for other in others].count(name) == 1 else path


def _parameters(path: str) -> int:
    model = ModelConfig.load(Path(path) / "checkpoint")
    return parameter_count(family_of(model), model)["total"]


def _limit(cfg: BenchmarkConfig) -> int | None:
    """Return bytes per rank that a batch must fit into; None if no largest batch is measured."""
    import torch

    if cfg.memory_limit_gb is not None:
        return int(cfg.memory_limit_gb * 1e9)
    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads a rank"


def _show(metrics: dict[str, Any]) -> None:
    from nemo_minitron.reporting.speed import SPEED_HEADER, speed_rows
    from nemo_minitron.runtime.console import show_table

    show_table(f"benchmark ({metrics['device']})", SPEED_HEADER, speed_rows(metrics))
