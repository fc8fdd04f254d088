"""What each rank of a layout holds of a model: layers and parameters of every pipeline stage."""

import math
from dataclasses import dataclass

from nemo_minitron.config.layout import layers_of_stages, padded_vocab_size
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.families.registry import family_of

_EMBEDDING = "embedding."


@dataclass(frozen=True)
class Share:
    """Parameters of one rank; ``expert`` ones have replicas of their own.

    Attributes:
        stage: rank in the pipeline.
        layers: of this rank, over all its model chunks.
        dense: parameters whose replicas are all data x context parallel ranks.
        expert: parameters of experts, spread over the expert-parallel ranks.
        embedding: of ``dense``, the input embeddings.
        output: of ``dense``, the output layer (tied or not).
    """

    stage: int
    layers: int
    dense: int
    expert: int
    embedding: int
    output: int

    @property
    def total(self) -> int:
        """All parameters of the rank."""
        return self.dense + self.expert


def shares(config: ModelConfig, parallel: ParallelConfig) -> list[Share]:
    """One ``Share`` per pipeline stage (tensor-parallel ranks hold equal ones).

    The vocabulary is padded as it is when a model is built.

    Args:
        config: global sizes; must fit ``parallel``.
        parallel: the layout.
    """
    tp = parallel.tensor_model_parallel_size
    padded = config.resized(
        {"num_layers": 1, "vocab_size": padded_vocab_size(config.vocab_size, tp)}
    )
    family = family_of(config)
    layer = {"dense": 0, "expert": 0}
    outer: dict[str, int] = {}
    for name, row, index in family.parameters(padded):
        size = math.prod(row.shape(padded)) // (tp if row.tp_dim is not None else 1)
        if index is None:
            outer[name] = size
        else:
            layer["dense" if row.expert is None else "expert"] += size
    experts = layer["expert"] // parallel.expert_model_parallel_size
    stages = [sum(sizes) for sizes in layers_of_stages(config, parallel)]
    embedding = sum(size for name, size in outer.items() if name.startswith(_EMBEDDING))
    rest = sum(outer.values()) - embedding
    word = next(size for name, size in outer.items() if "word_embeddings" in name)
    tied = config.share_embeddings_and_output_weights
    output = word if tied else next(s for n, s in outer.items() if n.startswith("output_layer"))
    found = []
    for stage, layers in enumerate(stages):
        first, last = stage == 0, stage == len(stages) - 1
        # The last stage of a pipeline holds its own copy of tied embeddings.
        copied = word if tied and last and not first else 0
        dense = layers * layer["dense"] + first * embedding + last * rest + copied
        found.append(
            Share(
                stage,
                layers,
                dense,
                layers * experts,
                first * embedding,
                last * output,
            )
        )
    return found


def matmul_parameters(config: ModelConfig) -> dict[str, float]:
    """Parameters that each token is multiplied with: active experts alone, no embeddings.

    Returns:
        ``attention`` and ``mlp`` of all layers, and ``output``, tied to the embeddings or not.
    """
    one = config.resized({"num_layers": 1})
    active = config.moe_router_topk / (config.num_moe_experts or 1)
    found = {"attention": 0.0, "mlp": 0.0}
    for name, row, index in family_of(config).parameters(one):
        if index is not None and len(row.dims) == 2:
            part = "attention" if "self_attention" in name else "mlp"
            size = math.prod(row.shape(one)) * (1 if row.expert is None else active)
            found[part] += size * config.num_layers
    return {**found, "output": float(config.vocab_size * config.hidden_size)}
