"""Mixture of experts: Mixtral in and out, and the same at every layout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from nemo_minitron.checkpoint.torch_dist import read_torch_dist
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import (
    ExportConfig,
    ImportanceConfig,
    ImportConfig,
    PruneConfig,
    PruningConfig,
    ScoreConfig,
    TargetConfig,
)
from nemo_minitron.config.training import DataConfig
from nemo_minitron.families.registry import family_of
from nemo_minitron.stages import export, import_, prune
from tests.cases.checkpoint import load_and_save
from tests.cases.importance import run_stage, score
from tests.cases.logits import megatron_logits
from tests.helpers.pool import WorkerPool
from tests.helpers.tiny import token_batch

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral as a Hugging Face folder and imported, with ids and logits."""
    home = tmp_path_factory.mktemp("moe")
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=101,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        max_position_embeddings=128,
    )
    model = MixtralForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.15)
    model.save_pretrained(home / "hf")
    ids = torch.randint(0, 101, (2, 24))
    with torch.no_grad():
        torch.save((ids, model(ids).logits), home / "logits.pt")
    cfg = ImportConfig(source=str(home / "hf"), output_dir=str(home / "model"))
    import_.check(cfg)
    import_.run(cfg)
    return home


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_equal_transformers(ranks: WorkerPool, home: Path, name: str) -> None:
    ids, want = torch.load(home / "logits.pt")
    size, keys = LAYOUTS[name]
    for got in ranks.run(size, megatron_logits, str(home / "model"), ParallelConfig(**keys), ids):
        assert (got - want).abs().max() < 1e-4


def test_export_gives_the_very_tensors_back(home: Path) -> None:
    out = home / "out"
    export.run(ExportConfig(checkpoint=str(home / "model"), output_dir=str(out)))
    before = AutoModelForCausalLM.from_pretrained(home / "hf").state_dict()
    after = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", ["ep2", "tp2_sp"])
def test_megatron_reads_and_writes_the_same_weights(
    ranks: WorkerPool, home: Path, tmp_path: Path, name: str
) -> None:
    """What Megatron's own writer stores, experts included, is what we store."""
    size, keys = LAYOUTS[name]
    folder = home / "model" / "checkpoint"
    config = ModelConfig.load(folder)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    local = ranks.run(size, load_and_save, config, ParallelConfig(**keys), str(folder), str(theirs))
    ours = read_torch_dist(folder, family_of(config), config)
    back = read_torch_dist(theirs, family_of(config), config)
    assert ours.keys() == back.keys()
    assert all(torch.equal(ours[key].read(), back[key].read()) for key in ours)
    expert = "decoder.layers.1.mlp.experts.local_experts.{}.linear_fc2.weight"
    for rank, parameters in enumerate(local):
        if name == "ep2":  # two experts each
            whole = ours[expert.format(2 * rank + 1)].read()
        else:
            whole = ours[expert.format(1)].read().chunk(2, dim=1)[rank]
        assert torch.equal(parameters[expert.format(1)], whole)


SAMPLES, LENGTH = 5, 16  # no multiple of any micro-batch: fillers are among the tokens


def score_layout(
    ranks: WorkerPool, home: Path, size: int, keys: dict, micro: int = 1, **scores
) -> list[dict[str, torch.Tensor]]:
    folder = home / "model" / "checkpoint"
    ids = torch.load(home / "calibration.pt")
    return ranks.run(
        size,
        score,
        ModelConfig.load(folder),
        str(folder),
        ids,
        ParallelConfig(**keys),
        ScoreConfig(**scores),
        micro,
        4,
    )


@pytest.fixture(scope="module")
def alone(ranks: WorkerPool, home: Path) -> dict[str, torch.Tensor]:
    """Scores on one rank."""
    torch.save(token_batch(SAMPLES, LENGTH - 1, 101, seed=3), home / "calibration.pt")
    return score_layout(ranks, home, 1, {})[0]


