"""``minitron benchmark``: what it counts, limits on memory, layouts, refusals."""

import json
from pathlib import Path

import pytest

from nemo_minitron.config.identity import input_paths
from nemo_minitron.config.stages import BenchmarkConfig
from nemo_minitron.reporting.speed import speed_rows
from tests.helpers.bad_input import build, done, line, run_line

FLOAT = 4
SIZES = {"prompt_length": 16, "new_tokens": 5, "rounds": 3}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    build(folder)
    return folder


def command(home: Path, out: Path, **keys: object) -> list[str]:
    return line("benchmark", home, out, **{**SIZES, **keys})


def models_of(out: Path) -> list[dict]:
    return json.loads((out / "metrics.json").read_text())["models"]


def cache_bytes(layers: int, groups: int, head: int, batch: int) -> int:
    return 2 * layers * groups * head * (16 + 5) * batch * FLOAT


def test_two_models_take_turns(ranks, home, tmp_path):
    both = f"[{home}/model,{home}/student]"
    limit = 0.002  # GB
    keys = {"checkpoint": both, "batch_size": 2, "memory_limit_gb": limit}
    [ending] = ranks.run(1, run_line, command(home, tmp_path / "out", **keys))
    done(ending)
    teacher, student = models_of(tmp_path / "out")
    assert (teacher["label"], student["label"]) == ("model", "student")
    assert teacher["parameters"] > student["parameters"]
    for model in (teacher, student):
        for name in ("equal", "largest"):
            found = model[name]
            held, cache = found["memory"]["weights"], found["memory"]["kv_cache"]
            assert held == model["parameters"] * FLOAT
            assert cache == cache_bytes(4, 4, 12, found["batch_size"])
            assert found["memory"]["peak"] is None  # measured on a GPU alone
            for key in ("prefill_tokens_per_second", "decode_tokens_per_second"):
                spread = found[key]
                assert 0 < spread["low"] <= spread["median"] <= spread["high"]
            step = found["token_seconds"]["median"]
            rate = found["decode_tokens_per_second"]["median"]
            assert rate == pytest.approx(found["batch_size"] / step)
        batch = model["largest"]["batch_size"]
        room = 0.95 * limit * 1e9 - held
        assert cache_bytes(4, 4, 12, batch) <= room < cache_bytes(4, 4, 12, batch + 1)
    assert teacher["equal"]["batch_size"] == student["equal"]["batch_size"] == 2
    assert student["largest"]["batch_size"] > teacher["largest"]["batch_size"]
    assert "largest" in ending.out
    assert [row[4] for row in speed_rows({"models": [teacher, student]})][::2] == ["1.00x", "1.00x"]
    inputs = json.loads((tmp_path / "out" / "manifest.json").read_text())["inputs"]
    assert set(inputs) == {"checkpoint.0", "checkpoint.1"}


@pytest.mark.parametrize("degree", ["tensor", "pipeline", "data"])
def test_layouts(ranks, home, tmp_path, degree):
    key = f"parallel.{degree}" + ("_parallel_size" if degree == "data" else "_model_parallel_size")
    for ending in ranks.run(2, run_line, command(home, tmp_path / "out", **{key: 2})):
        done(ending)
    [model] = models_of(tmp_path / "out")
    share = 1 if degree == "data" else 2
    assert model["equal"]["memory"]["kv_cache"] == cache_bytes(4, 4, 12, 1) // share
    assert "largest" not in model
    step, rate = (
        model["equal"][k]["median"] for k in ("token_seconds", "decode_tokens_per_second")
    )
    assert rate == pytest.approx((2 if degree == "data" else 1) / step)


def test_bf16_takes_half(ranks, home, tmp_path):
    keys = {"precision": "bf16-mixed", "max_batch_size": 3, "memory_limit_gb": 1}
    done(ranks.run(1, run_line, command(home, tmp_path / "out", **keys))[0])
    [model] = models_of(tmp_path / "out")
    assert model["equal"]["memory"]["weights"] == model["parameters"] * 2  # norms too
    assert model["largest"]["batch_size"] == 3


def test_every_checkpoint_is_an_input():
    assert input_paths(BenchmarkConfig(output_dir="o", checkpoint="a")) == {"checkpoint.0": "a"}
    both = BenchmarkConfig(output_dir="o", checkpoint=["a", "b"])
    assert input_paths(both) == {"checkpoint.0": "a", "checkpoint.1": "b"}


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"checkpoint": "[]"}, "checkpoint=[] must be a result folder or a list of some"),
        ({"checkpoint": "[{home}/model,{home}/model]"}, "names a model twice"),
        ({"checkpoint": "[{home}/model,{home}/hf]"}, "hf is not a complete result"),
        ({"new_tokens": 1}, "new_tokens=1 must be at least 2"),
        ({"rounds": 0}, "rounds=0 must be at least 1"),
        ({"prompt_length": 126}, "exceed the 128 positions of the model; lower prompt_length"),
        ({"max_batch_size": 1, "batch_size": 2}, "max_batch_size=1 must be at least batch_size=2"),
        ({"memory_limit_gb": 0}, "memory_limit_gb=0.0 must be above 0, or null"),
        ({"memory_limit_gb": 1e-4}, "memory_limit_gb=0.0001 is less than the "),
        (
            {"parallel.context_parallel_size": 2},
            "parallel.context_parallel_size=2: benchmark lets models write text token by token",
        ),
    ],
)
def test_keys_that_cannot_be(home, tmp_path, keys, says):
    ending = run_line(command(home, tmp_path / "out", **keys))
    assert ending.code == 2, ending.err
    assert len(ending.err.splitlines()) == 1
    assert says in ending.err


def test_no_room_for_one_sequence(ranks, home, tmp_path):
    weights = FLOAT * json.loads((home / "model" / "metrics.json").read_text())["parameters"]
    limit = (weights + cache_bytes(4, 4, 12, 1) // 2) / 0.95e9
    [ending] = ranks.run(1, run_line, command(home, tmp_path / "out", memory_limit_gb=limit))
    assert ending.code == 2
    assert "GB with one sequence of 21 tokens" in ending.err
