"""Tasks for the rank pool: checkpoints written by Megatron-Core as other programs would."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from tests.cases.live import _load, _logits, _start


def _folder(path: str) -> str:
    if dist.get_rank() == 0:
        Path(path).mkdir(parents=True, exist_ok=True)
    dist.barrier()
    return path


def save_as(
    config: ModelConfig,
    parallel: ParallelConfig,
    source: str,
    targets: dict[str, tuple[str, dict[str, Any], dict[str, Any]]],
) -> None:
    """Load one of our checkpoints and save it with Megatron-Core, vocabulary padded.

    Args:
        config: of the model.
        parallel: layout.
        source: ``checkpoint/`` of a result.
        targets: folder -> prefix of the keys, metadata of ``sharded_state_dict``, and what lies in
            the state dictionary besides.
    """
    groups = _start(parallel)
    chunks = _load(config, source, parallel, groups)
    for folder, (prefix, metadata, others) in targets.items():
        metadata = {"dp_cp_group": groups.dp_cp, **metadata}
        state = {
            f"model{index}": chunk.sharded_state_dict(prefix=prefix, metadata=metadata)
            for index, chunk in enumerate(chunks)
        }
        state["optimizer"] = ShardedTensor.from_rank_offsets(
            f"optimizer.state.exp_avg.{prefix}decoder.final_layernorm.weight",
            torch.zeros(8),
            (0, dist.get_rank(), dist.get_world_size()),
        )
        rank, size = dist.get_rank(), dist.get_world_size()
        state["rng_state"] = ShardedObject("rng_state", {"seed": 1}, (size,), (rank,))
        dist_checkpointing.save({**state, **others}, _folder(folder))


def logits_of(
    results: dict[str, str], ids: torch.Tensor, parallel: ParallelConfig
) -> dict[str, torch.Tensor | None]:
    """Logits of result folders, without padding."""
    groups = _start(parallel)
    out = {}
    for name, folder in results.items():
        checkpoint = Path(folder) / "checkpoint"
        config = ModelConfig.load(checkpoint)
        found = _logits(_load(config, str(checkpoint), parallel, groups), groups, ids)
        out[name] = None if found is None else found[..., : config.vocab_size]
    return out


def save_nemo(result: str, archive: str, parallel: ParallelConfig) -> None:
    """A result folder as a ``.nemo`` archive."""
    from nemo_minitron.models.gpt import MinitronGPTModel
    from nemo_minitron.models.nemo_file import result_config

    _start(parallel)
    model = MinitronGPTModel(result_config(Path(result), parallel))
    model.load(Path(result) / "checkpoint")
    model.save_to(archive)


def restore_nemo(archive: str, parallel: ParallelConfig) -> tuple[dict[str, Any], Any, Any]:
    """Local weights, config and bytes of the tokenizer of a restored archive, saved once more."""
    from omegaconf import OmegaConf

    from nemo_minitron.models.gpt import MinitronGPTModel

    _start(parallel)
    config = MinitronGPTModel.restore_from(archive, return_config=True)
    model = MinitronGPTModel.restore_from(archive)
    weights = {
        f"{index}.{name}": p.detach().clone()
        for index, chunk in enumerate(model.chunks)
        for name, p in chunk.named_parameters()
    }
    model.save_to(archive + ".again.nemo")
    return weights, model.gpt, OmegaConf.to_container(config)


def nemo_config(archive: str) -> Any:
    """The config of an archive, without its weights."""
    from nemo_minitron.models.gpt import MinitronGPTModel

    return MinitronGPTModel.restore_from(archive, return_config=True)


def local_weights(
    config: ModelConfig, parallel: ParallelConfig, source: str
) -> dict[str, torch.Tensor]:
    """Local weights of a result at a layout."""
    groups = _start(parallel)
    chunks = _load(config, source, parallel, groups)
    return {
        f"{index}.{name}": p.detach().clone()
        for index, chunk in enumerate(chunks)
        for name, p in chunk.named_parameters()
    }
