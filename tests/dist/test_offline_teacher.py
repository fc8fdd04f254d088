"""The teacher need not be resident: weights in host memory between passes, or stored outputs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemo_minitron.config.parallel import ParallelConfig
from tests.cases.offline import offline, offload, store
from tests.helpers.tiny import LLAMA, MIXTRAL, write_weights

TEACHER = replace(LLAMA, num_layers=4, hidden_size=48, share_embeddings_and_output_weights=True)
STUDENT = replace(LLAMA, num_layers=4, hidden_size=32, ffn_hidden_size=48)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Student and teacher checkpoints."""
    folder = tmp_path_factory.mktemp("offline")
    write_weights(folder / "student", STUDENT, 1)
    write_weights(folder / "teacher", TEACHER, 2)
    return (STUDENT, str(folder / "student")), (TEACHER, str(folder / "teacher"))


@pytest.mark.parametrize(
    ("size", "parallel"),
    [
        (1, ParallelConfig()),
        (
            2,
            ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
        ),
    ],
    ids=["single", "pp2_vpp2"],
)
def test_a_teacher_in_host_memory_gives_the_same_gradients(ranks, pair, size, parallel):
    """Its device memory is free between passes, but for the output layer that the loss needs."""
    for found in ranks.run(size, offload, *pair, parallel):
        (sums, grads), (sums_away, grads_away) = found["results"]
        assert sums == sums_away
        assert all(map(torch.equal, grads, grads_away))
        assert found["before"] == found["after"] == found["output_layer"]


LAYOUTS = {
    "tp2_sp": (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
    "pp2_vpp2": (
        2,
        ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    ),
    "cp2": (2, ParallelConfig(context_parallel_size=2)),
    "dp2": (2, ParallelConfig()),
}


@pytest.fixture(scope="module")
def single(ranks, pair, tmp_path_factory):
    """Files and gradients of one rank."""
    folder = tmp_path_factory.mktemp("single")
    (found,) = ranks.run(1, offline, *pair, ParallelConfig(), str(folder), str(folder))
    return folder, found


@pytest.mark.parametrize("loss", ["top_k", "top_k_tail"])
def test_stored_outputs_give_the_gradients_of_a_resident_teacher(single, loss):
    (sums, grads), (stored_sums, stored_grads) = (
        single[1][f"{loss} {name}"] for name in ("online", "offline")
    )
    assert sums == stored_sums
    assert sums[0] > 1
    assert sums[1] > 1
    assert all(map(torch.equal, grads, stored_grads))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_store_the_same_and_learn_the_same(ranks, pair, single, tmp_path, layout):
    """Outputs that one rank stored serve every layout; each layout stores the same ones."""
    size, parallel = LAYOUTS[layout]
    for found in ranks.run(size, offline, *pair, parallel, str(tmp_path), str(single[0])):
        for loss in ("top_k", "top_k_tail"):
            (sums, grads), (stored_sums, stored_grads) = (
                found[f"{loss} {name}"] for name in ("online", "offline")
            )
            torch.testing.assert_close(stored_sums, sums, rtol=1e-6, atol=0)
            for got, want in zip(stored_grads, grads, strict=True):
                assert (got - want).norm() <= 1e-6 * want.norm()
    _same_files(tmp_path, single[0], exactly=layout in ("dp2", "pp2_vpp2"))


def test_experts_spread_over_ranks(ranks, tmp_path):
    """Their ranks have to run together: three files on two of them, so one runs on fillers."""
    write_weights(tmp_path / "teacher", MIXTRAL, 3)
    teacher = (MIXTRAL, str(tmp_path / "teacher"))
    layouts = {"single": ParallelConfig(), "ep2": ParallelConfig(expert_model_parallel_size=2)}
    for size, (name, parallel) in enumerate(layouts.items(), start=1):
        ranks.run(size, store, teacher, parallel, str(tmp_path / name), 5)
    _same_files(tmp_path / "ep2", tmp_path / "single", exactly=False)


def _same_files(got: Path, want: Path, *, exactly: bool) -> None:
    """Sums split over ranks differ in their last bits; nothing else may differ."""
    names = sorted(path.name for path in want.iterdir())
    assert names == ["index.json", *(f"train-0000{n}.safetensors" for n in range(3))]
    assert sorted(path.name for path in got.iterdir()) == names
    assert (got / "index.json").read_text() == (want / "index.json").read_text()
    for name in names[1:]:
        if exactly:
            assert (got / name).read_bytes() == (want / name).read_bytes()
        ours, theirs = load_file(got / name), load_file(want / name)
        for key in ("ids", "tokens"):
            assert torch.equal(ours[key], theirs[key])
        for key in ("values", "log_z"):
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-5)
