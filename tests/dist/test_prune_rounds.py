"""``minitron prune`` that scores by itself: once, in rounds, on several ranks, cut off."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.checkpoint.artifact import open_result
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import (
    ImportanceConfig,
    PruneConfig,
    PruningConfig,
    ScoreConfig,
    TargetConfig,
)
from nemo_minitron.config.training import DataConfig, OptionalDataConfig
from nemo_minitron.pruning.plan import Plan
from nemo_minitron.stages import importance, prune
from tests.cases.importance import run_prune
from tests.helpers.damage import flip_bit
from tests.helpers.pool import WorkerPool
from tests.helpers.tiny import LLAMA, read_weights, write_npy, write_result

CONFIG = replace(LLAMA, num_attention_heads=16)  # four query heads in each of four groups
TARGET = TargetConfig(num_layers=2, hidden_size=48, ffn_hidden_size=64, num_attention_heads=8)
DATA: dict[str, Any] = {"seq_length": 16, "num_samples": 5, "global_batch_size": 4}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("rounds")
    write_result(home / "model", CONFIG, 7)
    write_npy(home / "ids.npy", 5, 16, CONFIG.vocab_size)
    return home


def config(home: Path, out: Path, pruning: PruningConfig, **parallel) -> PruneConfig:
    return PruneConfig(
        checkpoint=str(home / "model"),
        output_dir=str(out),
        pruning=pruning,
        data=OptionalDataConfig(path=str(home / "ids.npy"), **DATA),
        parallel=ParallelConfig(**parallel),
    )


def by_hand(ranks: WorkerPool, home: Path, out: Path, targets: list[TargetConfig]) -> Path:
    """importance -> prune -> importance -> prune, each a stage of its own."""
    model = home / "model"
    for number, target in enumerate(targets):
        assert target["num_layers"] is not None
        dropped = ModelConfig.load(model / "checkpoint").num_layers - target["num_layers"]
        scores = ImportanceConfig(
            checkpoint=str(model),
            output_dir=str(out / f"scores{number}"),
            data=DataConfig(path=str(home / "ids.npy"), **DATA),
            scores=ScoreConfig(layer_criteria=["block_lm_loss"], block_sizes=[dropped]),
        )
        ranks.run(1, importance.run, scores)
        cfg = PruneConfig(
            checkpoint=str(model),
            importance=scores.output_dir,
            output_dir=str(out / f"model{number}"),
            pruning=PruningConfig(target=target, layer_criterion="block_lm_loss"),
        )
        prune.check(cfg)
        prune.run(cfg)
        model = out / f"model{number}"
    return model


def same(found: Path, expected: Path) -> None:
    one, other = (ModelConfig.load(path / "checkpoint") for path in (found, expected))
    assert one == other
    weights = read_weights(expected)
    assert read_weights(found).keys() == weights.keys()
    for name, tensor in read_weights(found).items():
        assert torch.equal(tensor, weights[name]), name


def test_rounds_equal_the_stages_one_by_one(ranks: WorkerPool, home: Path, tmp_path: Path) -> None:
    middle = TargetConfig(num_layers=3, hidden_size=56, ffn_hidden_size=80, num_attention_heads=12)
    pruning = PruningConfig(target=TARGET, iterations=2, layer_criterion="block_lm_loss")
    cfg = config(home, tmp_path / "rounds", pruning)
    ranks.run(1, run_prune, cfg)
    open_result(tmp_path / "rounds")
    same(tmp_path / "rounds", by_hand(ranks, home, tmp_path, [middle, TARGET]))
    metrics = json.loads((tmp_path / "rounds" / "metrics.json").read_text())
    assert [r["sizes"]["hidden_size"] for r in metrics["rounds"]] == [56, 48]
    names = sorted(
        p.relative_to(tmp_path / "rounds").as_posix()
        for p in (tmp_path / "rounds").rglob("rounds/*/*")
    )
    assert names == [
        f"rounds/{n}/{name}"
        for n in (1, 2)
        for name in ("plan.json", "scores.json", "scores.safetensors")
    ]
    # The plan of the result is in terms of the model it began with.
    plan = Plan.load(tmp_path / "rounds")
    weights = read_weights(home / "model")["embedding.word_embeddings.weight"]
    pruned = read_weights(tmp_path / "rounds")["embedding.word_embeddings.weight"]
    assert torch.equal(pruned, weights[:, plan["hidden"]])
    # Saved scores serve the first round.
    again = config(home, tmp_path / "reused", pruning)
    again.importance = str(tmp_path / "scores0")
    ranks.run(1, run_prune, again)
    same(tmp_path / "reused", tmp_path / "rounds")


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"pipeline_model_parallel_size": 2},
    ],
)
def test_rounds_do_not_depend_on_the_layout(
    ranks: WorkerPool, home: Path, tmp_path: Path, layout: dict
) -> None:
    pruning = PruningConfig(
        target=TargetConfig(TARGET, num_layers=None), iterations=2, merge_heads=True
    )
    ranks.run(1, run_prune, config(home, tmp_path / "one", pruning))
    ranks.run(2, run_prune, config(home, tmp_path / "two", pruning, **layout))
    same(tmp_path / "two", tmp_path / "one")
    assert Plan.load(tmp_path / "two") == Plan.load(tmp_path / "one")
    assert Plan.load(tmp_path / "one").merge


def test_one_round_without_saved_scores(ranks: WorkerPool, home: Path, tmp_path: Path) -> None:
    pruning = PruningConfig(target=TARGET, layer_criterion="block_lm_loss")
    ranks.run(1, run_prune, config(home, tmp_path / "here", pruning))
    same(tmp_path / "here", by_hand(ranks, home, tmp_path, [TARGET]))


def test_finished_rounds_are_not_scored_again(
    ranks: WorkerPool, home: Path, tmp_path: Path
) -> None:
    pruning = PruningConfig(target=TargetConfig(TARGET, num_layers=None), iterations=2)
    cfg = config(home, tmp_path / "whole", pruning)
    ranks.run(1, run_prune, cfg)
    # What a job leaves that is killed in its second round.
    cfg = config(home, tmp_path / "killed", pruning)
    assert ranks.run(1, run_prune, cfg, "round 2") == ["cut off"]
    scores = tmp_path / "killed.partial" / "rounds" / "1" / "scores.safetensors"
    flip_bit(scores)
    with pytest.raises(RuntimeError, match=f"{scores} is damaged"):
        ranks.run(1, run_prune, cfg)
    flip_bit(scores)
    shutil.copytree(home / "model" / "checkpoint", tmp_path / "killed.partial" / "checkpoint")
    ranks.run(1, run_prune, cfg)
    same(tmp_path / "killed", tmp_path / "whole")
    metrics = json.loads((tmp_path / "killed" / "metrics.json").read_text())
    assert ["forward_tokens" in cost for cost in metrics["rounds"]] == [False, True]
