"""``minitron importance`` at one rank and at several: the files, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_minitron.checkpoint.artifact import open_result
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import ImportanceConfig, ImportConfig, ScoreConfig
from nemo_minitron.config.training import DataConfig
from nemo_minitron.families.llama import LLAMA as FAMILY
from nemo_minitron.pruning.scores import Scores, read_meta
from nemo_minitron.stages import import_, importance
from tests.cases.importance import run_stage
from tests.helpers.pool import WorkerPool
from tests.helpers.tiny import LLAMA, token_batch


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """``fp32/`` and ``bf16/``: import results of one model; ``ids.npy``."""
    home = tmp_path_factory.mktemp("importance")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**FAMILY.to_hf(LLAMA)))
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        # fp32 last, and from the rounded weights, so that both hold the same numbers.
        model = model.to(dtype)
        model.save_pretrained(home / f"hf-{name}")
        cfg = ImportConfig(source=str(home / f"hf-{name}"), output_dir=str(home / name))
        import_.run(cfg)
    np.save(home / "ids.npy", token_batch(5, 16, LLAMA.vocab_size)[:, :16].numpy())
    return home


def stage(home: Path, out: Path, checkpoint: str = "fp32", **parallel) -> ImportanceConfig:
    return ImportanceConfig(
        checkpoint=str(home / checkpoint),
        data=DataConfig(
            path=str(home / "ids.npy"), seq_length=16, num_samples=5, global_batch_size=4
        ),
        parallel=ParallelConfig(**parallel),
        output_dir=str(out),
    )


def assert_same(found: Path, expected: Path) -> None:
    a, b = Scores.load(found), Scores.load(expected)
    assert a.meta == b.meta
    assert a.keys() == b.keys()
    for axis, tensor in b.items():
        torch.testing.assert_close(a[axis], tensor, rtol=1e-5, atol=0)


def test_files_do_not_depend_on_the_layout(ranks: WorkerPool, home: Path, tmp_path: Path) -> None:
    ranks.run(1, run_stage, stage(home, tmp_path / "one"))
    open_result(tmp_path / "one")
    meta = read_meta(tmp_path / "one")
    assert meta["axes"] == ["hidden", "ffn", "head", "layer"]
    assert (meta["num_samples"], meta["num_tokens"]) == (5, 80)
    assert meta["aggregation"] == {"batch": "l2", "seq": "mean"}
    metrics = json.loads((tmp_path / "one" / "metrics.json").read_text())
    assert metrics["num_tokens"] == 80
    assert metrics["tokens_per_second"] > 0
    four = stage(
        home, tmp_path / "four", tensor_model_parallel_size=2, pipeline_model_parallel_size=2
    )
    ranks.run(4, run_stage, four)
    assert_same(tmp_path / "four", tmp_path / "one")


def test_bf16_checkpoints(ranks: WorkerPool, home: Path, tmp_path: Path) -> None:
    ranks.run(1, run_stage, stage(home, tmp_path / "fp32"))
    ranks.run(1, run_stage, stage(home, tmp_path / "bf16", "bf16"))
    assert_same(tmp_path / "bf16", tmp_path / "fp32")


def test_only_the_axes_asked_for(ranks: WorkerPool, home: Path, tmp_path: Path) -> None:
    cfg = replace(stage(home, tmp_path / "out"), scores=ScoreConfig(axes=["ffn"]))
    ranks.run(1, run_stage, cfg)
    assert list(Scores.load(tmp_path / "out")) == ["ffn"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": "hf-fp32"}, r"checkpoint=.* is not a complete result but a model"),
        ({"tensor_model_parallel_size": 3}, r"size=3 must divide num_query_groups=4"),
        (
            {"pipeline_model_parallel_size": 3},
            r"num_layers=4 cannot be split over parallel\.pipeline_model_parallel_size=3",
        ),
        ({"data.path": "nowhere"}, r"data\.path=nowhere does not exist"),
        ({"data.seq_length": 15}, r"data\.seq_length=15; set data\.seq_length=16"),
        ({"data.num_samples": 6}, r"data\.num_samples=6 is more than the 5 sequences"),
        ({"data.micro_batch_size": 3}, r"data\.global_batch_size=4 must be a multiple"),
        ({"context_parallel_size": 3}, r"data\.seq_length=16 must be a multiple of 6"),
        (
            {
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 2,
                "data.global_batch_size": 3,
            },
            r"global_batch_size=3 makes 3 micro-batches .* to a multiple of 2",
        ),
    ],
)
def test_bad_input_is_refused(home: Path, tmp_path: Path, change: dict, message: str) -> None:
    parallel = {k: v for k, v in change.items() if k.endswith("_parallel_size")}
    cfg = stage(home, tmp_path / "out", change.get("checkpoint", "fp32"), **parallel)
    for key, value in change.items():
        if key.startswith("data."):
            setattr(cfg.data, key.removeprefix("data."), value)
    with pytest.raises(ValueError, match=message):
        importance.check(cfg)


def test_changed_checkpoint_is_refused(home: Path, tmp_path: Path) -> None:
    cfg = stage(home, tmp_path / "out", "bf16")
    file = next((home / "bf16" / "checkpoint").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="was damaged or edited"):
        importance.check(cfg)
