"""The teacher need not be resident: weights in host memory between passes, or stored outputs."""

from dataclasses import replace

import pytest
import torch

from nemo_minitron.config.parallel import ParallelConfig
from tests.dist.offline_cases import offload
from tests.tiny import LLAMA, write_weights

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
