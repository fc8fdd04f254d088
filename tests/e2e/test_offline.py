"""``teacher_logits`` and then ``distill teacher_logits=``: the curve of a teacher that is there."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.bad_input import Ending, done, run_line, write_pair
from tests.helpers.damage import flip_bit
from tests.helpers.history import without_speed
from tests.helpers.tiny import LLAMA, read_weights, write_result

STUDENT = replace(LLAMA, hidden_size=48, ffn_hidden_size=64, num_layers=2)
LENGTH, DOCUMENTS = 16, 40
TRAINER = {"trainer.max_steps": 3, "trainer.limit_val_batches": 2}
DATA = {"data.seq_length": LENGTH, "data.global_batch_size": 4, "data.split": "60/30/10"}
LOSS = {"distillation.loss": "top_k_tail", "distillation.top_k": 5}
STORED = {"checkpoint": "teacher", "top_k": 8, "shard_samples": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Student, teacher and a corpus in Megatron's form."""
    path = tmp_path_factory.mktemp("offline")
    write_result(path / "teacher", LLAMA, 1)
    write_result(path / "student", STUDENT, 2)
    lengths = [20 + n % 7 for n in range(DOCUMENTS)]
    draw = np.random.default_rng(0)
    for name in ("corpus", "other"):
        write_pair(path / name, lengths)
        ids = draw.integers(0, LLAMA.vocab_size, sum(lengths)).astype(np.uint16)
        ids.tofile(path / f"{name}.bin")
    return path


def _line(folder: Path, stage: str, out: str, **changes: Any) -> list[str]:
    keys = {**DATA, **TRAINER, "data.path": "corpus", "output_dir": out, **changes}
    paths = ("checkpoint", "student", "teacher", "teacher_logits", "data.path", "output_dir")
    keys = {key: folder / value if key in paths else value for key, value in keys.items()}
    return [stage, *(f"{key}={value}" for key, value in keys.items())]


def _distill(folder: Path, out: str, **changes: Any) -> list[str]:
    extra = {"optim.lr": 1e-2, "trainer.val_check_interval": 2}
    return _line(folder, "distill", out, student="student", **LOSS, **extra, **changes)


@pytest.fixture(scope="module")
def stored(ranks, folder) -> Path:
    """Result of ``teacher_logits``."""
    done(*ranks.run(1, run_line, _line(folder, "teacher_logits", "logits", **STORED)))
    return folder / "logits"


def _history(result: Path) -> list[dict[str, float]]:
    return without_speed(json.loads((result / "metrics.json").read_text())["history"])


def test_stored_outputs_give_the_curve_of_a_resident_teacher(ranks, folder, stored):
    """Training and validation, on shuffled samples of several epochs."""
    done(*ranks.run(1, run_line, _distill(folder, "online", teacher="teacher")))
    done(*ranks.run(1, run_line, _distill(folder, "offline", teacher_logits="logits")))
    online, offline = _history(folder / "online"), _history(folder / "offline")
    assert online == offline
    assert online[1]["val_kd_loss"] > 0
    weights = read_weights(folder / "online")
    for name, tensor in read_weights(folder / "offline").items():
        assert torch.equal(tensor, weights[name])
    metrics = json.loads((stored / "metrics.json").read_text())
    assert metrics["samples"] == {"train": 12, "validation": 8}
    files = stored.glob("logits/*.safetensors")
    assert metrics["bytes"] < sum(f.stat().st_size for f in files) < 1.2 * metrics["bytes"]


def test_other_tokens_are_refused(ranks, folder, stored):
    """Before the model is built, in one line that names the keys."""
    keys = {"teacher_logits": "logits", "data.path": "other"}
    (ending,) = ranks.run(1, run_line, _distill(folder, "refused", **keys))
    assert ending.code == 2
    says = "logits was made from other tokens: train sample 0 of data.path="
    assert says in ending.err
    assert "; set data.path, trainer.max_steps and data.global_batch_size as they" in ending.err


def cut_off(arguments: list[str], shards: int, how: str) -> Ending:
    """The command line, which fails or is told to stop while it writes a shard.

    It fails in the midst of the shard after ``shards``, and is stopped after that number.
    """
    from nemo_minitron.models import teacher_logits

    whole = teacher_logits.write_shard
    written: list[Path] = []

    def write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        if len(written) == shards:
            path.with_name(path.name + ".draft").write_bytes(b"half a shard")
            raise OSError("the node fails")
        whole(path, tensors)
        written.append(path)
        if how == "stopped" and len(written) == shards:
            os.kill(os.getpid(), signal.SIGTERM)

    teacher_logits.write_shard = write_shard
    try:
        return run_line(arguments)
    finally:
        teacher_logits.write_shard = whole


@pytest.mark.parametrize(("how", "code"), [("fails", 1), ("stopped", 75)])
def test_a_run_that_was_cut_off_goes_on(ranks, folder, stored, how, code):
    """After the shards that are complete, also with other micro-batches."""
    line = _line(folder, "teacher_logits", how, **STORED)
    (ending,) = ranks.run(1, cut_off, line, 2, how)
    assert ending.code == code, ending.err
    work = folder / f"{how}.partial" / "logits"
    before = {path.name: path.stat().st_mtime_ns for path in work.glob("*.safetensors")}
    assert sorted(before) == ["train-00000.safetensors", "train-00001.safetensors"]
    if how == "fails":
        flip_bit(work / "train-00001.safetensors")
        (ending,) = ranks.run(1, run_line, line)
        assert ending.code == 2
        assert "logits/train-00001.safetensors is damaged" in ending.err
        flip_bit(work / "train-00001.safetensors")
        os.utime(work / "train-00001.safetensors", ns=(before["train-00001.safetensors"],) * 2)
    done(*ranks.run(1, run_line, [*line, "data.micro_batch_size=2"]))
    result = folder / how / "logits"
    after = {path.name: path.stat().st_mtime_ns for path in result.iterdir()}
    assert {name: after[name] for name in before} == before
    assert sorted(after) == sorted(path.name for path in (stored / "logits").iterdir())
    index = (stored / "logits" / "index.json").read_text()
    assert (result / "index.json").read_text() == index
