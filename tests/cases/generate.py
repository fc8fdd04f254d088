"""Functions that the tests of generation run on the ranks."""

from pathlib import Path
from typing import Any

import torch

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.runtime.launch import init_model_parallel

Ids = list[int]


def continuations_at(
    folder: str, degrees: dict[str, Any], prompts: list[Ids], new: int
) -> list[Ids]:
    """Greedy continuations by the model of a ``checkpoint/`` at a layout, without stop tokens."""
    from nemo_minitron.models.inference import GREEDY, CachedModel, continue_prompts
    from nemo_minitron.models.weights import load_frozen
    from nemo_minitron.runtime.groups import ParallelGroups

    parallel = ParallelConfig(**degrees)
    init_model_parallel(parallel)
    groups = ParallelGroups.current()
    chunks = load_frozen(Path(folder), parallel, groups)
    model = CachedModel(chunks[0], groups, ModelConfig.load(Path(folder)).vocab_size)
    draws = torch.zeros(len(prompts), new, dtype=torch.float64)
    return continue_prompts(model, prompts, GREEDY, draws, frozenset())
