"""A calibration that was cut off and goes on gives the scores of one that was not, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nemo_minitron.checkpoint.artifact import output_folder
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import ImportanceConfig, ScoreConfig
from nemo_minitron.config.training import DataConfig
from nemo_minitron.pruning.scores import Scores
from nemo_minitron.stages import importance
from tests.cases.resume import score
from tests.helpers.damage import flip_bit
from tests.helpers.pool import WorkerPool
from tests.helpers.tiny import LLAMA, token_batch, write_npy, write_result, write_weights

SAMPLES, LENGTH = 7, 16
SCORES = ScoreConfig(
    layer_criteria=["block_influence", "lm_loss", "block_angular", "block_lm_loss"],
    block_sizes=[2],
    lm_loss_samples=3,
)
# One whole pass, four without a layer and three without a block, of each of three samples.
PASSES = SAMPLES + 3 * (1 + 4 + 3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("resume") / "checkpoint"
    write_weights(folder, LLAMA, 5)
    return str(folder)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return token_batch(SAMPLES, LENGTH, LLAMA.vocab_size, 2)[:, :LENGTH].contiguous()


@pytest.mark.parametrize(
    ("layout", "cuts"),
    [
        ({}, (3, 7, 9, PASSES)),
        ({"data_parallel_size": 2}, (5, 23)),
        ({"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, (3, 25)),
    ],
)
def test_cut_off_anywhere(ranks: WorkerPool, checkpoint, ids, tmp_path, layout, cuts) -> None:
    parallel = ParallelConfig(**layout)
    world = parallel.world_size()

    def run(cut: int | None, every: int = 1) -> list:
        state = str(tmp_path / "state")
        args = (LLAMA, checkpoint, ids, parallel, SCORES, state, cut, every)
        return ranks.run(world, score, *args)

    undisturbed, resumed = run(None, every=0)[0]
    assert resumed == 0
    for cut in cuts:
        assert run(cut) == [None] * world
        for found, resumed in run(None):
            assert 0 < resumed <= PASSES
            assert resumed >= cut
            for name, tensor in undisturbed.items():
                assert torch.equal(found[name], tensor), (cut, name)
        assert not (tmp_path / "state").exists()


def test_saved_now_and_then(ranks: WorkerPool, checkpoint, ids, tmp_path) -> None:
    state = tmp_path / "state"
    args = (LLAMA, checkpoint, ids, ParallelConfig(), SCORES, str(state))
    ranks.run(1, score, *args, 6, 3)
    latest = json.loads((state / "latest.json").read_text())
    assert latest["samples"] == 4  # after the second global batch of two, not after the third
    assert [path.name for path in state.iterdir() if path.is_dir()] == [str(latest["number"])]


def test_a_flipped_bit_in_the_state(ranks: WorkerPool, checkpoint, ids, tmp_path) -> None:
    """On one rank of two, and in the file that says how far it was."""
    state, two = tmp_path / "state", ParallelConfig(data_parallel_size=2)
    args = (LLAMA, checkpoint, ids, two, SCORES, str(state))
    assert ranks.run(2, score, *args, 6, 1) == [None, None]
    number = json.loads((state / "latest.json").read_text())["number"]
    for damaged in (state / str(number) / "rank1.pt", state / "latest.json"):
        flip_bit(damaged)
        with pytest.raises(RuntimeError) as raised:
            ranks.run(2, score, *args, None, 1)
        said = str(raised.value).split("--- rank")[1:]
        assert [f"{damaged.name} is damaged" in words for words in said] == [True, True]
        flip_bit(damaged)
    latest = json.loads((state / "latest.json").read_text())
    earlier = {key: latest[key] for key in ("number", "samples", "layout")}
    (state / "latest.json").write_text(json.dumps(earlier))  # as an earlier version leaves it
    assert all(resumed > 0 for _, resumed in ranks.run(2, score, *args, None, 1))


def test_another_layout_starts_over(ranks: WorkerPool, checkpoint, ids, tmp_path) -> None:
    state = str(tmp_path / "state")
    one, two = ParallelConfig(), ParallelConfig(tensor_model_parallel_size=2)
    assert ranks.run(1, score, LLAMA, checkpoint, ids, one, SCORES, state, 5, 1) == [None]
    found = ranks.run(2, score, LLAMA, checkpoint, ids, two, SCORES, state, None, 1)
    assert [resumed for _, resumed in found] == [0, 0]


def stage(folder: Path, name: str, **parallel) -> ImportanceConfig:
    return ImportanceConfig(
        checkpoint=str(folder / "model"),
        output_dir=str(folder / name),
        data=DataConfig(
            path=str(folder / "data.npy"), seq_length=LENGTH, num_samples=80, global_batch_size=2
        ),
        parallel=ParallelConfig(**parallel),
        save_every_n_samples=2,
    )


def test_unfinished_work_of_another_layout_is_kept_for_the_stage(tmp_path) -> None:
    """The stage then starts over by itself; other keys are still refused."""
    write_result(tmp_path / "model", LLAMA, 5)
    write_npy(tmp_path / "data.npy", 80, LENGTH, LLAMA.vocab_size)

    def enter(cfg: ImportanceConfig) -> None:
        with output_folder(cfg, "importance", resumable=True) as work:
            (work / "kept").touch()
            raise KeyError

    for parallel in ({}, {"tensor_model_parallel_size": 2}):
        with pytest.raises(KeyError):
            enter(stage(tmp_path, "out", **parallel))
    other = stage(tmp_path, "out")
    other.scores = ScoreConfig(axes=["ffn"])
    with pytest.raises(ValueError, match=r"unfinished work of another config \(scores\.axes"):
        enter(other)


def test_killed_and_started_again(ranks: WorkerPool, tmp_path) -> None:
    write_result(tmp_path / "model", LLAMA, 5)
    write_npy(tmp_path / "data.npy", 80, LENGTH, LLAMA.vocab_size)
    ranks.run(1, importance.run, stage(tmp_path, "whole"))
    command = [
        *(sys.executable, "-m", "nemo_minitron", "importance"),
        f"checkpoint={tmp_path}/model",
        f"output_dir={tmp_path}/killed",
        f"data.path={tmp_path}/data.npy",
        f"data.seq_length={LENGTH}",
        "data.num_samples=80",
        "data.global_batch_size=2",
        "save_every_n_samples=2",
    ]
    state = tmp_path / "killed.partial" / "state"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not (state / "latest.json").exists():
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(timeout=60) == -9
    assert json.loads((state / "latest.json").read_text())["samples"] < 80
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "scoring goes on after" in done.stderr
    found, expected = Scores.load(tmp_path / "killed"), Scores.load(tmp_path / "whole")
    assert found.meta == expected.meta
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert not (tmp_path / "killed" / "state").exists()
