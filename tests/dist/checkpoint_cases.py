"""Tasks for the rank pool: Megatron itself loads and saves checkpoints."""

from pathlib import Path

import torch
from megatron.core import dist_checkpointing

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.models.build import build_gpt
from nemo_minitron.models.weights import load_weights, model_sharded_state_dict
from nemo_minitron.runtime.groups import ParallelGroups
from nemo_minitron.runtime.launch import init_model_parallel


def load_and_save(
    config: ModelConfig, parallel: ParallelConfig, source: str, target: str
) -> dict[str, torch.Tensor]:
    """Load at one layout and save with Megatron's own writer, vocabulary padded.

    Returns:
        This rank's parameters: local tensors under the names of the first chunk's modules.
    """
    init_model_parallel(parallel)
    groups = ParallelGroups.current()
    chunks = build_gpt(config, parallel, groups)
    load_weights(chunks, groups, Path(source))
    dist_checkpointing.save(model_sharded_state_dict(chunks, groups), target)
    return {name: p.detach().clone() for name, p in chunks[0].named_parameters()}
