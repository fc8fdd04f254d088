"""Loads and saves the weights of a built model as a ``torch_dist`` checkpoint."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from nemo_minitron.checkpoint.megatron_args import common_state, extra_states, name_on_disk
from nemo_minitron.checkpoint.refuse_code import refuse_code
from nemo_minitron.checkpoint.torch_dist import settle_metadata
from nemo_minitron.config.megatron import ForwardMegatronConfig
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.families.registry import family_of
from nemo_minitron.models.build import HiddenGPTModel, build_gpt
from nemo_minitron.models.projection import is_projection, without_projection
from nemo_minitron.models.settings import frozen_settings
from nemo_minitron.runtime.agreement import together
from nemo_minitron.runtime.groups import ParallelGroups
from nemo_minitron.runtime.launch import device
from nemo_minitron.runtime.megatron import save_sharded

_ALMOST_FULL = 1 << 20
_VOCAB_KEYS = ("embedding.word_embeddings.weight", "output_layer.weight")


@contextmanager
def plain_errors(folder: Path) -> Iterator[None]:
    """Raise what happened instead of torch's ``CheckpointException``, on every rank.

    That one is a ``BaseException``, and errors of the writing processes reach it as text.

    Args:
        folder: the checkpoint that is being written or read.

    Raises:
        OSError: as the operating system reported it (disk full).
        RuntimeError: anything else.
    """
    try:
        yield
    except CheckpointException as error:
        text = "; ".join(str(cause) for cause, _ in error.failures.values())
        number = re.search(r"\[Errno (\d+)\]", text)
        # torch.save may say no more than "unexpected pos" when a write failed.
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        code = int(number.group(1)) if number else errno.ENOSPC if free < _ALMOST_FULL else None
        if code is None:
            raise RuntimeError(f"{folder}: {text}") from error
        raise OSError(code, os.strerror(code), str(folder)) from error


def model_sharded_state_dict(
    chunks: list[HiddenGPTModel], groups: ParallelGroups
) -> dict[str, dict[str, Any]]:
    """Sharded tensors of every chunk, keyed ``model0``, ``model1``, ...

    ``_extra_state`` objects (Transformer Engine's fp8 metadata) are left out: they hold no weight.
    """
    metadata = {"dp_cp_group": groups.dp_cp}
    out = {}
    for index, chunk in enumerate(chunks):
        state = chunk.sharded_state_dict(metadata=metadata)
        out[f"model{index}"] = {
            key: value for key, value in state.items() if not isinstance(value, ShardedObject)
        }
    return out


def nonfinite_parameter(chunks: list[HiddenGPTModel]) -> str | None:
    """A parameter that holds NaN or infinity on any rank (collective, the same on every rank).

    Returns:
        Its name with the global layer number, None when all are finite.
    """
    name = next(filter(None, map(_nonfinite_in, chunks)), None)
    device = next(chunks[0].parameters()).device
    flag = torch.tensor(float(name is not None), device=device)
    # Every rank has to learn of it, whatever it shares with the one that found it.
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=dist.group.WORLD)
    if flag.item() == 0:
        return None
    names: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(names, name, group=dist.group.WORLD)
    return next(filter(None, names))


@torch.no_grad()
def _nonfinite_in(chunk: HiddenGPTModel) -> str | None:
    for name, parameter in chunk.named_parameters():
        # One sum is several times faster than isfinite; it can overflow, so it only acquits.
        if not parameter.sum().isfinite() and not parameter.isfinite().all():
            return re.sub(
                r"(?<=decoder\.layers\.)\d+",
                lambda found: str(chunk.decoder.layers[int(found.group())].layer_number - 1),
                name,
            )
    return None


def _result_state(chunks: list[HiddenGPTModel], groups: ParallelGroups) -> dict[str, Any]:
    """Sharded tensors of the model alone: a result holds nothing that only training needs."""
    return {
        name: without_projection(state)
        for name, state in model_sharded_state_dict(chunks, groups).items()
    }


def _check_shapes(folder: Path, wanted: dict[str, Any], metadata: Metadata) -> None:
    """Refuse weights of other sizes than the model.yaml beside them says."""
    tensors = [
        tensor
        for state in wanted.values()
        for tensor in state.values()
        if isinstance(tensor, ShardedTensor)
    ]
    for tensor in tensors:
        saved = metadata.state_dict_metadata.get(tensor.key)
        shape = tuple(saved.size) if isinstance(saved, TensorStorageMetadata) else None
        if shape != tensor.global_shape and not (shape and tensor.allow_shape_mismatch):
            found = "not among them" if shape is None else f"of shape {shape}"
            raise ValueError(
                f"{folder}: the weights are not those of its model.yaml: {tensor.key} should be "
                f"of shape {tensor.global_shape} and is {found}; run the stage that wrote it again"
            )


def load_weights(
    chunks: list[HiddenGPTModel],
    groups: ParallelGroups,
    folder: Path,
    *,
    key: str = "checkpoint",
) -> None:
    """Fill the model from ``folder``, written at any layout (collective).

    Rows of a padded vocabulary that the checkpoint does not hold become zero.

    Args:
        chunks: this rank's part of the model.
        groups: this rank's process groups.
        folder: ``checkpoint/`` of a result.
        key: config key that named the result, for messages.

    Raises:
        ValueError: the weights do not fit the model, or hold NaN or infinity; or loading them could
            run code.
    """
    metadata = refuse_code(folder)
    wanted = _result_state(chunks, groups)
    _check_shapes(folder, wanted, metadata)
    with plain_errors(folder):
        state = dist_checkpointing.load(wanted, str(folder))
    for index, chunk in enumerate(chunks):
        result = chunk.load_state_dict(state[f"model{index}"], strict=False)
        missing = [
            key
            for key in result.missing_keys
            if not key.endswith("_extra_state") and not is_projection(key)
        ]
        if missing or result.unexpected_keys:
            raise ValueError(
                f"{folder} does not fit the model: missing {missing}, "
                f"unexpected {result.unexpected_keys}"
            )
    bad = nonfinite_parameter(chunks)
    if bad:
        raise ValueError(
            f"{bad} in {folder} holds NaN or infinite values: the weights are damaged; set {key} "
            "to an intact result"
        )


def _unpad(tensor: ShardedTensor, vocab_size: int) -> ShardedTensor | None:
    """Return the part of a vocabulary shard that is not padding; None when nothing is left."""
    rows = min(tensor.local_shape[0], vocab_size - tensor.global_offset[0])
    if rows <= 0:
        return None
    return replace(
        tensor,
        data=tensor.data[:rows].contiguous(),
        local_shape=(rows, *tensor.local_shape[1:]),
        global_shape=(vocab_size, *tensor.global_shape[1:]),
        axis_fragmentations=None,
        allow_shape_mismatch=False,
    )


def _extra_state_objects(config: ModelConfig) -> dict[str, ShardedObject]:
    """Empty ones of the whole model, which one rank writes; other programs ask for them."""
    return {
        name_on_disk(key, offset, shape): ShardedObject(key, None, shape, offset)
        for key, offset, shape in extra_states(family_of(config), config)
    }


def save_model(
    chunks: list[HiddenGPTModel], groups: ParallelGroups, config: ModelConfig, folder: Path
) -> None:
    """Write weights and ``model.yaml`` into a folder without weights (collective).

    The dtype that is written is that of the weights in memory, not of those they came from.
    """
    make = partial(folder.mkdir, parents=True, exist_ok=True)
    together(make if dist.get_rank() == 0 else None)
    largest = max(chunks[0].parameters(), key=torch.Tensor.numel)
    config = replace(config, dtype=str(largest.dtype).removeprefix("torch."))
    save_weights(chunks, groups, config, folder)
    if dist.get_rank() == 0:
        config.save(folder)


def save_weights(
    chunks: list[HiddenGPTModel], groups: ParallelGroups, config: ModelConfig, folder: Path
) -> None:
    """Write the model to ``folder`` (collective; the folder exists and is empty).

    The vocabulary is stored without padding, so the checkpoint does not depend on the layout. The
    projection of intermediate losses is left out.
    """
    state = _result_state(chunks, groups)
    for chunk in state.values():
        for name, tensor in list(chunk.items()):
            if isinstance(tensor, ShardedTensor) and tensor.key in _VOCAB_KEYS:
                trimmed = _unpad(tensor, config.vocab_size)
                if trimmed is None:
                    del chunk[name]
                else:
                    chunk[name] = trimmed
    if dist.get_rank() == 0:
        state["objects"] = _extra_state_objects(config)
    with plain_errors(folder):
        save_sharded({**state, **common_state(config)}, str(folder))
    if dist.get_rank() == 0:
        settle_metadata(folder)


def load_frozen(
    folder: Path,
    parallel: ParallelConfig,
    groups: ParallelGroups,
    *,
    dtype: torch.dtype = torch.float32,
    megatron: ForwardMegatronConfig | None = None,
    prediction: bool = False,
) -> list[HiddenGPTModel]:
    """Build and fill this rank's part of a model (collective).

    Args:
        folder: ``checkpoint/`` of a result.
        parallel: the initialised layout.
        groups: this rank's process groups.
        dtype: of the weights in memory.
        megatron: Megatron's own settings, or None for the defaults.
        prediction: whether the layers for multi-token prediction are wanted too, if there are any.

    Returns:
        Chunks in eval mode that return hidden states, on this rank's device.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    settings = frozen_settings(megatron or ForwardMegatronConfig())
    config = ModelConfig.load(folder)
    config = config if prediction else config.without_prediction()
    chunks = [
        chunk.to(device())
        for chunk in build_gpt(config, parallel, groups, dtype=dtype, settings=settings)
    ]
    load_weights(chunks, groups, folder)
    for chunk in chunks:
        chunk.eval()
        chunk.return_hidden = True
    return chunks
