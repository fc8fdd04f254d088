"""Count the layers and parameters that each rank of a layout holds."""

import math
from dataclasses import dataclass
from itertools import chain

from nemo_minitron.config.layers import EXPERTS, kinds_of
from nemo_minitron.config.layout import layers_on_stages, padded_vocab_size
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.families.registry import family_of

_EMBEDDING = "embedding."
_PARTS = {"self_attention.": "attention", "mixer.": "mamba"}


@dataclass(frozen=True)
class Share:
    """Parameters of one rank; ``expert`` ones have replicas of their own.

    Attributes:
        stage: rank in the pipeline.
        kinds: letters of each of its layers (``config.layers``), over all its model chunks.
        dense: parameters whose replicas are all data x context parallel ranks.
        expert: parameters of experts, spread over the expert-parallel ranks.
        embedding: of ``dense``, the input embeddings.
        output: of ``dense``, the output layer (tied or not).
    """

    stage: int
    kinds: list[str]
    dense: int
    expert: int
    embedding: int
    output: int

    @property
    def total(self) -> int:
        """All parameters of the rank."""
        return self.dense + self.expert


def shares(config: ModelConfig, parallel: ParallelConfig) -> list[Share]:
    """Return one ``Share`` per pipeline stage (tensor-parallel ranks hold equal ones).

    The vocabulary is padded as it is when a model is built.

    Args:
        config: global sizes; must fit ``parallel``.
        parallel: the layout.
    """
    tp = parallel.tensor_model_parallel_size
    kinds, padded = kinds_of(config), padded_vocab_size(config.vocab_size, tp)
    sizes: dict[str, dict[str, int]] = {}
    outer: dict[str, int] = {}
    predicting = 0  # parameters of experts in layers for multi-token prediction
    one = _one_of_each_kind(config, {"vocab_size": padded})
    for name, row, index in family_of(config).parameters(one):
        size = math.prod(row.shape(one)) // (tp if row.tp_dim is not None else 1)
        if index is None and row.expert is not None:
            predicting += size
        elif index is None:
            outer[name] = size
        else:
            layer = sizes.setdefault(kinds_of(one)[index], {"dense": 0, "expert": 0})
            layer["dense" if row.expert is None else "expert"] += size
    stages = [list(chain.from_iterable(rank)) for rank in layers_on_stages(config, parallel)]
    embedding = sum(size for name, size in outer.items() if name.startswith(_EMBEDDING))
    rest = sum(outer.values()) - embedding
    word = next(size for name, size in outer.items() if "word_embeddings" in name)
    tied = config.share_embeddings_and_output_weights
    output = word if tied else next(s for n, s in outer.items() if n.startswith("output_layer"))
    found = []
    for stage, layers in enumerate(stages):
        first, last = stage == 0, stage == len(stages) - 1
        # The last stage of a pipeline holds its own copy of tied embeddings, and of those that
        # layers for multi-token prediction read.
        copied = word if (tied or config.mtp_num_layers) and last and not first else 0
        held = [kinds[layer] for layer in layers]
        dense = sum(sizes[kind]["dense"] for kind in held) + copied
        dense += first * embedding + last * rest
        experts = sum(sizes[kind]["expert"] for kind in held) + last * predicting
        experts //= parallel.expert_model_parallel_size
        found.append(Share(stage, held, dense, experts, first * embedding, last * output))
    return found


def matmul_parameters(config: ModelConfig) -> dict[str, float]:
    """Return parameters that each token is multiplied with: active experts alone, no embeddings.

    Returns:
        ``attention``, ``mlp``, ``experts`` (with the router and shared ones) and ``mamba`` of all
        layers, ``prediction`` of all layers for multi-token prediction, and ``output``, tied to the
        embeddings or not, once for each token that is predicted.
    """
    one, kinds = _one_of_each_kind(config, {}), kinds_of(config)
    active = config.moe_router_topk / (config.num_moe_experts or 1)
    found = {"attention": 0.0, "mlp": 0.0, "experts": 0.0, "mamba": 0.0, "prediction": 0.0}
    for name, row, index in family_of(config).parameters(one):
        if len(row.dims) != 2:
            continue
        size = math.prod(row.shape(one)) * (1 if row.expert is None else active)
        if index is not None:
            mlp = "experts" if EXPERTS in kinds_of(one)[index] else "mlp"
            part = next((p for word, p in _PARTS.items() if word in name), mlp)
            found[part] += size * kinds.count(kinds_of(one)[index])
        elif row.predicts:
            found["prediction"] += size
    predicted = 1 + (config.mtp_num_layers or 0)
    return {**found, "output": float(predicted * config.vocab_size * config.hidden_size)}


def _one_of_each_kind(config: ModelConfig, sizes: dict[str, int]) -> ModelConfig:
    """Return the model with one layer of each kind that it has."""
    kinds = kinds_of(config)
    return config.resized(sizes, [kinds.index(kind) for kind in dict.fromkeys(kinds)])
