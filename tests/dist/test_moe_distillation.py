"""Distillation of a model with experts gives the gradients of the single rank at every layout."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.checkpoint.torch_dist import read_torch_dist
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.families.registry import family_of
from tests.cases.kd import kd_gradients
from tests.helpers.pool import WorkerPool
from tests.helpers.tiny import MIXTRAL, QWEN2_MOE, write_weights

SMALL: dict[str, Any] = {"num_moe_experts": 2, "ffn_hidden_size": 24, "moe_ffn_hidden_size": 24}
TEACHERS = {
    "mixtral": replace(MIXTRAL, num_layers=2),
    "qwen2_moe": replace(QWEN2_MOE, num_layers=2),
    # In a pipeline the first stage has no experts.
    "dense_first": replace(QWEN2_MOE, num_layers=2, ffn_hidden_size=64, moe_layer_freq=[0, 1]),
}
STUDENTS = {
    "mixtral": replace(TEACHERS["mixtral"], **SMALL),
    "qwen2_moe": replace(TEACHERS["qwen2_moe"], **SMALL, moe_shared_expert_intermediate_size=32),
    "dense_first": replace(
        TEACHERS["dense_first"], **SMALL, moe_shared_expert_intermediate_size=32
    ),
}
LAYOUTS = {
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
}


def _gradients(ranks: WorkerPool, home: Path, family: str, name: str, size: int, keys: dict):
    student = STUDENTS[family]
    pair = [
        (student, str(home / family / "student")),
        (TEACHERS[family], str(home / family / "teacher")),
    ]
    out = home / family / name
    sums = ranks.run(size, kd_gradients, *pair, ParallelConfig(**keys), str(out), {})
    assert all(s == sums[0] for s in sums), "ranks disagree about the loss"
    store = read_torch_dist(out, family_of(student), student)
    return torch.tensor(sums[0]), {key: lazy.read() for key, lazy in store.items()}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("moe_kd")
    for family, student in STUDENTS.items():
        write_weights(home / family / "student", student, seed=1)
        write_weights(home / family / "teacher", TEACHERS[family], seed=2)
    return home


@pytest.fixture(scope="module")
def alone(ranks: WorkerPool, home: Path):
    return {family: _gradients(ranks, home, family, "alone", 1, {}) for family in STUDENTS}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("family", STUDENTS)
def test_gradients_do_not_depend_on_the_layout(
    ranks: WorkerPool, home: Path, alone, family: str, name: str
):
    size, keys = LAYOUTS[name]
    want_sums, want = alone[family]
    sums, got = _gradients(ranks, home, family, name, size, keys)
    torch.testing.assert_close(sums, want_sums, rtol=1e-5, atol=1e-6)
    for key, tensor in want.items():
        error = (got[key] - tensor).abs().max()
        assert error <= 1e-4 * tensor.abs().max(), (key, error)
