"""Which inner states of teacher and student are compared. Imports neither torch nor Megatron.

A state is named by a *place*: the layer that reads it, counted from 0 over the whole model. Hidden
states are taken "always post-LayerNorm" (2407.14679, section 3), as their reader's norm leaves
them: the embedding output is read by layer 0, the output of block i by layer i + 1, that of the
last block by the final norm, place ``num_layers``.
"""

import math
from dataclasses import dataclass

from nemo_minitron.config.distillation import BOUNDARY_LOSSES, LAYER_LOSSES, IntermediateConfig
from nemo_minitron.config.layers import ATTENTION, EXPERTS, MLP, kinds_of
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig

_KEY = "distillation.intermediate"
_PART_OF = {"attention_relation": ATTENTION, "mlp_input": MLP + EXPERTS}
"""What a layer has to be made of, of those losses that do not take every layer."""
_FROM_END = 3
"""``last-2 -> last-2``: 29 -> 13 of 32 and 16 layers (2407.14679, section A.4 and table 17)."""


@dataclass(frozen=True, order=True)
class Pair:
    """One comparison.

    Attributes:
        kind: one of ``INTERMEDIATE_LOSSES``.
        teacher: place in the teacher.
        student: place in the student.
    """

    kind: str
    teacher: int
    student: int


def automatic_map(teacher: ModelConfig, student: ModelConfig) -> list[list[int]]:
    """Return the last layer but two of both models, whether depth or width was pruned.

    Raises:
        ValueError: one of them has fewer than three layers.
    """
    for key, model in (("teacher", teacher), ("student", student)):
        if model.num_layers < _FROM_END:
            raise ValueError(
                f"{key} has num_layers={model.num_layers}, too few for {_KEY}.layer_map=null (the "
                f"last layer but two); set {_KEY}.layer_map=[[teacher layer,student layer]]"
            )
    return [[teacher.num_layers - _FROM_END, student.num_layers - _FROM_END]]


def _check_map(pairs: list[list[int]], teacher: ModelConfig, student: ModelConfig) -> None:
    if not pairs:
        raise ValueError(f"{_KEY}.layer_map=[] maps no layer; set it to null or to pairs")
    for pair in pairs:
        if len(pair) != 2:
            raise ValueError(
                f"{_KEY}.layer_map={pairs}: {pair} is not a pair [teacher layer,student layer]"
            )
        for key, layer, model in zip(("teacher", "student"), pair, (teacher, student), strict=True):
            if not 0 <= layer < model.num_layers:
                raise ValueError(
                    f"{_KEY}.layer_map={pairs}: {key} layer {layer} is out of range; the {key} has "
                    f"num_layers={model.num_layers}, so layers 0 to {model.num_layers - 1}"
                )
    students = [pair[1] for pair in pairs]
    twice = sorted({layer for layer in students if students.count(layer) > 1})
    if twice:
        raise ValueError(
            f"{_KEY}.layer_map={pairs} maps student layer {twice[0]} more than once; give each "
            "student layer one teacher layer"
        )


def layer_map(
    config: IntermediateConfig, teacher: ModelConfig, student: ModelConfig
) -> list[list[int]]:
    """Return pairs [teacher layer, student layer], counted from 0.

    Raises:
        ValueError: not pairs, out of range, or a student layer twice.
    """
    if config.layer_map is None:
        return automatic_map(teacher, student)
    pairs = [list(pair) for pair in config.layer_map]
    _check_map(pairs, teacher, student)
    return pairs


def _check_kind(loss: str, model: ModelConfig, layer: int, key: str) -> None:
    """Refuse a loss of a part that a layer of a hybrid model does not have."""
    needs = _PART_OF.get(loss, "")
    if needs and not set(needs) & set(kinds_of(model)[layer]):
        field = "hybrid_layer_pattern"
        field = "linear_attention_freq" if model.linear_attention_freq else field
        raise ValueError(
            f"{_KEY}.losses holds {loss}, but {key} layer {layer} is of kind "
            f"'{kinds_of(model)[layer]}' in {field}={getattr(model, field)}; set "
            f"{_KEY}.layer_map to layers that have it, or leave {loss} out"
        )


def make_pairs(
    config: IntermediateConfig, teacher: ModelConfig, student: ModelConfig
) -> list[Pair]:
    """Return every comparison that ``distillation.intermediate`` asks for, in one fixed order.

    Raises:
        ValueError: as ``layer_map``; a layer has no part that a loss is of.
    """
    pairs = [Pair("embedding", 0, 0)] if "embedding" in config.losses else []
    if not config.uses(LAYER_LOSSES):
        return pairs
    for of_teacher, of_student in layer_map(config, teacher, student):
        for kind in LAYER_LOSSES:
            if kind in config.losses:
                _check_kind(kind, teacher, of_teacher, "teacher")
                _check_kind(kind, student, of_student, "student")
                after = int(kind in BOUNDARY_LOSSES)
                pairs.append(Pair(kind, of_teacher + after, of_student + after))
    return sorted(pairs)


def relation_heads(
    config: IntermediateConfig, teacher: ModelConfig, student: ModelConfig, parallel: ParallelConfig
) -> int:
    """Return how many heads both models' states are split into (2012.15828, section 3.2).

    Each is a run of channels of the concatenated heads, as wide as the model and the tensor make
    it. The automatic number makes it whole heads and a multiple of every tensor-parallel size that
    the models can have, so that each rank holds whole relation heads.

    Raises:
        ValueError: the number does not split one of the tensors, or the ranks do not split it.
    """
    heads = config.num_relation_heads
    if heads is None:
        return math.gcd(teacher.num_query_groups, student.num_query_groups)
    key = f"{_KEY}.num_relation_heads={heads}"
    tp = parallel.tensor_model_parallel_size
    if heads < 1 or heads % tp:
        raise ValueError(
            f"{key} must be a multiple of parallel.tensor_model_parallel_size={tp}, over which "
            "heads are split; use one, or null"
        )
    for name, model in (("teacher", teacher), ("student", student)):
        for size in ("num_attention_heads", "num_query_groups"):
            for channels in ("kv_channels", "query_channels"):
                width = getattr(model, size) * getattr(model, channels)
                if width % heads:
                    raise ValueError(
                        f"{key} must divide {size} x {channels}={width} of the {name}; use a "
                        "divisor of it, or null"
                    )
    return heads


def check_intermediate(
    config: IntermediateConfig, teacher: ModelConfig, student: ModelConfig, parallel: ParallelConfig
) -> None:
    """Refuse what the chosen losses cannot compare, before any weight is read.

    Raises:
        ValueError: names the value, the relation and the key to set.
    """
    make_pairs(config, teacher, student)
    if "attention_relation" in config.losses:
        relation_heads(config, teacher, student, parallel)
