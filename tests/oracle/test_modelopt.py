"""Against ModelOpt 0.43.0: the same scores, the same kept indices, the same weights.

ModelOpt stores what it keeps in rank order, this package in ascending order; its weights are put in
ascending order before they are compared. It runs at TP=1 only, with one or two pipeline stages.
"""

from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nemo_minitron.checkpoint.lazy import from_tensor
from nemo_minitron.checkpoint.torch_dist import write_torch_dist
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import PruningConfig, ScoreConfig, TargetConfig
from nemo_minitron.pruning.plan import Plan, make_plan
from nemo_minitron.pruning.scores import Scores, model_meta
from nemo_minitron.pruning.slicing import prune_store
from tests.cases.importance import score
from tests.helpers.pool import WorkerPool
from tests.helpers.tiny import random_weights, token_batch
from tests.oracle.environment import OracleUnavailableError, run_oracle
from tests.oracle.models import MODELS
from tests.oracle.peer import Peer

# The first test of a module pays for the environment, the oracle and the rank pool.
pytestmark = pytest.mark.timeout(600)

SAMPLES, LENGTH = 6, 24
TARGETS: dict[str, dict[str, int]] = {
    "hidden": {"hidden_size": 48},
    "ffn": {"ffn_hidden_size": 64},
    "heads": {"num_attention_heads": 4},
    "layers": {"num_layers": 2},
    "all": {
        "hidden_size": 40,
        "ffn_hidden_size": 56,
        "num_attention_heads": 4,
        "num_layers": 3,
    },
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "TP2": {"tensor_model_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2},
}


def tokens() -> torch.Tensor:
    vocab = min(config.vocab_size for config, _ in MODELS.values())
    return token_batch(SAMPLES, LENGTH - 1, vocab, seed=3)


def weights_of(model: str) -> dict[str, torch.Tensor]:
    config, family = MODELS[model]
    return random_weights(config, seed=1, family=family)


@pytest.fixture(scope="module", params=[1, 2], ids=["peer PP1", "peer PP2"])
def peer(request, tmp_path_factory) -> Peer:
    """ModelOpt on both models and all targets, one process per pipeline rank."""
    folder = tmp_path_factory.mktemp("oracle")
    np.save(folder / "tokens.npy", tokens().numpy())
    models = {}
    for name, (config, _) in MODELS.items():
        save_file(weights_of(name), folder / f"{name}.safetensors")
        models[name] = {
            "config": asdict(config),
            "weights": str(folder / f"{name}.safetensors"),
            "tokens": str(folder / "tokens.npy"),
            "targets": TARGETS,
        }
    try:
        job = {"pipeline_model_parallel_size": request.param, "models": models}
        run_oracle(job, folder, timeout=400)
    except OracleUnavailableError as error:
        pytest.skip(str(error))
    return Peer(folder, request.param, SAMPLES)


@pytest.fixture(scope="module")
def ours(ranks: WorkerPool, tmp_path_factory) -> dict[tuple[str, str], Scores]:
    """(model, layout) -> our scores."""
    found = {}
    for model, (config, family) in MODELS.items():
        folder = tmp_path_factory.mktemp(model)
        store = {name: from_tensor(tensor) for name, tensor in weights_of(model).items()}
        write_torch_dist(folder, store, family, config, workers=1)
        for layout, degrees in LAYOUTS.items():
            parallel = ParallelConfig(**degrees)
            arguments = (config, str(folder), tokens(), parallel, ScoreConfig(), 1, 2)
            axes = ranks.run(parallel.world_size(), score, *arguments)[0]
            found[model, layout] = Scores(**axes, meta={"model": model_meta(config)})
    return found


def plan_for(model: str, target: str, scores: Scores) -> Plan:
    pruning = PruningConfig(target=TargetConfig(**TARGETS[target]))
    return make_plan(MODELS[model][0], pruning, scores)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_scores(peer: Peer, ours, model: str, layout: str) -> None:
    found, expected = ours[model, layout], peer.scores(model)
    assert found.keys() == expected.keys()
    for axis, tensor in expected.items():
        torch.testing.assert_close(
            found[axis].double(),
            tensor.double(),
            rtol=1e-5,
            atol=0,
            msg=partial("{}: {}".format, axis),
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("model", MODELS)
def test_kept_indices(peer: Peer, ours, model: str, target: str, layout: str) -> None:
    plan = plan_for(model, target, ours[model, layout])
    orders = peer.orders(model, target)
    assert plan.layers == orders["layers"]
    assert plan["hidden"] == sorted(orders["hidden"])
    assert plan["ffn"] == [sorted(kept) for kept in orders["ffn"]]
    assert plan["head"] == [sorted(kept) for kept in orders["head"]]
    groups = list(range(MODELS[model][0].num_query_groups))
    assert plan["query_group"] == [groups] * len(plan.layers)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("model", MODELS)
def test_weights(peer: Peer, ours, model: str, target: str) -> None:
    config, family = MODELS[model]
    plan = plan_for(model, target, ours[model, "one rank"])
    store = {name: from_tensor(tensor) for name, tensor in weights_of(model).items()}
    pruned = prune_store(family, config, plan, store)
    found, orders = peer.weights(model, target), peer.orders(model, target)
    assert found.keys() == pruned.keys()
    for name, lazy in pruned.items():
        row, layer = family.find(name, config)
        tensor = found[name]
        for dim, holds in enumerate(row.dims):
            back = ascending(holds, config, orders, layer, tensor.size(dim))
            tensor = tensor.index_select(dim, back)
        assert torch.equal(tensor, lazy.read()), name


def ascending(
    holds: str, config: ModelConfig, orders: dict[str, Any], layer: int | None, size: int
) -> torch.Tensor:
    """Positions that put one dim of ModelOpt's tensor, in rank order, in ascending order.

    Args:
        holds: what the dim holds, as the parameter table says.
        config: the model before pruning.
        orders: kept indices in rank order.
        layer: layer of the pruned model.
        size: of the dim.
    """
    if holds == "vocab":
        return torch.arange(size)
    if holds == "hidden":
        return torch.tensor(orders["hidden"]).argsort()
    ffn = torch.tensor(orders["ffn"][layer]).argsort()
    if holds == "ffn":
        return ffn
    if holds == "gate_up":
        return torch.cat([ffn, ffn + len(ffn)])
    groups, channels = config.num_query_groups, torch.arange(config.kv_channels)
    heads = torch.tensor(orders["head"][layer]).view(groups, -1).argsort(dim=1)
    if holds == "qkv":  # after the query heads of each group its key and value
        count = heads.size(1)
        fixed = torch.arange(count, count + 2).expand(groups, 2)
        heads = torch.cat([heads, fixed], dim=1)
    blocks = heads + torch.arange(groups)[:, None] * heads.size(1)
    return (blocks.flatten()[:, None] * config.kv_channels + channels).flatten()
