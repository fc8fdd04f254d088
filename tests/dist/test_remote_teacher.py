"""A teacher on ranks of its own gives the student the gradients of one rank, and sends no more."""

from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.config.distillation import DistillationConfig, IntermediateConfig
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig, TeacherParallelConfig
from nemo_minitron.config.stages import DistillConfig
from nemo_minitron.config.training import DataConfig
from tests.cases.kd import batches, kd_gradients, model_cfg, read_gradients, save_gradients, wrap
from tests.cases.kd import zero_gradients as zeroed
from tests.helpers.tiny import LLAMA, MIXTRAL, write_weights

TEACHER = replace(LLAMA, num_layers=4, hidden_size=48)
STUDENT = replace(LLAMA, num_layers=4, hidden_size=32, ffn_hidden_size=48)
EXPERTS = replace(MIXTRAL, num_layers=4, hidden_size=48)
SEQUENCE, SAMPLES, STEPS = 16, 4, 2

# Student's layout and data-parallel size, then the teacher's keys.
LAYOUTS: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "student PP2 DP2, teacher TP2": (
        {"pipeline_model_parallel_size": 2},
        2,
        {"own_ranks": 2, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1},
    ),
    "student TP2 SP, teacher PP2 DP2": (
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        1,
        {"own_ranks": 4, "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 2},
    ),
    "student CP2, teacher TP2 SP": (
        {"context_parallel_size": 2},
        1,
        {"own_ranks": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "student PP2 VPP2, teacher one rank": (
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        1,
        {"own_ranks": 1, "pipeline_model_parallel_size": 1},
    ),
    "student DP2, teacher of experts EP2": (
        {},
        2,
        {"own_ranks": 2, "expert_model_parallel_size": 2},
    ),
}


def _in_two_worlds(
    student: tuple[ModelConfig, str],
    teacher: tuple[ModelConfig, str],
    parallel: ParallelConfig,
    split: dict[str, Any],
    data: int,
    out: str,
    store: str,
) -> tuple[list[list[float]], int]:
    """Two global batches on this rank; those of the teacher serve. Sums, and bytes sent."""
    import torch.distributed as dist

    from nemo_minitron.models.objective import on_host
    from nemo_minitron.models.remote_teacher import Sides
    from nemo_minitron.models.schedule import on_this_cp_rank
    from nemo_minitron.models.serve_teacher import TeacherServer
    from nemo_minitron.models.weights import load_frozen
    from nemo_minitron.runtime import ranks, worlds
    from nemo_minitron.runtime.groups import ParallelGroups
    from nemo_minitron.runtime.launch import init_model_parallel

    rank, total = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    ranks.set_teacher_ranks(split["own_ranks"])
    meeting = dist.FileStore(store, total)
    worlds.join(meeting, rank, total, "gloo", timedelta(seconds=60))
    try:
        layout = TeacherParallelConfig(**split).of(parallel)
        if ranks.runs_teacher_alone():
            init_model_parallel(layout)
            groups = ParallelGroups.current()
            chunks = load_frozen(Path(teacher[1]), layout, groups)
            sides = Sides(data, parallel.context_parallel_size, groups.dp.size())
            server = TeacherServer(chunks, groups, sides)
            server.serve()
            return [], server.bridge.bytes_sent if server.bridge else 0
        init_model_parallel(parallel)
        from nemo_minitron.models.distill import RemoteDistillationGPTModel

        cfg = model_cfg(student[0], teacher[0], parallel, teacher_parallel=split)
        model = RemoteDistillationGPTModel(cfg)
        model.load(Path(student[1]))
        model.load_teacher(Path(teacher[1]))
        wrap(model, use_distributed_optimizer=False)
        dp, sums = model.groups.dp, []
        for step in range(STEPS):
            mine = batches(SAMPLES, SEQUENCE, student[0].vocab_size, seed=step)[
                dp.rank() :: dp.size()
            ]
            zeroed(model)
            found = model.forward_backward([on_this_cp_rank(b, model.groups) for b in mine])
            sums.append(list(on_host(found)))
            if step == 0:
                save_gradients(model, Path(out), student[0])
        model.evaluate_batch([on_this_cp_rank(b, model.groups) for b in mine])
        model.remote.close(split["own_ranks"])
        return sums, model.remote.bridge.bytes_sent if model.remote.bridge else 0
    finally:
        ranks.set_teacher_ranks(0)


@pytest.fixture(scope="module")
def single(ranks, tmp_path_factory):
    """Checkpoints, and the gradients of one rank: of a dense teacher, of one with experts."""
    folder = tmp_path_factory.mktemp("remote")
    write_weights(folder / "student", STUDENT, 1)
    found = {}
    for name, config in {"dense": TEACHER, "experts": EXPERTS}.items():
        write_weights(folder / name, config, 2)
        config.save(folder / name)
        out = folder / f"{name}-gradients"
        models = (STUDENT, str(folder / "student")), (config, str(folder / name))
        sums = ranks.run(1, kd_gradients, *models, ParallelConfig(), str(out), {})
        found[name] = (models, sums[0], read_gradients(out, STUDENT))
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_and_bytes(ranks, single, tmp_path, name):
    """Gradients are those of one rank; what travels is one hidden state per token, and its id."""
    degrees, data, split = LAYOUTS[name]
    parallel = ParallelConfig(**degrees)
    models, want_sums, want = single["experts" if "experts" in name else "dense"]
    size = parallel.model_parallel_size * data + split["own_ranks"]
    found = ranks.run(
        size,
        _in_two_worlds,
        *models,
        parallel,
        split,
        data,
        str(tmp_path / "gradients"),
        str(tmp_path / "store"),
    )
    students, teachers = found[: -split["own_ranks"]], found[-split["own_ranks"] :]
    for sums, _ in students:
        torch.testing.assert_close(
            torch.tensor(sums[0]), torch.tensor(want_sums), rtol=1e-5, atol=1e-6
        )
    got = read_gradients(tmp_path / "gradients", STUDENT)
    for key, tensor in want.items():
        error = (got[key] - tensor).norm() / tensor.norm()
        assert error < 1e-4, f"{key}: relative error {error:.2e}"
    tokens = (STEPS + 1) * SAMPLES * SEQUENCE
    assert sum(sent for _, sent in teachers) == tokens * models[1][0].hidden_size * 4
    assert sum(sent for _, sent in students) == tokens * 4


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "own_ranks=3": ({"own_ranks": 3, "tensor_model_parallel_size": 2}, "multiple of tensor"),
    "degrees without ranks": ({"tensor_model_parallel_size": 2}, "own_ranks"),
    "negative": ({"own_ranks": -1}, "must not be negative"),
    "experts": (
        {"own_ranks": 3, "expert_model_parallel_size": 2},
        "expert_model_parallel_size=2 must divide",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_ranks_that_do_not_add_up_are_refused(name):
    """The message names the key of the teacher."""
    keys, said = REFUSED[name]
    with pytest.raises(ValueError, match=said) as refusal:
        TeacherParallelConfig(**keys).of(ParallelConfig())
    assert "teacher_parallel" in str(refusal.value)


NOT_SENT: dict[str, tuple[dict[str, Any], str]] = {
    "inner states": (
        {"distillation": DistillationConfig(intermediate=IntermediateConfig(losses=["embedding"]))},
        "inner states",
    ),
    "a teacher in host memory": (
        {"distillation": DistillationConfig(offload_teacher=True)},
        "offload_teacher",
    ),
    "borders of records": (
        {"data": DataConfig(path="-", records="sft", global_batch_size=4)},
        "data.pack=false",
    ),
    "replicas": ({"data": DataConfig(path="-", global_batch_size=3)}, "must divide the 3"),
}


@pytest.mark.parametrize("name", NOT_SENT)
def test_what_is_not_sent_is_refused(name):
    """Before any rank starts, with the key that helps."""
    keys, said = NOT_SENT[name]
    with pytest.raises(ValueError, match=said):
        DistillConfig(
            student="student",
            teacher="teacher",
            output_dir="out",
            teacher_parallel=TeacherParallelConfig(own_ranks=2),
            **keys,
        )


def test_keys_of_the_layout_survive_a_config():
    """The section is read back as it was written."""
    split = TeacherParallelConfig(own_ranks=4, tensor_model_parallel_size=2)
    assert TeacherParallelConfig(**asdict(split)) == split
