"""Tasks for the rank pool: stock models whose layers differ, or are where they cannot be."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import nemo_minitron
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.models.parts import stored
from nemo_minitron.pruning.plan import Plan
from tests.cases.live import _load, _logits, _start
from tests.cases.stock import _forward_only, _refusal, _run, _samples
from tests.cases.stock_models import Named, by_name, stock_model


@dataclass
class Pruned:
    """The state of a stock model after pruning.

    Attributes:
        plan: what was kept.
        weights: of all pipeline stages.
        logits: of the last stage, else None.
        settings: some of Megatron's configuration.
    """

    plan: Plan
    weights: Named
    logits: torch.Tensor | None
    settings: dict[str, Any]


def pruned_stock(
    config: ModelConfig,
    folder: str,
    ids: torch.Tensor,
    parallel: ParallelConfig,
    choice: dict[str, Any],
    listed: bool,
) -> Pruned:
    """Score a stock model and prune it.

    ``choice`` are sizes, or ``drop_layers``, which needs no scores.
    """
    groups = _start(parallel)
    own = _load(config, folder, parallel, groups)
    chunks = stock_model(config, parallel, own, listed=listed)
    if "drop_layers" in choice:
        plan = nemo_minitron.make_plan(None, model=chunks, **choice)
    else:
        with nemo_minitron.score(chunks) as scores:
            forward = {"forward_only": True, "collect_non_loss_data": True}
            _run(chunks, _samples(ids), _forward_only, **forward)
        plan = nemo_minitron.make_plan(scores, choice)
    small = nemo_minitron.prune(chunks, plan)
    weights = by_name(small, stored)
    names = ("num_layers", "window_size", "window_attn_skip_freq")
    settings = {name: getattr(small[0].config, name) for name in names}
    return Pruned(plan, weights, _logits(small, groups, ids), settings)


def refused(
    config: ModelConfig, parallel: ParallelConfig, plan: Plan, listed: bool
) -> tuple[str, bool]:
    """Return the error of ``prune``, and whether the weights are unchanged."""
    _start(parallel)
    chunks = stock_model(config, parallel, None, listed=listed)
    before = [p.detach().clone() for chunk in chunks for p in chunk.parameters()]
    said = _refusal(partial(nemo_minitron.prune, chunks, plan))
    after = [p for chunk in chunks for p in chunk.parameters()]
    return said, len(before) == len(after) and all(map(torch.equal, before, after))


def scored_where_layers_are(
    config: ModelConfig, parallel: ParallelConfig, where: str
) -> tuple[int, str]:
    """Layers of this rank's stage, and what ``score`` says.

    ``where`` is a layout in Megatron's words, also one that models of this package cannot have.
    """
    _start(parallel)
    parallel.pipeline_model_parallel_layout = where
    chunks = stock_model(config, parallel, None)
    said = _refusal(nemo_minitron.score(chunks).__enter__)
    return len(chunks[0].decoder.layers), said
