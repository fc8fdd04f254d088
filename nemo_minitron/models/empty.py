"""Builds a model without memory for its layers, for those that fill it one layer at a time."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.models.build import HiddenGPTModel, build_gpt
from nemo_minitron.models.hidden import HiddenModel
from nemo_minitron.runtime.groups import ParallelGroups

Shapes = dict[nn.Parameter, torch.Size]


def build_empty_gpt(
    config: ModelConfig, parallel: ParallelConfig, groups: ParallelGroups, like: HiddenGPTModel
) -> tuple[list[HiddenGPTModel], Shapes]:
    """Build this rank's part of a model; only embeddings and output layer get memory.

    Args:
        config: global sizes.
        parallel: layout; must be the initialised one.
        groups: this rank's process groups.
        like: a model whose dtype, device, mode, settings and sequence length the new one gets.

    Returns:
        The chunks, and the local shape that each emptied parameter is to have.
    """
    with _emptied_parameters() as shapes:
        chunks = build_gpt(
            config,
            parallel,
            groups,
            dtype=like.config.params_dtype,
            max_sequence_length=like.max_sequence_length,
            settings=like.settings,
        )
    for chunk in chunks:
        chunk.to(next(like.parameters()).device)
        chunk.train(like.training)
        chunk.return_hidden = like.return_hidden
    return chunks, shapes


@contextmanager
def _emptied_parameters() -> Iterator[Shapes]:
    """Parameters of modules built here are emptied as soon as their module is complete.

    Embeddings and output layer are left alone: Megatron synchronises tied ones as it builds them.
    """
    shapes: Shapes = {}

    def empty(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        if module is None or isinstance(parent, HiddenModel | LanguageModelEmbedding):
            return
        for parameter in module.parameters():
            if parameter not in shapes:
                shapes[parameter] = parameter.shape
                parameter.data = parameter.data.new_empty(0)

    handle = register_module_module_registration_hook(empty)
    try:
        yield shapes
    finally:
        handle.remove()
