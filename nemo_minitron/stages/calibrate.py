"""A checkpoint scored on a calibration set: ``importance``, and every round of ``prune``."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.config.megatron import ForwardMegatronConfig
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import ScoreConfig
from nemo_minitron.config.training import DataConfig
from nemo_minitron.data.datasets import stage_dataset
from nemo_minitron.importance.estimate import estimate_scores, forward_passes
from nemo_minitron.importance.resume import SavedState
from nemo_minitron.models.build import DTYPES, build_gpt
from nemo_minitron.models.settings import frozen_settings
from nemo_minitron.models.weights import load_weights
from nemo_minitron.pruning.scores import Scores
from nemo_minitron.runtime.console import progress
from nemo_minitron.runtime.groups import ParallelGroups
from nemo_minitron.runtime.launch import device

STATE = "state"
_BATCH_SIZES = ("micro_batch_size", "global_batch_size")


@dataclass(frozen=True)
class Calibrated:
    """Global scores, and what they took in this process.

    Attributes:
        scores: the same on every rank.
        tokens: tokens that went forward.
        seconds: in which they did.
    """

    scores: Scores
    tokens: int
    seconds: float

    def figures(self) -> dict[str, Any]:
        """For ``metrics.json``."""
        return {
            "num_samples": self.scores.meta["num_samples"],
            "num_tokens": self.scores.meta["num_tokens"],
            "forward_tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens / self.seconds, 1),
        }


def calibrate(
    folder: Path,
    data: DataConfig,
    parallel: ParallelConfig,
    scores: ScoreConfig,
    megatron: ForwardMegatronConfig,
    *,
    output_dir: str,
    work: Path,
    save_every: int,
) -> Calibrated:
    """Data, model, forward passes; collective, inside ``runtime.launch.distributed``.

    Args:
        folder: ``checkpoint/`` of a result.
        data: the calibration set.
        parallel: the initialised layout.
        scores: what to score and how.
        megatron: Megatron's own settings.
        output_dir: of the stage, for the cache of tokens.
        work: resumable folder, where ``state/`` is kept until the scores are there.
        save_every: samples between two saves of the state.
    """
    config = ModelConfig.load(folder)
    dataset = stage_dataset(data, config, folder, output_dir)
    groups = ParallelGroups.current()
    # CPUs have no fast path for half precision.
    dtype = DTYPES[config.dtype] if torch.cuda.is_available() else torch.float32
    chunks = build_gpt(config, parallel, groups, dtype=dtype, settings=frozen_settings(megatron))
    for chunk in chunks:
        chunk.to(device())
    load_weights(chunks, groups, folder)
    layout = {**asdict(parallel), **{k: getattr(data, k) for k in _BATCH_SIZES}}
    saved = SavedState(work / STATE, save_every, layout, asdict(ParallelConfig()))
    passes = sum(forward_passes(config, scores, len(dataset)))
    start = time.perf_counter()
    with progress("scoring samples", passes) as advance:
        args = (chunks, config, groups, dataset, data, scores, advance, saved, work)
        found = estimate_scores(*args)
    seconds = time.perf_counter() - start
    saved.remove()
    found.meta["data"] = {
        key: getattr(data, key) for key in ("seq_length", "split", "split_name", "seed")
    }
    return Calibrated(found, (passes - saved.resumed) * data.seq_length, seconds)
