"""Depth criteria against transformers models that really lack the layers, and on every layout."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from nemo_minitron.checkpoint.hf import to_hf, write_hf
from nemo_minitron.checkpoint.lazy import from_tensor
from nemo_minitron.checkpoint.torch_dist import read_torch_dist, write_torch_dist
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import PruningConfig, ScoreConfig, TargetConfig
from nemo_minitron.families.llama import LLAMA as FAMILY
from nemo_minitron.families.registry import family_of
from nemo_minitron.pruning.plan import make_plan
from nemo_minitron.pruning.scores import Scores, model_meta
from tests.cases.importance import score
from tests.helpers.pool import WorkerPool
from tests.helpers.tiny import LLAMA, NEMOTRON_H, random_weights, token_batch, write_weights

LAYERS = LLAMA.num_layers
SAMPLES, LENGTH, LM_SAMPLES = 7, 16, 5
ALL = ["block_influence", "lm_loss", "block_angular", "block_lm_loss"]
SCORES = ScoreConfig(
    axes=["layer"], layer_criteria=ALL, block_sizes=[1, 2, 3], lm_loss_samples=LM_SAMPLES
)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    # Small enough that layers matter to the loss but no state is turned around.
    return {
        name: tensor if tensor.ndim == 1 else tensor * 0.6
        for name, tensor in random_weights(LLAMA, 3).items()
    }


@pytest.fixture(scope="module")
def checkpoint(weights, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("depth")
    store = {name: from_tensor(tensor) for name, tensor in weights.items()}
    write_torch_dist(folder, store, FAMILY, LLAMA, workers=1)
    return str(folder)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return token_batch(SAMPLES, LENGTH, LLAMA.vocab_size, 1)[:, :LENGTH].contiguous()


@pytest.fixture(scope="module")
def model(weights) -> LlamaForCausalLM:
    store = {name: from_tensor(tensor) for name, tensor in weights.items()}
    model = LlamaForCausalLM(LlamaConfig(**FAMILY.to_hf(LLAMA))).eval()
    model.load_state_dict({n: lazy.read() for n, lazy in to_hf(FAMILY, LLAMA, store).items()})
    return model


@torch.no_grad()
def loss_without(model: Any, ids: torch.Tensor, first: int, stop: int) -> float:
    """LM loss of the model with its layers ``first .. stop - 1`` taken out."""
    layers = model.model.layers
    kept = [layer for i, layer in enumerate(layers) if not first <= i < stop]
    model.model.layers = torch.nn.ModuleList(kept)
    try:
        logits = model(ids, use_cache=False).logits[:, :-1]
    finally:
        model.model.layers = layers
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).double(), ids[:, 1:].flatten(), reduction="mean"
    )
    return float(losses)


@torch.no_grad()
def angle(model: Any, ids: torch.Tensor, first: int, size: int) -> float:
    states: list[torch.Tensor] = []

    def before(module, args, kwargs):
        states.append((*args, *kwargs.values())[0])

    hooks = [
        layer.register_forward_pre_hook(before, with_kwargs=True) for layer in model.model.layers
    ]
    norm = model.model.norm_f if hasattr(model.model, "norm_f") else model.model.norm
    hooks.append(norm.register_forward_pre_hook(before, with_kwargs=True))
    model.model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    cosine = torch.cosine_similarity(states[first].double(), states[first + size].double(), dim=-1)
    return float(cosine.arccos().mean() / math.pi)


@pytest.fixture(scope="module")
def expected(model, ids) -> dict[str, torch.Tensor]:
    return scores_of(model, ids, LAYERS)


def scores_of(model: Any, ids: torch.Tensor, layers: int) -> dict[str, torch.Tensor]:
    some = ids[:LM_SAMPLES]
    found = {
        "layer_lm_loss": torch.tensor([loss_without(model, some, i, i + 1) for i in range(layers)])
    }
    for n in SCORES.block_sizes:
        starts = range(layers - n + 1)
        found[f"block_angular.{n}"] = torch.tensor([angle(model, ids, i, n) for i in starts])
        losses = [loss_without(model, some, i, i + n) for i in starts]
        found[f"block_lm_loss.{n}"] = torch.tensor(losses)
    return found


def plan_of(scores: dict[str, torch.Tensor], criterion: str, kept: int) -> list[int]:
    pruning = PruningConfig(target=TargetConfig(num_layers=kept), layer_criterion=criterion)
    held = Scores(scores, meta={"model": model_meta(LLAMA)})
    return make_plan(LLAMA, pruning, held).layers


def assert_scores(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == {*expected, "layer"}
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-5, atol=0, msg=partial("{}: {}".format, name)
        )
    for criterion in ("lm_loss", "block_angular", "block_lm_loss"):
        for kept in (1, 2, 3):
            assert plan_of(found, criterion, kept) == plan_of(expected, criterion, kept)


def test_losses_tell_the_layers_apart(model, ids, expected) -> None:
    whole = loss_without(model, ids[:LM_SAMPLES], 0, 0)
    increase = expected["layer_lm_loss"] - whole
    assert increase.abs().max() > 0.01
    assert len({round(x, 4) for x in increase.tolist()}) == LAYERS
    assert (expected["block_angular.2"] > 0.01).all()


LAYOUTS: dict[str, dict[str, Any]] = {
    "1": {},
    "TP2": {"tensor_model_parallel_size": 2},
    "TP2 SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"pipeline_model_parallel_size": 2},
    "PP2 VPP2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "PP2 uneven": {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1},
    "CP2": {"context_parallel_size": 2},
    "DP2": {"data_parallel_size": 2},
    "TP2 SP PP2": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "pipeline_model_parallel_size": 2,
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_transformers_on_every_layout(
    ranks: WorkerPool, checkpoint, ids, expected, layout
) -> None:
    parallel = ParallelConfig(**LAYOUTS[layout])
    found = ranks.run(parallel.world_size(), score, LLAMA, checkpoint, ids, parallel, SCORES, 1, 4)
    assert_scores(found[0], expected)
    for other in found[1:]:
        for name, tensor in found[0].items():
            assert torch.equal(other[name], tensor), name


@pytest.mark.parametrize(("micro", "per_step"), [(1, 1), (3, 6)])
def test_batch_sizes_do_not_matter(
    ranks: WorkerPool, checkpoint, ids, expected, micro, per_step
) -> None:
    args = (LLAMA, checkpoint, ids, ParallelConfig(), SCORES, micro, per_step)
    assert_scores(ranks.run(1, score, *args)[0], expected)


def test_only_what_is_asked_for(ranks: WorkerPool, checkpoint, ids, expected) -> None:
    config = ScoreConfig(axes=["layer"], layer_criteria=["lm_loss"], lm_loss_samples=LM_SAMPLES)
    (found,) = ranks.run(1, score, LLAMA, checkpoint, ids, ParallelConfig(), config, 1, 4)
    assert list(found) == ["layer_lm_loss"]
    assert (found.meta["num_samples"], found.meta["num_tokens"]) == (LM_SAMPLES, 5 * LENGTH)
    assert found.meta["lm_loss_samples"] == LM_SAMPLES
    torch.testing.assert_close(found["layer_lm_loss"], expected["layer_lm_loss"], rtol=1e-5, atol=0)


def test_blocks_as_long_as_the_model_are_refused(ranks: WorkerPool, checkpoint, ids) -> None:
    config = ScoreConfig(axes=["layer"], layer_criteria=["block_angular"], block_sizes=[LAYERS])
    with pytest.raises(RuntimeError, match=r"scores\.block_sizes holds \[4\].*use at most 3"):
        ranks.run(1, score, LLAMA, checkpoint, ids, ParallelConfig(), config, 1, 4)


@pytest.fixture(scope="module")
def hybrid(ids, tmp_path_factory) -> tuple[str, dict[str, torch.Tensor]]:
    """A hybrid, and what transformers says of it."""
    home = tmp_path_factory.mktemp("hybrid")
    write_weights(home / "ours", NEMOTRON_H, seed=3)
    (home / "hf").mkdir()
    family = family_of(NEMOTRON_H)
    store = to_hf(family, NEMOTRON_H, read_torch_dist(home / "ours", family, NEMOTRON_H))
    write_hf(home / "hf", store, family.to_hf(NEMOTRON_H), "1GB")
    model = AutoModelForCausalLM.from_pretrained(home / "hf", dtype=torch.float32).eval()
    return str(home / "ours"), scores_of(model, ids, NEMOTRON_H.num_layers)


@pytest.mark.parametrize("layout", ["1", "TP2 SP", "PP2 VPP2", "CP2", "TP2 SP PP2"])
def test_layers_of_every_kind(ranks: WorkerPool, hybrid, ids, layout) -> None:
    """Layers of Mamba return hidden states alone; the others return a context beside them."""
    folder, expected = hybrid
    parallel = ParallelConfig(**LAYOUTS[layout])
    args = (NEMOTRON_H, folder, ids, parallel, SCORES, 1, 4)
    found = ranks.run(parallel.world_size(), score, *args)[0]
    assert found.keys() == {*expected, "layer"}
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-5, atol=0, msg=partial("{}: {}".format, name)
        )