def reference(home: Path) -> dict[str, torch.Tensor]:
    """Scores of experts from transformers' own modules, token by token."""
    model = AutoModelForCausalLM.from_pretrained(home / "hf").eval()
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(torch.load(home / "calibration.pt"))
        out = {"expert": torch.zeros(2, 4), "expert_ffn": torch.zeros(2, 4, 40)}
        for index, (layer, x) in enumerate(zip(model.model.layers, seen, strict=True)):
            _, weights, picked = layer.mlp.gate(x)
            for expert in range(4):
                token, place = torch.where(picked == expert)
                gate, up = (x[token] @ layer.mlp.experts.gate_up_proj[expert].T).chunk(2, dim=-1)
                inner = torch.nn.functional.silu(gate) * up * weights[token, place, None]
                outer = inner @ layer.mlp.experts.down_proj[expert].T
                out["expert"][index, expert] = outer.norm(dim=-1).mean()
                out["expert_ffn"][index, expert] = inner.abs().mean(dim=0)
    return out


def test_expert_scores_are_those_of_transformers(
    home: Path, alone: dict[str, torch.Tensor]
) -> None:
    assert list(alone) == ["hidden", "head", "expert", "expert_ffn", "layer"]
    for axis, want in reference(home).items():
        torch.testing.assert_close(alone[axis], want, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("size", "keys", "micro"),
    [
        (1, {}, 2),
        (2, {"expert_model_parallel_size": 2}, 1),
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, 2),
        (
            4,
            {
                "tensor_model_parallel_size": 2,
                "sequence_parallel": True,
                "expert_model_parallel_size": 2,
            },
            2,
        ),
        (4, {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}, 2),
        (2, {"context_parallel_size": 2, "expert_model_parallel_size": 2}, 1),
        (4, {"data_parallel_size": 4, "expert_model_parallel_size": 2}, 1),
    ],
    ids=["mbs2", "ep2", "tp2_sp", "tp2_sp_ep2", "pp2_ep2", "cp2_ep2", "dp4_ep2"],
)
def test_scores_do_not_depend_on_the_layout(
    ranks: WorkerPool, home: Path, alone: dict[str, torch.Tensor], size: int, keys: dict, micro: int
) -> None:
    for found in score_layout(ranks, home, size, keys, micro):
        assert found.keys() == alone.keys()
        for axis, want in alone.items():
            torch.testing.assert_close(found[axis], want, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("seq", ["l2", "var"])
def test_other_aggregations(ranks: WorkerPool, home: Path, alone, seq: str) -> None:
    keys = {"expert_model_parallel_size": 2}
    scores: dict[str, Any] = {"seq_aggregation": seq, "axes": ["expert_ffn"]}
    (one,) = score_layout(ranks, home, 1, {}, **scores)
    for found in score_layout(ranks, home, 2, keys, 2, **scores):
        torch.testing.assert_close(found["expert_ffn"], one["expert_ffn"], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "target",
    [
        {"num_moe_experts": 2, "moe_ffn_hidden_size": 24},
        {
            "hidden_size": 36,
            "num_attention_heads": 2,
            "num_layers": 1,
            "num_moe_experts": 2,
            "moe_ffn_hidden_size": 16,
        },
    ],
    ids=["experts", "everything"],
)
def test_scored_pruned_and_exported(
    ranks: WorkerPool, home: Path, tmp_path: Path, target: dict
) -> None:
    """The stages from end to end; Megatron at every layout runs what transformers loads."""
    layout = ParallelConfig(expert_model_parallel_size=2)
    np.save(tmp_path / "ids.npy", token_batch(8, LENGTH - 1, 101).numpy())
    scoring = ImportanceConfig(
        checkpoint=str(home / "model"),
        data=DataConfig(path=str(tmp_path / "ids.npy"), seq_length=LENGTH, num_samples=8),
        parallel=layout,
        output_dir=str(tmp_path / "scores"),
    )
    ranks.run(2, run_stage, scoring)
    pruning = PruneConfig(
        checkpoint=str(home / "model"),
        importance=str(tmp_path / "scores"),
        output_dir=str(tmp_path / "pruned"),
        pruning=PruningConfig(target=TargetConfig(**target)),
    )
    prune.check(pruning)
    prune.run(pruning)
    sizes = ModelConfig.load(tmp_path / "pruned" / "checkpoint")
    assert {name: getattr(sizes, name) for name in target} == target
    out = tmp_path / "out"
    export.run(ExportConfig(checkpoint=str(tmp_path / "pruned"), output_dir=str(out)))
    ids, _ = torch.load(home / "logits.pt")
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(out)(ids).logits
    for size, keys in LAYOUTS.values():
        parallel = ParallelConfig(**keys)
        for got in ranks.run(size, megatron_logits, str(tmp_path / "pruned"), parallel, ids):
            assert (got - want).abs().max() < 1e-4
