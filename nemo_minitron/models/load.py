"""A frozen model out of a result, ready for forward passes."""

from pathlib import Path

import torch

from nemo_minitron.config.megatron import ForwardMegatronConfig
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.models.build import HiddenGPTModel, build_gpt
from nemo_minitron.models.settings import frozen_settings
from nemo_minitron.models.weights import load_weights
from nemo_minitron.runtime.groups import ParallelGroups
from nemo_minitron.runtime.launch import device


def load_frozen(
    folder: Path,
    parallel: ParallelConfig,
    groups: ParallelGroups,
    *,
    dtype: torch.dtype = torch.float32,
    megatron: ForwardMegatronConfig | None = None,
) -> list[HiddenGPTModel]:
    """Build and fill this rank's part of a model (collective).

    Args:
        folder: ``checkpoint/`` of a result.
        parallel: the initialised layout.
        groups: this rank's process groups.
        dtype: of the weights in memory.
        megatron: Megatron's own settings; None: the defaults.

    Returns:
        Chunks in eval mode that return hidden states, on this rank's device.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    settings = frozen_settings(megatron or ForwardMegatronConfig())
    config = ModelConfig.load(folder)
    chunks = [
        chunk.to(device())
        for chunk in build_gpt(config, parallel, groups, dtype=dtype, settings=settings)
    ]
    load_weights(chunks, groups, folder)
    for chunk in chunks:
        chunk.eval()
        chunk.return_hidden = True
    return chunks
