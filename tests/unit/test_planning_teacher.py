"""What ``plan`` says of a teacher on ranks of its own (``teacher_parallel.own_ranks``)."""

import json
from dataclasses import replace
from typing import Any

import pytest
import yaml

from nemo_minitron.config import load, schema
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig, TeacherParallelConfig
from nemo_minitron.config.pipeline import PlanConfig
from nemo_minitron.config.stages import DistillConfig, TeacherLogitsConfig
from nemo_minitron.config.training import DataConfig, TrainerConfig
from nemo_minitron.planning.advice import _tries
from nemo_minitron.planning.compute import forward_flops
from nemo_minitron.planning.memory import Job, check_split, fullest_rank
from nemo_minitron.planning.step_time import step_time
from tests.helpers.bad_input import run_line

VALUES = yaml.safe_load((schema.conf_dir() / "model" / "llama31_8b.yaml").read_text())
TEACHER = ModelConfig(**VALUES)
STUDENT = replace(TEACHER, num_layers=16)
SEQ, BATCH = 4096, 64


def job(**where: Any) -> Job:
    """DP 8 of the student, with a teacher there or on ranks of its own."""
    cfg = DistillConfig(
        output_dir="out",
        student="student",
        teacher="teacher",
        data=DataConfig(path="x", seq_length=SEQ, global_batch_size=BATCH),
        parallel=ParallelConfig(data_parallel_size=8),
        trainer=TrainerConfig(precision="bf16-mixed"),
        teacher_parallel=TeacherParallelConfig(**where),
    )
    return Job(cfg, STUDENT, TEACHER, 8, True)


def test_memory_is_that_of_the_fuller_side():
    """The student's rank keeps the output layer of the teacher, and three of its hidden states."""
    shared, apart = fullest_rank(job()), fullest_rank(job(own_ranks=8))
    assert shared.teacher > 2 * 8_030_261_248
    assert apart.teacher == 2 * 4096 * (TEACHER.vocab_size + 3 * SEQ)
    assert (apart.weights, apart.optimizer) == (shared.weights, shared.optimizer)
    small = replace(job(own_ranks=8), model=replace(STUDENT, num_layers=1))
    alone = fullest_rank(small)  # a rank that runs the teacher
    assert (alone.weights, alone.teacher) == (0, 2 * 8_030_261_248)


@pytest.mark.parametrize("ranks", [2, 16])
def test_the_student_waits_for_the_first_micro_batch_and_for_what_takes_longer(ranks):
    plan = load.compose("plan", ["cluster=dgx_h100"])
    assert isinstance(plan, PlanConfig)
    cluster, mfu = plan.cluster, 0.4
    alone, shared = step_time(job(own_ranks=ranks), cluster, mfu), step_time(job(), cluster, mfu)
    assert alone is not None
    assert shared is not None
    speed = cluster.peak_tflops * 1e12 * mfu
    passes = BATCH * SEQ * forward_flops(TEACHER, SEQ) / speed / ranks
    first = passes / (BATCH / ranks)
    beside = alone.total - alone.teacher
    assert beside == pytest.approx(shared.total - shared.teacher)
    assert alone.teacher == pytest.approx(first + max(0.0, passes - first - beside))
    assert (passes > beside) == (ranks == 2)


def test_advice_leaves_out_what_the_teacher_cannot_follow():
    """Its ranks are not a multiple of some of the degrees that are tried."""
    cfg = job(own_ranks=8).cfg
    cfg.parallel = ParallelConfig(tensor_model_parallel_size=8, sequence_parallel=True)
    cluster: Any = load.compose("plan", ["cluster=dgx_h100"])
    tried = [changed.parallel.model_parallel_size for _, changed in _tries(cfg, cluster.cluster)]
    assert tried
    assert all(8 % size == 0 for size in tried)


def test_a_teacher_alone_deals_out_samples():
    """Batches need not divide over replicas that train nothing."""
    data = DataConfig(path="x", seq_length=SEQ, global_batch_size=8, micro_batch_size=4)
    cfg = TeacherLogitsConfig(checkpoint="teacher", output_dir="out", data=data)
    check_split(cfg, 8)
    student = DistillConfig(student="s", teacher="t", output_dir="out", data=data)
    with pytest.raises(ValueError, match="global_batch_size=8"):
        check_split(student, 8)


def test_both_sides_are_counted(tmp_path):
    line = ["plan", "experiment=llama31_minitron_4b_width", "cluster=dgx_h100"]
    own = ["+change.distilled.teacher_parallel.own_ranks=8"]
    before = "+change.corrected.parallel.data_parallel_size=32"
    ending = run_line([*line, "nodes=33", *own, before, f"json={tmp_path}/plan.json"])
    assert ending.code == 0, ending.err
    items = json.loads((tmp_path / "plan.json").read_text())["items"]
    assert next(item for item in items if item["name"] == "distilled")["ranks"] == 33 * 8
    ending = run_line([*line, "nodes=1", *own])
    assert ending.code == 2
    assert "has no ranks for the student beside teacher_parallel.own_ranks=8" in ending.err
