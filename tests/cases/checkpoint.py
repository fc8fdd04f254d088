"""Tasks for the rank pool: Megatron itself loads and saves checkpoints."""

from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.models.build import build_gpt
from nemo_minitron.models.weights import (
    load_weights,
    model_sharded_state_dict,
    save_model,
    save_weights,
)
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


def save_as(
    dtype: torch.dtype, config: ModelConfig, parallel: ParallelConfig, source: str, target: str
) -> None:
    """Load weights as another dtype than ``config`` names, and save them as training does."""
    init_model_parallel(parallel)
    groups = ParallelGroups.current()
    chunks = build_gpt(config, parallel, groups, dtype=dtype)
    load_weights(chunks, groups, Path(source))
    save_model(chunks, groups, config, Path(target))


def load_as_others(
    config: ModelConfig, parallel: ParallelConfig, source: str, target: str
) -> list[tuple[dict[str, torch.Tensor], set[str], int]]:
    """Load as Megatron-LM and Bridge do, who ask for every object, without any leniency.

    Args:
        config: of the model.
        parallel: layout.
        source: what a streaming stage wrote.
        target: an empty folder; gets what training writes, from the same weights.

    Returns:
        Of either: this rank's parameters, keys of the objects, and layers by ``args``.
    """
    init_model_parallel(parallel)
    groups = ParallelGroups.current()
    (chunk,) = chunks = build_gpt(config, parallel, groups)
    load_weights(chunks, groups, Path(source))
    save_weights(chunks, groups, config, Path(target))
    out = []
    for folder in (source, target):
        with torch.no_grad():
            for parameter in chunk.parameters():
                parameter.zero_()
        state = chunk.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})
        asked = {value.key for value in state.values() if isinstance(value, ShardedObject)}
        loaded = dist_checkpointing.load({"model": state}, folder)
        chunk.load_state_dict(loaded["model"])
        parameters = {name: p.detach().clone() for name, p in chunk.named_parameters()}
        out.append((parameters, asked, loaded["args"].num_layers))
    return out
