"""Tasks for the rank pool: logits of a checkpoint."""

from pathlib import Path

import torch

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig


def megatron_logits(folder: str, parallel: ParallelConfig, ids: torch.Tensor) -> torch.Tensor:
    """Logits ``[b, s, v]`` (vocabulary unpadded) of ``<folder>/checkpoint`` without pipeline."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from nemo_minitron.models.build import build_gpt
    from nemo_minitron.models.weights import load_weights
    from nemo_minitron.runtime.groups import ParallelGroups
    from nemo_minitron.runtime.launch import init_model_parallel

    init_model_parallel(parallel)
    groups = ParallelGroups.current()
    checkpoint = Path(folder) / "checkpoint"
    config = ModelConfig.load(checkpoint)
    (chunk,) = build_gpt(config, parallel, groups)
    load_weights([chunk], groups, checkpoint)
    chunk.eval()
    with torch.no_grad():
        positions = torch.arange(ids.size(1))[None].expand_as(ids)
        logits = chunk(ids, positions, None)
        logits = gather_from_tensor_model_parallel_region(logits)
    return logits[..., : config.vocab_size]
