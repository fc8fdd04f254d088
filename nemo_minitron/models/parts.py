"""The parameters of a model in memory, by the rows of its table, whichever spec built it."""

from collections.abc import Iterator, Sequence

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.table import Family, Row
from nemo_minitron.models.build import HiddenGPTModel
from nemo_minitron.runtime.groups import ParallelGroups

_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


def stored(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and the buffers that a checkpoint holds too (``expert_bias`` of a router)."""
    yield from module.named_parameters()
    kept = module.state_dict(keep_vars=True)
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in kept)


def outer_parameters(
    chunks: Sequence[HiddenGPTModel], family: Family, config: ModelConfig
) -> Iterator[tuple[str, Row, Tensor]]:
    """Name, row and parameter (or buffer) of everything outside the decoder's layers.

    Tied embeddings are held twice in a pipeline: the copy of the last stage goes by the name of
    the output layer, which the table of a tied model does not list.

    Raises:
        ValueError: a parameter has no row.
    """
    tied = config.share_embeddings_and_output_weights
    for chunk in chunks:
        for name, parameter in stored(chunk):
            if not name.startswith("decoder.layers."):
                listed = _EMBEDDING if tied and name == _OUTPUT else name
                yield name, family.find(listed, config)[0], parameter


def by_row(
    family: Family, config: ModelConfig, layer: TransformerLayer, groups: ParallelGroups
) -> dict[str, Tensor]:
    """Name of the row -> parameter of a layer, whichever spec built it.

    Experts are numbered within their rank in a module, and over the whole layer in the table.

    Raises:
        ValueError: a parameter has no row.
    """
    prefix = f"decoder.layers.{layer.layer_number - 1}."
    first = groups.ep.rank() * (config.num_moe_experts or 0) // groups.ep.size()
    found = {}
    for name, parameter in stored(layer):
        row, _ = family.find(prefix + name, config)
        if row.expert is not None and row.template is not None:
            row = row.template.of_expert(first + row.expert)
        found[row.name] = parameter
    return found
