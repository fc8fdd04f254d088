"""Second moments against transformers with hooks of its own; at other layouts the same."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_minitron.checkpoint.artifact import open_result
from nemo_minitron.checkpoint.hf import to_hf
from nemo_minitron.checkpoint.lazy import from_tensor
from nemo_minitron.checkpoint.torch_dist import read_torch_dist, write_torch_dist
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import (
    ImportanceConfig,
    ImportConfig,
    PruneConfig,
    PruningConfig,
    ScoreConfig,
    TargetConfig,
)
from nemo_minitron.config.training import DataConfig
from nemo_minitron.families.llama import LLAMA as FAMILY
from nemo_minitron.pruning.compensate import column_map
from nemo_minitron.pruning.plan import Plan
from nemo_minitron.pruning.scores import MOMENTS, check_moments, moment_file
from nemo_minitron.stages import import_, prune
from tests.cases.importance import run_stage, score
from tests.helpers.pool import WorkerPool
from tests.helpers.tiny import LLAMA, random_weights, token_batch

SAMPLES, LENGTH = 7, 16
AXES = ["ffn", "head", "hidden"]
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank, micro-batches of 3": (1, {}),
    "TP 2": (2, {"tensor_model_parallel_size": 2}),
    "TP 2, SP": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP 2 x DP 2": (4, {"pipeline_model_parallel_size": 2}),
    "TP 2 x CP 2": (4, {"tensor_model_parallel_size": 2, "context_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return random_weights(LLAMA)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return token_batch(SAMPLES, LENGTH, LLAMA.vocab_size)[:, :LENGTH].contiguous()


@pytest.fixture(scope="module")
def expected(weights, ids) -> dict[str, torch.Tensor]:
    """File name -> matrix."""
    store = {name: from_tensor(tensor) for name, tensor in weights.items()}
    model = LlamaForCausalLM(LlamaConfig(**FAMILY.to_hf(LLAMA))).eval()
    model.load_state_dict({n: lazy.read() for n, lazy in to_hf(FAMILY, LLAMA, store).items()})
    found: dict[str, torch.Tensor] = {}

    def note(name: str, x: torch.Tensor) -> None:
        x = x.flatten(0, -2).double()
        found[f"{name}.safetensors"] = x.t() @ x / len(x)

    def on(module: torch.nn.Module, name: str, inputs: bool) -> None:
        if inputs:
            module.register_forward_pre_hook(lambda _, args: note(name, args[0]))
        else:
            module.register_forward_hook(lambda _, args, output: note(name, output))

    for index, layer in enumerate(model.model.layers):
        on(layer.mlp.down_proj, f"ffn.{index}", inputs=True)
        on(layer.self_attn.o_proj, f"head.{index}", inputs=True)
        on(layer.input_layernorm, f"hidden.{2 * index}", inputs=False)
        on(layer.post_attention_layernorm, f"hidden.{2 * index + 1}", inputs=False)
    on(model.model.norm, f"hidden.{2 * LLAMA.num_layers}", inputs=False)
    with torch.no_grad():
        model(ids)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_transformers(
    ranks: WorkerPool, weights, ids, expected, tmp_path: Path, layout: str
) -> None:
    count, degrees = LAYOUTS[layout]
    checkpoint, result = tmp_path / "checkpoint", tmp_path / "result"
    checkpoint.mkdir()
    result.mkdir()
    store = {name: from_tensor(tensor) for name, tensor in weights.items()}
    write_torch_dist(checkpoint, store, FAMILY, LLAMA, workers=1)
    scores = ScoreConfig(axes=["hidden"], moments=AXES)
    parallel = ParallelConfig(**degrees)
    args = (LLAMA, str(checkpoint), ids, parallel, scores, 3, 6, str(result))
    ranks.run(count, score, *args)
    found = {path.name: load_file(path)["moment"] for path in (result / MOMENTS).iterdir()}
    assert found.keys() == expected.keys()
    for name, matrix in expected.items():
        scale = matrix.diagonal().max().item()
        torch.testing.assert_close(
            found[name].double(),
            matrix,
            rtol=1e-5,
            atol=1e-6 * scale,
            msg=partial("{}: {}".format, name),
        )


def test_stages_together(ranks: WorkerPool, weights, ids, tmp_path: Path) -> None:
    """``importance`` at TP 2 writes what ``prune`` refits with."""
    model = LlamaForCausalLM(LlamaConfig(**FAMILY.to_hf(LLAMA)))
    store = {name: from_tensor(tensor) for name, tensor in weights.items()}
    model.load_state_dict({n: lazy.read() for n, lazy in to_hf(FAMILY, LLAMA, store).items()})
    model.save_pretrained(tmp_path / "hf")
    import_.run(ImportConfig(source=str(tmp_path / "hf"), output_dir=str(tmp_path / "model")))
    np.save(tmp_path / "ids.npy", ids.numpy())
    scored = ImportanceConfig(
        checkpoint=str(tmp_path / "model"),
        data=DataConfig(path=str(tmp_path / "ids.npy"), seq_length=LENGTH, num_samples=SAMPLES),
        parallel=ParallelConfig(tensor_model_parallel_size=2),
        scores=ScoreConfig(moments=["ffn"]),
        output_dir=str(tmp_path / "scores"),
    )
    ranks.run(2, run_stage, scored)
    open_result(tmp_path / "scores")
    pruned = PruneConfig(
        checkpoint=str(tmp_path / "model"),
        importance=str(tmp_path / "scores"),
        pruning=PruningConfig(
            target=TargetConfig(ffn_hidden_size=48), compensate=["ffn"], ridge=1e-2
        ),
        output_dir=str(tmp_path / "pruned"),
    )
    prune.check(pruned)
    prune.run(pruned)
    folder, plan = tmp_path / "pruned" / "checkpoint", Plan.load(tmp_path / "pruned")
    found = read_torch_dist(folder, FAMILY, ModelConfig.load(folder))
    for layer in range(LLAMA.num_layers):
        moment = load_file(moment_file(tmp_path / "scores", "ffn", layer))["moment"]
        name = f"decoder.layers.{layer}.mlp.linear_fc2.weight"
        columns = column_map(moment, torch.tensor(plan["ffn"][layer]), 1e-2)
        torch.testing.assert_close(found[name].read(), weights[name] @ columns)


@pytest.mark.parametrize(
    ("change", "axes", "message"),
    [
        ({"num_moe_experts": 4, "moe_ffn_hidden_size": 8}, ["ffn"], "layers .* have experts"),
        ({"normalization": "LayerNorm"}, ["hidden"], "only RMSNorms"),
        ({"hybrid_layer_pattern": "*-*-"}, ["ffn"], "not supported for hybrid models"),
    ],
)
def test_moments_that_compensate_nothing(change, axes, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_moments(replace(LLAMA, **change), axes)
