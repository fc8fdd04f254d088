"""``minitron prune`` on a tiny imported model: the result, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_minitron.checkpoint.artifact import open_result, output_folder
from nemo_minitron.checkpoint.hf import to_hf
from nemo_minitron.checkpoint.torch_dist import read_torch_dist
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.stages import (
    ImportanceConfig,
    ImportConfig,
    PruneConfig,
    PruningConfig,
    TargetConfig,
)
from nemo_minitron.config.training import DataConfig
from nemo_minitron.families.llama import LLAMA as FAMILY
from nemo_minitron.pruning.plan import Plan
from nemo_minitron.pruning.scores import Scores, model_meta
from nemo_minitron.stages import import_, prune
from tests.helpers.tiny import LLAMA, read_weights


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """``model/``: an import result; ``scores/``: random scores of it; ``hf/``: its source."""
    home = tmp_path_factory.mktemp("prune")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**FAMILY.to_hf(LLAMA))).save_pretrained(home / "hf")
    import_.run(ImportConfig(source=str(home / "hf"), output_dir=str(home / "model")))
    write_scores(home / "scores", home / "model", ModelConfig.load(home / "model" / "checkpoint"))
    return home


def write_scores(
    folder: Path, model: Path, config: ModelConfig, without: tuple[str, ...] = ()
) -> None:
    scores = Scores(
        hidden=torch.rand(config.hidden_size),
        ffn=torch.rand(config.num_layers, config.ffn_hidden_size),
        head=torch.rand(config.num_layers, config.num_attention_heads),
        layer=torch.rand(config.num_layers),
        meta={"model": model_meta(config)},
    )
    cfg = ImportanceConfig(
        checkpoint=str(model), data=DataConfig(path=str(model)), output_dir=str(folder)
    )
    with output_folder(cfg, "importance", {"checkpoint": model}) as work:
        for axis in without:
            del scores[axis]
        scores.save(work)


def prune_config(home: Path, out: Path, scores: str | None = "scores", **pruning) -> PruneConfig:
    drop = pruning.pop("drop_layers", None)
    return PruneConfig(
        checkpoint=str(home / "model"),
        importance=None if scores is None else str(home / scores),
        output_dir=str(out),
        pruning=PruningConfig(target=TargetConfig(**pruning), drop_layers=drop),
    )


def test_width_and_depth_in_one_plan(home: Path, tmp_path: Path) -> None:
    cfg = prune_config(
        home,
        tmp_path / "out",
        num_layers=3,
        hidden_size=32,
        ffn_hidden_size=40,
        num_attention_heads=4,
        num_query_groups=2,
    )
    prune.check(cfg)
    prune.run(cfg)
    result = tmp_path / "out"
    open_result(result)
    small = ModelConfig.load(result / "checkpoint")
    plan = Plan.load(result)
    assert (small.num_layers, small.hidden_size, small.ffn_hidden_size) == (3, 32, 40)
    assert (small.num_attention_heads, small.num_query_groups, small.kv_channels) == (4, 2, 12)
    assert small.kept_layers == plan.layers
    metrics = json.loads((result / "metrics.json").read_text())
    assert metrics["sizes_before"]["hidden_size"] == LLAMA.hidden_size
    found = to_hf(FAMILY, small, read_torch_dist(result / "checkpoint", FAMILY, small))
    assert metrics["parameters"] == sum(t.read().numel() for t in found.values())

    # One weight by hand, through the whole road import -> prune -> export.
    hf = LlamaForCausalLM.from_pretrained(home / "hf").state_dict()
    rows = [head * 12 + i for head in plan["head"][1] for i in range(12)]
    query = hf[f"model.layers.{plan.layers[1]}.self_attn.q_proj.weight"][rows][:, plan["hidden"]]
    assert torch.equal(found["model.layers.1.self_attn.q_proj.weight"].read(), query)


def test_drop_layers_needs_no_importance(home: Path, tmp_path: Path) -> None:
    cfg = prune_config(home, tmp_path / "out", scores=None, drop_layers=[2])
    prune.check(cfg)
    prune.run(cfg)
    small = ModelConfig.load(tmp_path / "out" / "checkpoint")
    assert (small.num_layers, small.kept_layers) == (3, [0, 2, 3])


@pytest.mark.parametrize("iterations", [1, 3])
def test_a_target_that_the_model_has_cuts_nothing(home, tmp_path: Path, iterations: int) -> None:
    """However many rounds lead there; nothing is to be scored, so data are refused."""
    cfg = prune_config(home, tmp_path / "out", scores=None, hidden_size=LLAMA.hidden_size)
    cfg.pruning.iterations = iterations
    prune.check(cfg)
    prune.run(cfg)
    before, after = read_weights(home / "model"), read_weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    cfg.data.path, cfg.output_dir = "text", str(tmp_path / "other")
    with pytest.raises(ValueError, match=r"data\.path=text is not needed: nothing is scored"):
        prune.check(cfg)


def test_scores_serve_any_target_without_a_forward_pass(home, tmp_path, monkeypatch) -> None:
    """One importance result, several targets: nothing but files is read."""
    monkeypatch.setattr("torch.nn.Module.__call__", None)
    targets: dict[str, dict[str, Any]] = {"a": {"hidden_size": 20}, "b": {"num_layers": 2}}
    for name, target in targets.items():
        cfg = prune_config(home, tmp_path / name, **target)
        prune.check(cfg)
        prune.run(cfg)
        small = ModelConfig.load(tmp_path / name / "checkpoint")
        assert all(getattr(small, key) == size for key, size in target.items())


def test_same_scores_give_the_same_files(home: Path, tmp_path: Path) -> None:
    manifests = []
    for name in ("a", "b"):
        cfg = prune_config(home, tmp_path / name, hidden_size=20)
        prune.run(cfg)
        manifests.append(open_result(tmp_path / name).id)
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize(
    ("scores", "pruning", "message"),
    [
        ("scores", {}, "nothing to prune"),
        ("scores", {"ffn_hidden_size": 97}, r"ffn_hidden_size=97 must be between 1 and 96"),
        (None, {"hidden_size": 8}, r"hidden_size=8 needs importance scores"),
        ("no-hidden", {"hidden_size": 8}, r"needs 'hidden' scores, .*scores\.axes"),
        ("other-model", {"ffn_hidden_size": 8}, r"different model: num_layers=2 \(checkpoint: 4\)"),
        ("scores", {"num_attention_heads": 6}, r"multiple of num_query_groups=4; .*=4 or 8"),
        ("scores", {"drop_layers": [9]}, "out of range"),
        ("scores", {"drop_layers": [1, 1]}, "more than once"),
        ("scores", {"drop_layers": [1, 2, 3, 4]}, "drops all 4 layers"),
        ("scores", {"drop_layers": [1], "num_layers": 2}, "set only one of them"),
        ("model", {"hidden_size": 8}, r"importance=.*without scores\.json"),
        ("hf", {"hidden_size": 8}, r"importance=.*manifest\.json is missing"),
    ],
)
def test_bad_input_is_refused(home: Path, tmp_path: Path, scores, pruning, message) -> None:
    if scores == "no-hidden" and not (home / scores).exists():
        config = ModelConfig.load(home / "model" / "checkpoint")
        write_scores(home / scores, home / "model", config, without=("hidden",))
    if scores == "other-model" and not (home / scores).exists():
        config = ModelConfig.load(home / "model" / "checkpoint")
        config.num_layers = 2
        write_scores(home / scores, home / "model", config)
    cfg = prune_config(home, tmp_path / "out", scores, **pruning)
    with pytest.raises(ValueError, match=message):
        prune.check(cfg)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": {"path": "text"}}, r"data\.path=text is not needed: importance=.*leave data"),
        ({"data": {"seq_length": 8}}, r"data\.\* is for scoring, but nothing is scored here"),
        ({"parallel": {"tensor_model_parallel_size": 2}}, r"parallel\.\* is for scoring"),
        ({"scores": {"seq_aggregation": "l2"}}, r"scores\.\* is for scoring"),
        ({"iterations": 2}, r"pruning\.iterations=2 scores the model again .* set data\.path"),
        ({"iterations": 2, "data": {"path": "no"}}, r"data\.path=no does not exist"),
        (
            {"iterations": 2, "data": {"path": "no"}, "parallel": {"context_parallel_size": 3}},
            r"data\.seq_length=512 must be a multiple of 6",
        ),
    ],
)
def test_keys_of_scoring_are_refused(home: Path, tmp_path: Path, values, message) -> None:
    cfg = prune_config(home, tmp_path / "out", hidden_size=20)
    cfg.pruning.iterations = values.pop("iterations", 1)
    for section, keys in values.items():
        for key, value in keys.items():
            setattr(getattr(cfg, section), key, value)
    with pytest.raises(ValueError, match=message):
        prune.check(cfg)


def test_scores_of_other_weights_are_used_with_a_warning(home, tmp_path, caplog) -> None:
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**FAMILY.to_hf(LLAMA))).save_pretrained(tmp_path / "hf")
    import_.run(ImportConfig(source=str(tmp_path / "hf"), output_dir=str(tmp_path / "model")))
    config = ModelConfig.load(tmp_path / "model" / "checkpoint")
    write_scores(tmp_path / "scores", tmp_path / "model", config)
    cfg = prune_config(home, tmp_path / "out", hidden_size=8)
    prune.check(cfg)
    assert "other weights" not in caplog.text
    cfg.importance = str(tmp_path / "scores")
    prune.check(cfg)
    assert "made from other weights" in caplog.text
