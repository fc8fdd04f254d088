"""Builds a model without memory for its layers, for those that fill it one layer at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from nemo_minitron.models.build import HiddenGPTModel

Shapes = dict[nn.Parameter, torch.Size]


def build_empty_gpt(
    build: Callable[[], list[Any]], like: HiddenGPTModel
) -> tuple[list[HiddenGPTModel], Shapes]:
    """Build this rank's part of a model; only embeddings and output layer get memory.

    Args:
        build: makes the chunks (``models.found.builder_like``).
        like: a model whose device and mode the new one gets.

    Returns:
        The chunks, and the local shape that each emptied parameter is to have.
    """
    with _emptied_parameters() as shapes:
        chunks = build()
    for chunk in chunks:
        chunk.to(next(like.parameters()).device)
        chunk.train(like.training)
        if hasattr(like, "return_hidden"):
            chunk.return_hidden = like.return_hidden
    return chunks, shapes


@contextmanager
def _emptied_parameters() -> Iterator[Shapes]:
    """Empty the parameters of each module built inside as soon as it is complete.

    Embeddings and output layer are left alone: Megatron synchronises tied ones as it builds them.
    """
    shapes: Shapes = {}

    def empty(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        if module is None or isinstance(parent, LanguageModule | LanguageModelEmbedding):
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
