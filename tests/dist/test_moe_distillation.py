"""Distillation of a model with experts gives the gradients of the single rank at every layout."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_minitron.checkpoint.torch_dist import read_torch_dist
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.families.registry import family_of
from tests.dist.kd_cases import kd_gradients
from tests.pool import WorkerPool
from tests.tiny import MIXTRAL, write_weights

TEACHER = replace(MIXTRAL, num_layers=2)
STUDENT = replace(TEACHER, num_moe_experts=2, ffn_hidden_size=24, moe_ffn_hidden_size=24)
LAYOUTS = {
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
}


def _gradients(ranks: WorkerPool, home: Path, name: str, size: int, keys: dict):
    pair = [(STUDENT, str(home / "student")), (TEACHER, str(home / "teacher"))]
    out = home / name
    sums = ranks.run(size, kd_gradients, *pair, ParallelConfig(**keys), str(out), {})
    assert all(s == sums[0] for s in sums), "ranks disagree about the loss"
    store = read_torch_dist(out, family_of(STUDENT), STUDENT)
    return torch.tensor(sums[0]), {key: lazy.read() for key, lazy in store.items()}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("moe_kd")
    write_weights(home / "student", STUDENT, seed=1)
    write_weights(home / "teacher", TEACHER, seed=2)
    return home


@pytest.fixture(scope="module")
def alone(ranks: WorkerPool, home: Path):
    return _gradients(ranks, home, "alone", 1, {})


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_do_not_depend_on_the_layout(ranks: WorkerPool, home: Path, alone, name: str):
    size, keys = LAYOUTS[name]
    want_sums, want = alone
    sums, got = _gradients(ranks, home, name, size, keys)
    torch.testing.assert_close(sums, want_sums, rtol=1e-5, atol=1e-6)
    for key, tensor in want.items():
        error = (got[key] - tensor).abs().max()
        assert error <= 1e-4 * tensor.abs().max(), (key, error)
