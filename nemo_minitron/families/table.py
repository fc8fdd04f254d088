"""The parameter table: the one place that says what every tensor of a model means.

Pruning, checkpoint import and export, parameter counting and the completeness check all read it.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nemo_minitron.config.layers import kinds_of
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.dims import DIMS

_INDEX = re.compile(r"\\\{(layer|expert|mtp)\\\}")
_OF_EXPERT = re.compile(r"local_experts\.(\{expert\}|\d+)\.(linear_fc[12]\.(?:weight|bias))")

PREDICTION, ON_DISK = "mtp.layers.", "transformer_layer."
"""How Megatron-Core calls layers for multi-token prediction, and the layer inside each on disk."""
_IN_MEMORY = "mtp_model_layer."

COMMON_SPEC = "nemo_minitron.models.spec:block_spec"
"""The function that makes the layers of families without modules of their own."""


def _always(_: ModelConfig) -> bool:
    return True


@dataclass(frozen=True)
class Row:
    """One parameter (or one per layer, or one per layer and expert) of a family.

    Attributes:
        name: Megatron name under the local spec; ``{layer}`` stands for the 0-based layer index,
            ``{expert}`` for the 0-based global index of an expert, ``{mtp}`` for the number of a
            layer for multi-token prediction (``families/prediction.py``).
        dims: what each tensor dim holds, keys of ``families.dims.DIMS``.
        tp_dim: dim that tensor parallelism splits, None when replicated.
        hf: Hugging Face names; several are fused into one Megatron tensor along dim 0. A name that
            ends with ``[{expert}]`` is one expert's part of a tensor that holds those of all.
        hf_form: how the one Hugging Face tensor differs from Megatron's, a key of
            ``families.fuse.HF_FORMS``, or None if it is stored as it is.
        hf_dims: what dim 0 of each of several Hugging Face tensors holds, keys of ``DIMS`` whose
            parts are, one tensor after another, those of dim 0; empty where each is one part.
        te_name: name under the Transformer Engine spec, and in checkpoints, where it differs.
        parts_on_disk: names of the parts of dim 0, each of which a checkpoint holds as a tensor of
            its own, named ``<te_name or name>.<part>``; empty where it is one tensor.
        kind: what a layer has to be made of to have it (``config.layers``); empty for every layer.
        stored_as: one more name that other programs may store it under; never written.
        when: whether a model with this config has the parameter.
        expert: the expert this row belongs to, once ``of_expert`` has filled in ``{expert}``.
        template: the row that ``of_expert`` made this one from.
    """

    name: str
    dims: tuple[str, ...]
    tp_dim: int | None
    hf: tuple[str, ...]
    te_name: str | None = None
    hf_form: str | None = None
    hf_dims: tuple[str, ...] = ()
    when: Callable[[ModelConfig], bool] = _always
    expert: int | None = None
    template: "Row | None" = None
    stored_as: str | None = None
    parts_on_disk: tuple[str, ...] = ()
    kind: str = ""

    @property
    def names_on_disk(self) -> tuple[str, ...]:
        """Names that a checkpoint may hold it under, most likely first."""
        return tuple(name for name in (self.te_name, self.name, self.stored_as) if name)

    @property
    def per_layer(self) -> bool:
        """Whether every layer has one."""
        return "{layer}" in self.name

    @property
    def per_expert(self) -> bool:
        """Whether every expert has one and this row does not say yet which one's it is."""
        return "{expert}" in self.name

    @property
    def predicts(self) -> bool:
        """Whether it belongs to a layer for multi-token prediction."""
        return self.name.startswith(PREDICTION)

    @property
    def grouped_name(self) -> str | None:
        """Name where one module holds the matrices of all experts; None outside experts.

        Megatron's ``TEGroupedMLP`` multiplies them in one kernel: ``linear_fc1.weight0``,
        ``linear_fc1.weight1`` and so on. On disk both forms are the same tensors.
        """
        name, found = _OF_EXPERT.subn(r"\2\1", self.name)
        return name if found else None

    def of_expert(self, expert: int) -> "Row":
        """Return the row of one expert (global index): every name with the index filled in."""

        def fill(name: str) -> str:
            return name.replace("{expert}", str(expert))

        return replace(
            self,
            name=fill(self.name),
            hf=tuple(map(fill, self.hf)),
            te_name=None if self.te_name is None else fill(self.te_name),
            expert=expert,
            template=self,
        )

    def of_prediction(self, number: int, layers: int) -> "Row":
        """Return the row of one layer for multi-token prediction, after ``layers`` of the model."""
        te_name = self.te_name and self.te_name.replace("{mtp}", str(number))
        return replace(
            self,
            name=self.name.replace("{mtp}", str(number)),
            hf=tuple(name.replace("{mtp}", str(layers + number)) for name in self.hf),
            te_name=te_name,
            stored_as=self.stored_as and self.stored_as.replace("{mtp}", str(number)),
        )

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Return the global shape of the Megatron tensor."""
        return tuple(DIMS[dim].size(config) for dim in self.dims)


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: key in ``ModelConfig.family``.
        hf_architectures: ``architectures`` entries of config.json that belong to it, and the
            ``model_type`` that goes with each.
        rows: the table.
        from_hf: config.json dictionary -> ModelConfig; keys that may change the network and that it
            does not read are refused (``config_json.check_keys``).
        to_hf: ModelConfig -> config.json dictionary; refuses sizes that transformers does not take.
        hf_reads: keys of config.json that ``from_hf`` reads; all others are carried over.
        models: what people call them, for the documentation.
        refuses: what ``from_hf`` does not take and why, for the documentation.
        prunable: sizes that can be pruned, where not all that the model has.
        why_not_prunable: why not the others.
        hf_prefix: what Hugging Face names start with, which checkpoints of the bare model leave
            out.
        left_out: what Hugging Face names of tensors start with that the table does not hold and
            that an import leaves out on request (``families.prediction``); empty where none do.
        layer_spec: what makes the layers of a pipeline stage, as ``module:function``. It is
            imported only where a model is built, so that the tables do not need Megatron, and is
            called with Megatron's configuration, the virtual stage (None without interleaving) and
            the pipeline rank.
        megatron: fields of Megatron's ``TransformerConfig`` that every model of the family needs
            and that ``ModelConfig`` does not hold; the user cannot set them.
    """

    name: str
    hf_architectures: Mapping[str, str]
    rows: tuple[Row, ...]
    from_hf: Callable[[dict[str, Any]], ModelConfig]
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    hf_reads: frozenset[str] = frozenset()
    models: str = ""
    refuses: tuple[str, ...] = ()
    prunable: tuple[str, ...] | None = None
    why_not_prunable: str = ""
    hf_prefix: str = "model."
    left_out: str = ""
    layer_spec: str = COMMON_SPEC
    megatron: Mapping[str, Any] = field(default_factory=dict)

    def parameters(self, config: ModelConfig) -> Iterator[tuple[str, Row, int | None]]:
        """Yield (Megatron name, row, layer index or None) of every parameter, layers in order.

        Rows of experts come one by one, each bound to its expert (``Row.expert``). Those of layers
        for multi-token prediction come last, without an index, as they are none of the decoder's.
        """
        rows: list[Row] = []
        kinds = kinds_of(config)
        for row in self.rows:
            if row.when(config) and row.per_expert:
                rows += [row.of_expert(expert) for expert in range(config.num_moe_experts or 0)]
            elif row.when(config):
                rows.append(row)
        for row in rows:
            if not row.per_layer and not row.predicts:
                yield row.name, row, None
        for layer in range(config.num_layers):
            for row in rows:
                if row.per_layer and row.kind in kinds[layer]:
                    yield row.name.format(layer=layer), row, layer
        for number in range(config.mtp_num_layers or 0):
            for row in (row for row in rows if row.predicts and row.kind in kinds[-1]):
                bound = row.of_prediction(number, config.num_layers)
                yield bound.name, bound, None

    def counted(self, config: ModelConfig) -> Iterator[tuple[Row, int]]:
        """Yield every row of a model, not bound to an expert, and how many parameters it is of."""
        kinds = kinds_of(config)
        for row in (row for row in self.rows if row.when(config)):
            number = (config.num_moe_experts or 0) if row.per_expert else 1
            if row.per_layer:
                number *= sum(row.kind in kind for kind in kinds)
            elif row.predicts:
                number *= (config.mtp_num_layers or 0) if row.kind in kinds[-1] else 0
            yield row, number

    def find(self, name: str, config: ModelConfig) -> tuple[Row, int | None]:
        """Return row (bound to its expert) and layer of a Megatron name, under any layer spec.

        Raises:
            ValueError: no row fits; names the parameter and lists the known rows.
        """
        kinds = kinds_of(config)
        for row in (row for row in self.rows if row.when(config)):
            index = _indices(row, name)
            if index is None:
                continue
            layer = index.get("layer")
            if row.kind not in kinds[min(index.get("layer", len(kinds)), len(kinds) - 1)]:
                continue
            found = row.of_expert(index["expert"]) if row.per_expert else row
            if "mtp" in index:
                found = found.of_prediction(index["mtp"], config.num_layers)
            return found, layer
        known = "\n  ".join(row.name for row in self.rows)
        raise ValueError(
            f"parameter {name} has no row in the table of family '{self.name}'; add one to "
            f"nemo_minitron/families/{self.name}.py. Known rows:\n  {known}"
        )


