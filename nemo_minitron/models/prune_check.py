"""Everything that can keep a model in memory from being pruned, looked at before a weight changes.

What only one rank can see is told to all, so that they refuse together and none waits for another.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import partial

import torch.distributed as dist
from torch import Tensor

from nemo_minitron.config.layout import padded_vocab_size
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.table import Family, Row
from nemo_minitron.models.build import HiddenGPTModel
from nemo_minitron.models.parts import by_row, outer_parameters
from nemo_minitron.pruning.moves import rows_of_layers
from nemo_minitron.pruning.plan import Plan
from nemo_minitron.pruning.plan_check import check_plan
from nemo_minitron.runtime.agreement import agreed
from nemo_minitron.runtime.groups import ParallelGroups


def check_before(
    chunks: Sequence[HiddenGPTModel],
    family: Family,
    config: ModelConfig,
    plan: Plan,
    groups: ParallelGroups,
) -> None:
    """Refuse a model, or a plan, that could not be pruned to the end (collective).

    Raises:
        ValueError: names the parameter that no row of the table finds, the one that is missing or
            of another shape, the layers that no rank has, or what the plan has too much.
    """
    agreed(partial(check_plan, config, plan))
    agreed(partial(_check_parameters, chunks, family, config, groups))
    text = json.dumps([plan.to_json(), family.name], sort_keys=True)
    layers = [layer.layer_number - 1 for chunk in chunks for layer in chunk.decoder.layers]
    mine = hashlib.sha256(text.encode()).hexdigest(), layers
    answers = [mine] * groups.tp_ep_pp.size()
    dist.all_gather_object(answers, mine, group=groups.tp_ep_pp)
    agreed(partial(_check_answers, answers, config))


def _check_answers(answers: Sequence[tuple[str, list[int]]], config: ModelConfig) -> None:
    if len({digest for digest, _ in answers}) > 1:
        raise ValueError("the ranks were given different plans; give all of them the same one")
    lacking = set(range(config.num_layers)).difference(*(layers for _, layers in answers))
    if lacking:
        raise ValueError(
            f"no rank has the layers {sorted(layer + 1 for layer in lacking)} of num_layers="
            f"{config.num_layers} (counted from 1); give every chunk of the model"
        )


def _check_parameters(
    chunks: Sequence[HiddenGPTModel], family: Family, config: ModelConfig, groups: ParallelGroups
) -> None:
    rows = rows_of_layers(family, config)
    share = (config.num_moe_experts or 0) // groups.ep.size()
    first = groups.ep.rank() * share
    for name, row, parameter in outer_parameters(chunks, family, config):
        _check_shape(name, row, parameter, config, groups)
    for layer in (layer for chunk in chunks for layer in chunk.decoder.layers):
        number = layer.layer_number - 1
        if number >= config.num_layers:
            raise ValueError(
                f"the model has a layer {layer.layer_number}, but num_layers={config.num_layers}"
            )
        found = by_row(family, config, layer, groups)
        here = {
            row.name: row
            for row in rows[number]
            if row.expert is None or first <= row.expert < first + share
        }
        if found.keys() != here.keys():
            lacking = sorted(here.keys() - found.keys()) or sorted(found.keys() - here.keys())
            raise ValueError(
                f"layer {layer.layer_number} lacks {lacking[:5]}, or has them although the table "
                f"of family '{family.name}' does not say so"
            )
        for name, row in here.items():
            _check_shape(name.format(layer=number), row, found[name], config, groups)


def _check_shape(
    name: str, row: Row, tensor: Tensor, config: ModelConfig, groups: ParallelGroups
) -> None:
    expected = list(row.shape(config))
    ranks = groups.tp.size() if row.expert is None else groups.expt_tp.size()
    for dim, axis in enumerate(row.dims):
        if axis == "vocab":
            expected[dim] = padded_vocab_size(config.vocab_size, ranks)
        elif axis == "position":  # a model may be built for longer sequences
            expected[dim] = tensor.size(dim)
    if row.tp_dim is not None:
        expected[row.tp_dim] //= ranks
    if list(tensor.shape) != expected:
        raise ValueError(
            f"{name} is of shape {list(tensor.shape)} on a rank that should have {expected}: the "
            "model is not the one that its config describes"
        )
