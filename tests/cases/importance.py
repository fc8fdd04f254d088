"""Tasks for the rank pool: scores of a model spread over ranks."""

from pathlib import Path

import torch

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import ImportanceConfig, PruneConfig, ScoreConfig
from nemo_minitron.config.training import DataConfig


def score(
    config: ModelConfig,
    folder: str,
    ids: torch.Tensor,
    parallel: ParallelConfig,
    scores: ScoreConfig,
    micro_batch_size: int,
    global_batch_size: int,
    moments: str | None = None,
) -> dict[str, torch.Tensor]:
    """Scores of the checkpoint in ``folder`` on ``[samples, s]`` ids; moments into a folder."""
    from nemo_minitron.data.samples import NpyDataset
    from nemo_minitron.importance.estimate import estimate_scores
    from nemo_minitron.models.build import build_gpt
    from nemo_minitron.models.weights import load_weights
    from nemo_minitron.runtime.groups import ParallelGroups
    from nemo_minitron.runtime.launch import init_model_parallel

    init_model_parallel(parallel)
    groups = ParallelGroups.current()
    chunks = build_gpt(config, parallel, groups)
    load_weights(chunks, groups, Path(folder))
    data = DataConfig(
        path="-",
        seq_length=ids.size(1),
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
    )
    dataset = NpyDataset(ids.numpy(), len(ids))
    target = None if moments is None else Path(moments)
    result = estimate_scores(chunks, config, groups, dataset, data, scores, folder=target)
    hooks = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) for c in chunks for m in c.modules()
    )
    assert hooks == 0
    return result


def run_stage(cfg: ImportanceConfig) -> None:
    """``minitron importance`` on the ranks of the pool."""
    from nemo_minitron.stages import importance

    importance.check(cfg)
    importance.run(cfg)


def run_prune(cfg: PruneConfig, cut_at: str = "") -> str:
    """``minitron prune`` on the ranks of the pool; it dies when it logs ``cut_at``."""
    import logging

    from nemo_minitron.stages import calibrate, prune

    class Killer(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if cut_at and cut_at in record.getMessage():
                raise InterruptedError

    prune.check(cfg)
    killer, level = Killer(), calibrate.log.level
    calibrate.log.addHandler(killer)
    calibrate.log.setLevel(logging.INFO)
    try:
        prune.run(cfg)
    except InterruptedError:
        return "cut off"
    finally:
        calibrate.log.removeHandler(killer)
        calibrate.log.setLevel(level)
    return "done"