def _indices(row: Row, name: str) -> dict[str, int] | None:
    """Return the numbers at the placeholders of a row in a name; None if it does not match."""
    # Transformer Engine's names of what lies inside such a layer are those on disk.
    for candidate in dict.fromkeys((name, name.replace(_IN_MEMORY, ON_DISK))):
        for pattern in filter(None, (row.name, row.te_name, row.grouped_name)):
            found = re.fullmatch(_INDEX.sub(r"(?P<\1>\\d+)", re.escape(pattern)), candidate)
            if found:
                return {key: int(value) for key, value in found.groupdict().items()}
    return None


def parameter_count(family: Family, config: ModelConfig) -> dict[str, int]:
    """Parameters: ``total`` and ``non_embedding`` (without input and output embeddings)."""
    total = embedding = 0
    for row, number in family.counted(config):
        count = number * math.prod(row.shape(config))
        total += count
        if "vocab" in row.dims or "position" in row.dims:
            embedding += count
    return {"total": total, "non_embedding": total - embedding}


def active_parameters(family: Family, config: ModelConfig) -> int:
    """Count the parameters that process a token: of the routed experts, only the chosen ones.

    Layers for multi-token prediction are not needed for the next token.
    """
    always = routed = 0
    for row, number in family.counted(config):
        count = 0 if row.predicts else number * math.prod(row.shape(config))
        always += 0 if row.per_expert else count
        routed += count if row.per_expert else 0
    return always + routed * config.moe_router_topk // (config.num_moe_experts or 1)
