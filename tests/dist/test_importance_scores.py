"""Scores against transformers with hooks of its own; scores at other layouts against one rank."""

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_minitron.checkpoint.hf import to_hf
from nemo_minitron.checkpoint.lazy import from_tensor
from nemo_minitron.checkpoint.torch_dist import write_torch_dist
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import PruningConfig, ScoreConfig, TargetConfig
from nemo_minitron.families.llama import LLAMA as FAMILY
from nemo_minitron.pruning.plan import make_plan
from nemo_minitron.pruning.scores import Scores, model_meta
from tests.cases.importance import score
from tests.helpers.pool import WorkerPool
from tests.helpers.tiny import LLAMA, random_weights, token_batch

KINDS = ("mean", "l2", "var")
SAMPLES, LENGTH = 7, 16
TARGETS = PruningConfig(
    target=TargetConfig(
        num_layers=3,
        hidden_size=40,
        ffn_hidden_size=48,
        num_attention_heads=3,
        num_query_groups=3,
    )
)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return random_weights(LLAMA)


@pytest.fixture(scope="module")
def checkpoint(weights, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("scored")
    store = {name: from_tensor(tensor) for name, tensor in weights.items()}
    write_torch_dist(folder, store, FAMILY, LLAMA, workers=1)
    return str(folder)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return token_batch(SAMPLES, LENGTH, LLAMA.vocab_size)[:, :LENGTH].contiguous()


@pytest.fixture(scope="module")
def activations(weights, ids) -> dict[str, torch.Tensor]:
    """``[hooks, samples, s, width]`` of every hooked place, from transformers."""
    store = {name: from_tensor(tensor) for name, tensor in weights.items()}
    tensors = {name: lazy.read() for name, lazy in to_hf(FAMILY, LLAMA, store).items()}
    model = LlamaForCausalLM(LlamaConfig(**FAMILY.to_hf(LLAMA))).eval()
    model.load_state_dict(tensors)
    seen: dict[str, list[torch.Tensor]] = {"hidden": [], "ffn": [], "head": []}

    def output(module, args, out):
        seen["hidden"].append(out)

    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(output)
        layer.post_attention_layernorm.register_forward_hook(output)
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, a: seen["ffn"].append(a[0]))
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, a: seen["head"].append(a[0]))
    states: list[Any] = []  # some versions of transformers return a tuple
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda m, a, k: states.append((*a, *k.values())[0]), with_kwargs=True
        )
    model.model.layers[-1].register_forward_hook(lambda m, a, out: states.append(out))
    with torch.no_grad():
        model(ids)
    found = {axis: torch.stack(values).double() for axis, values in seen.items()}
    found["layer"] = torch.stack([s[0] if isinstance(s, tuple) else s for s in states]).double()
    return found


def aggregate(x: torch.Tensor, kind: str, dim: int) -> torch.Tensor:
    if kind == "mean":
        return x.abs().mean(dim)
    return x.square().sum(dim).sqrt() if kind == "l2" else x.var(dim, correction=0)


def expected_scores(
    activations: dict[str, torch.Tensor], batch: str, seq: str
) -> dict[str, torch.Tensor]:
    def of(axis: str) -> torch.Tensor:
        return aggregate(aggregate(activations[axis], seq, 2), batch, 1)

    head = of("head").view(LLAMA.num_layers, LLAMA.num_attention_heads, LLAMA.kv_channels)
    cosine = torch.cosine_similarity(activations["layer"][:-1], activations["layer"][1:], dim=-1)
    return {
        "hidden": of("hidden").sum(0),
        "ffn": of("ffn"),
        "head": head.square().sum(-1).sqrt(),
        "layer": 1 - cosine.mean(dim=(1, 2)),
    }


def assert_scores(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float
) -> None:
    assert found.keys() == expected.keys()
    for axis, tensor in expected.items():
        torch.testing.assert_close(
            found[axis].double(),
            tensor.double(),
            rtol=rtol,
            atol=0,
            msg=partial("{}: {}".format, axis),
        )


def plan_of(scores: dict[str, torch.Tensor]):
    return make_plan(LLAMA, TARGETS, Scores(scores, meta={"model": model_meta(LLAMA)}))


def test_equal_transformers(ranks: WorkerPool, checkpoint, ids, activations) -> None:
    (found,) = ranks.run(1, score, LLAMA, checkpoint, ids, ParallelConfig(), ScoreConfig(), 2, 4)
    expected = expected_scores(activations, "l2", "mean")
    assert_scores(found, expected, rtol=1e-5)
    assert plan_of(found) == plan_of(expected)


@pytest.mark.parametrize(("batch", "seq"), itertools.product(KINDS, KINDS))
def test_nine_aggregations(ranks: WorkerPool, checkpoint, ids, activations, batch, seq) -> None:
    config = ScoreConfig(
        axes=["hidden", "ffn", "head"], batch_aggregation=batch, seq_aggregation=seq
    )
    (found,) = ranks.run(1, score, LLAMA, checkpoint, ids, ParallelConfig(), config, 2, 4)
    expected = expected_scores(activations, batch, seq)
    del expected["layer"]
    # A variance of near-equal numbers shows the rounding of the activations themselves.
    assert_scores(found, expected, rtol=1e-4 if "var" in (batch, seq) else 1e-5)


@pytest.mark.parametrize(("micro", "per_step"), [(1, 1), (3, 6), (7, 7), (8, 8)])
def test_batch_sizes_do_not_matter(
    ranks: WorkerPool, checkpoint, ids, activations, micro, per_step
) -> None:
    (found,) = ranks.run(
        1, score, LLAMA, checkpoint, ids, ParallelConfig(), ScoreConfig(), micro, per_step
    )
    assert_scores(found, expected_scores(activations, "l2", "mean"), rtol=1e-5)


LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"tensor_model_parallel_size": 2},
    "TP2 SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"pipeline_model_parallel_size": 2},
    "PP2 VPP2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "PP2 uneven": {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1},
    "CP2": {"context_parallel_size": 2},
    "DP2": {"data_parallel_size": 2},
    "TP2 SP CP2": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "context_parallel_size": 2,
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_do_not_matter(ranks: WorkerPool, checkpoint, ids, activations, layout) -> None:
    parallel = ParallelConfig(**LAYOUTS[layout])
    found = ranks.run(
        parallel.world_size(), score, LLAMA, checkpoint, ids, parallel, ScoreConfig(), 1, 4
    )
    expected = expected_scores(activations, "l2", "mean")
    assert_scores(found[0], expected, rtol=1e-5)
    assert plan_of(found[0]) == plan_of(expected)
    for other in found[1:]:
        for axis, tensor in found[0].items():
            assert torch.equal(other[axis], tensor), axis
