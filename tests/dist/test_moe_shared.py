"""Shared experts: Qwen2-MoE in and out, its scores, and the same at every layout."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

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
from tests.cases.live_truth import layout
from tests.cases.logits import megatron_logits
from tests.helpers.pool import WorkerPool
from tests.helpers.tiny import token_batch, write_npy

SAMPLES, LENGTH = 5, 16  # no multiple of any micro-batch: fillers are among the tokens
SHARED = "shared_expert_ffn"
LAYOUTS = {"one": layout(), "ep2": layout(dp=2, ep=2), "tp2_sp": layout(tp=2, sp=True)}


def write_hf(folder: Path, **changes) -> Qwen2MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=101,
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=40,
        shared_expert_intermediate_size=56,
        max_position_embeddings=128,
        **changes,
    )
    model = Qwen2MoeForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.15)
    model.save_pretrained(folder)
    return model


def imported(home: Path, name: str) -> Path:
    cfg = ImportConfig(source=str(home / f"{name}_hf"), output_dir=str(home / name))
    import_.check(cfg)
    import_.run(cfg)
    return home / name


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2-MoE as a Hugging Face folder and imported, with ids and logits."""
    home = tmp_path_factory.mktemp("shared")
    model = write_hf(home / "model_hf")
    ids = torch.randint(0, 101, (2, 24))
    with torch.no_grad():
        torch.save((ids, model(ids).logits), home / "logits.pt")
    torch.save(token_batch(SAMPLES, LENGTH - 1, 101, seed=3), home / "calibration.pt")
    imported(home, "model")
    return home


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_equal_transformers(ranks: WorkerPool, home: Path, name: str) -> None:
    ids, want = torch.load(home / "logits.pt")
    size = LAYOUTS[name].world_size()
    for got in ranks.run(size, megatron_logits, str(home / "model"), LAYOUTS[name], ids):
        assert (got - want).abs().max() < 2e-4


def test_weights_that_sum_to_one(ranks: WorkerPool, tmp_path: Path) -> None:
    """The other router, and no biases."""
    model = write_hf(tmp_path / "normed_hf", norm_topk_prob=True, qkv_bias=False)
    ids = torch.randint(0, 101, (2, 24))
    (got,) = ranks.run(1, megatron_logits, str(imported(tmp_path, "normed")), layout(), ids)
    with torch.no_grad():
        assert (got - model(ids).logits).abs().max() < 2e-4


def test_export_gives_the_very_tensors_back(home: Path) -> None:
    out = home / "out"
    export.run(ExportConfig(checkpoint=str(home / "model"), output_dir=str(out)))
    before = AutoModelForCausalLM.from_pretrained(home / "model_hf")
    after = AutoModelForCausalLM.from_pretrained(out)
    assert type(after) is Qwen2MoeForCausalLM
    assert after.config.intermediate_size == 72
    before, after = before.state_dict(), after.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_megatron_reads_and_writes_the_same_weights(
    ranks: WorkerPool, home: Path, tmp_path: Path
) -> None:
    folder = home / "model" / "checkpoint"
    config = ModelConfig.load(folder)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    local = ranks.run(2, load_and_save, config, LAYOUTS["tp2_sp"], str(folder), str(theirs))
    ours = read_torch_dist(folder, family_of(config), config)
    back = read_torch_dist(theirs, family_of(config), config)
    assert ours.keys() == back.keys()
    assert all(torch.equal(ours[key].read(), back[key].read()) for key in ours)
    prefix = "decoder.layers.1.mlp.shared_experts."
    for rank, parameters in enumerate(local):
        whole = ours[prefix + "linear_fc2.weight"].read()
        assert torch.equal(parameters[prefix + "linear_fc2.weight"], whole.chunk(2, dim=1)[rank])
        gate = prefix + "gate_weight"
        assert torch.equal(parameters[gate], ours[gate].read())


def score_layout(
    ranks: WorkerPool, home: Path, parallel: ParallelConfig, micro: int = 1, **scores
) -> list[dict[str, torch.Tensor]]:
    folder = home / "model" / "checkpoint"
    arguments = (ModelConfig.load(folder), str(folder), torch.load(home / "calibration.pt"))
    size = parallel.world_size()
    return ranks.run(size, score, *arguments, parallel, ScoreConfig(**scores), micro, 4)


@pytest.fixture(scope="module")
def alone(ranks: WorkerPool, home: Path) -> dict[str, torch.Tensor]:
    """Scores on one rank."""
    return score_layout(ranks, home, layout())[0]


def test_scores_are_those_of_transformers(home: Path, alone: dict[str, torch.Tensor]) -> None:
    """(batch=l2, seq=mean) of what enters the shared expert's last matrix."""
    assert list(alone) == ["hidden", "head", "expert", "expert_ffn", SHARED, "layer"]
    model = AutoModelForCausalLM.from_pretrained(home / "model_hf").eval()
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.shared_expert.down_proj.register_forward_pre_hook(
            lambda _, args: seen.append(args[0].unflatten(0, (SAMPLES, LENGTH)))
        )
    with torch.no_grad():
        model(torch.load(home / "calibration.pt"))
    want = torch.stack([x.abs().mean(dim=1).norm(dim=0) for x in seen])
    torch.testing.assert_close(alone[SHARED], want, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("parallel", "micro"),
    [
        (layout(), 2),
        (layout(dp=2, ep=2), 1),
        (layout(tp=2, sp=True), 2),
        (layout(pp=2), 1),
        (layout(cp=2, ep=2), 1),
        (layout(tp=2, sp=True, dp=2, ep=2), 1),
    ],
    ids=["mbs2", "ep2", "tp2_sp", "pp2", "cp2_ep2", "tp2_sp_ep2"],
)
def test_scores_do_not_depend_on_the_layout(
    ranks: WorkerPool,
    home: Path,
    alone: dict[str, torch.Tensor],
    parallel: ParallelConfig,
    micro: int,
) -> None:
    for found in score_layout(ranks, home, parallel, micro):
        assert found.keys() == alone.keys()
        for axis, want in alone.items():
            torch.testing.assert_close(found[axis], want, rtol=1e-5, atol=1e-9)


def test_scored_pruned_and_exported(ranks: WorkerPool, home: Path, tmp_path: Path) -> None:
    """The stages from end to end; Megatron runs what transformers loads."""
    target = {
        "hidden_size": 36,
        "num_attention_heads": 2,
        "num_layers": 1,
        "num_moe_experts": 2,
        "moe_ffn_hidden_size": 16,
        "moe_shared_expert_intermediate_size": 24,
    }
    write_npy(tmp_path / "ids.npy", 8, LENGTH, 101)
    scoring = ImportanceConfig(
        checkpoint=str(home / "model"),
        data=DataConfig(path=str(tmp_path / "ids.npy"), seq_length=LENGTH, num_samples=8),
        parallel=LAYOUTS["ep2"],
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
    parallel = LAYOUTS["tp2_sp"]
    for got in ranks.run(2, megatron_logits, str(tmp_path / "pruned"), parallel, ids):
        assert (got - want).abs().max() < 2e-4
