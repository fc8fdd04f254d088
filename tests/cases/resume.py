"""Tasks for the rank pool: a calibration that is cut off, and one that goes on."""

from dataclasses import asdict
from pathlib import Path

import torch

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import ScoreConfig
from nemo_minitron.config.training import DataConfig


class CutError(Exception):
    """Stands for whatever ends a job."""


def score(
    config: ModelConfig,
    folder: str,
    ids: torch.Tensor,
    parallel: ParallelConfig,
    scores: ScoreConfig,
    state: str,
    cut_after: int | None,
    every: int,
) -> tuple[dict[str, torch.Tensor], int] | None:
    """Scores and the samples that were not done again; None when it was cut off.

    The cut comes once ``cut_after`` forward passes of a sample are done.
    """
    from nemo_minitron.data.samples import NpyDataset
    from nemo_minitron.importance.estimate import estimate_scores
    from nemo_minitron.importance.resume import SavedState
    from nemo_minitron.models.build import build_gpt
    from nemo_minitron.models.weights import load_weights
    from nemo_minitron.runtime.groups import ParallelGroups
    from nemo_minitron.runtime.launch import init_model_parallel

    init_model_parallel(parallel)
    groups = ParallelGroups.current()
    chunks = build_gpt(config, parallel, groups)
    load_weights(chunks, groups, Path(folder))
    data = DataConfig(path="-", seq_length=ids.size(1), micro_batch_size=1, global_batch_size=2)
    saved = SavedState(Path(state), every, asdict(parallel))
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if cut_after is not None and done >= cut_after:
            raise CutError

    dataset = NpyDataset(ids.numpy(), len(ids))
    try:
        result = estimate_scores(chunks, config, groups, dataset, data, scores, advance, saved)
    except CutError:
        return None
    saved.remove()
    return result, saved.resumed
