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


def read_by_step(folder: str, prompt: Ids, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """``[v]`` logits after a prompt that was read token by token, and that was read at once.

    Mamba layers forget slowly here, so that what every token adds to a state is small beside it.
    """
    from nemo_minitron.models.inference import CachedModel
    from nemo_minitron.models.weights import load_frozen
    from nemo_minitron.runtime.groups import ParallelGroups

    parallel = ParallelConfig()
    init_model_parallel(parallel)
    groups = ParallelGroups.current()
    chunks = load_frozen(Path(folder), parallel, groups, dtype=dtype)
    for name, parameter in chunks[0].named_parameters():
        if name.endswith(("dt_bias", "A_log")):
            parameter.data.fill_(-6.0 if name.endswith("dt_bias") else -1.0)
    model = CachedModel(chunks[0], groups, ModelConfig.load(Path(folder)).vocab_size)
    ids, found = torch.tensor([prompt]), []
    with torch.inference_mode():
        for width in (1, len(prompt)):
            model.start(1, len(prompt))
            for start in range(0, len(prompt), width):
                logits = model.forward(ids[:, start : start + width])
            assert logits is not None
            found.append(logits[0].clone())
    return found[0], found[1]
