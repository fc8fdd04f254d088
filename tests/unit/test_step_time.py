"""``minitron plan``: where the time of a training step goes, against figures by hand."""

from dataclasses import replace

import pytest
import yaml

from nemo_minitron.config import load, schema
from nemo_minitron.config.megatron import MegatronConfig
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.pipeline import ClusterConfig
from nemo_minitron.config.stages import FinetuneConfig, PlanConfig
from nemo_minitron.config.training import DataConfig, OptimConfig, TrainerConfig
from nemo_minitron.families.registry import family_of
from nemo_minitron.families.table import parameter_count
from nemo_minitron.pipeline.plan import read_items
from nemo_minitron.planning.compute import forward_parts, work
from nemo_minitron.planning.items import plan_items
from nemo_minitron.planning.memory import Job, fullest_rank
from nemo_minitron.planning.shares import shares
from nemo_minitron.planning.step_time import StepTime, _ring, step_time
from tests.helpers.tiny import DEEPSEEK_V3, LLAMA

LAYERS, HIDDEN, LENGTH = 32, 4096, 8192
CLUSTER = ClusterConfig()
CONF = schema.conf_dir()


def job(parallel: ParallelConfig, batch: int, replicas: int = 1, **ddp: bool) -> Job:
    cfg = FinetuneConfig(
        checkpoint="none",
        output_dir="out",
        data=DataConfig(path="x", seq_length=LENGTH, micro_batch_size=1, global_batch_size=batch),
        parallel=parallel,
        optim=OptimConfig(use_distributed_optimizer=True),
        trainer=TrainerConfig(precision="bf16-mixed"),
        megatron=MegatronConfig(ddp=dict(ddp)),
    )
    values = yaml.safe_load((CONF / "model/llama31_8b.yaml").read_text())
    return Job(cfg, ModelConfig(**values), None, replicas, True)


def timed(job: Job) -> StepTime:
    time = step_time(job, CLUSTER, 0.4)
    assert time is not None
    return time


def test_computation_is_that_of_gpu_hours():
    one = job(ParallelConfig(), batch=8)
    time = timed(one)
    hours = work(one).gpu_hours(CLUSTER, 0.4)
    assert time.student * one.cfg.trainer.max_steps / 3600 == pytest.approx(hours)
    assert time.total == time.student


def test_sequence_parallel_layers_exchange_hidden_states():
    """Attention and MLP: two exchanges forward and three backward, 7 of 8 shares of each."""
    parallel = ParallelConfig(tensor_model_parallel_size=8, sequence_parallel=True)
    time = timed(job(parallel, batch=8))
    state = LENGTH * HIDDEN * 2
    assert time.layers == pytest.approx(8 * LAYERS * 2 * 5 * state * 7 / 8 / 450e9)


def test_ranks_of_a_pipeline_wait_for_its_ends_and_for_its_slowest_stage():
    """Every stage has as many layers here, so that the one with the output layer computes most."""
    plain = timed(one := job(ParallelConfig(pipeline_model_parallel_size=4), batch=8))
    parts = forward_parts(one.model, LENGTH)
    whole = sum(parts.values())
    last = (whole - parts["output"]) / 4 + parts["output"]
    waits = plain.student * (4 * last / whole - 1)
    assert waits > 0.15 * plain.student
    by_hand = (plain.student + plain.layers) * 3 / 8 + waits * 7 / 8
    assert plain.bubble == pytest.approx(by_hand)
    chunks = ParallelConfig(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=2)
    interleaved = timed(job(chunks, batch=8))
    by_hand = interleaved.student * 3 / 16 + waits * 15 / 16
    assert interleaved.bubble == pytest.approx(by_hand)


@pytest.mark.parametrize(
    ("keys", "layers"),
    [
        ({"num_layers_in_last_pipeline_stage": 5}, [9, 9, 9, 5]),
        ({"num_layers_in_first_pipeline_stage": 14}, [14, 6, 6, 6]),
        ({"pipeline_model_parallel_layout": "Et*8|t*9|t*9|t*6,L"}, [8, 9, 9, 6]),
    ],
)
def test_uneven_pipelines(keys, layers):
    """The slowest stage sets the pace, and memory is that of the layers that a stage holds."""
    one = job(ParallelConfig(pipeline_model_parallel_size=4, **keys), batch=8)
    time, parts = timed(one), forward_parts(one.model, LENGTH)
    layer = (sum(parts.values()) - parts["output"]) / LAYERS
    stages = [count * layer for count in layers]
    stages[-1] += parts["output"]
    one_pass = time.student / 8 / sum(parts.values()) * 4  # seconds for an operation, all stages'
    by_hand = one_pass * (sum(stages) + 7 * max(stages))  # first micro-batch, then one at a time
    assert time.student + time.bubble == pytest.approx(by_hand + time.layers * 3 / 8)
    count = parameter_count(family_of(one.model), one.model)["total"]
    embedding = one.model.vocab_size * HIDDEN
    block = (count - 2 * embedding - HIDDEN) // LAYERS
    held = [block * layers[0] + embedding, *(block * count for count in layers[1:3])]
    held.append(block * layers[3] + embedding + HIDDEN)
    assert [share.total for share in shares(one.model, one.parallel)] == held
    assert fullest_rank(one).weights in {2 * parameters for parameters in held}


def test_latents_are_keys_and_values_when_they_travel():
    """Context-parallel ranks of MLA pass on what attention reads: keys are wider than values."""
    model = replace(DEEPSEEK_V3, kv_channels=12)
    parallel = ParallelConfig(context_parallel_size=2, tensor_model_parallel_size=2)
    one = replace(job(parallel, batch=8), model=model)
    passes = {"forward": 1.0, "backward": 1.0}
    fast = replace(CLUSTER, peak_tflops=1e9)  # attention hides nothing
    sent = _ring(one, model, parallel, fast, passes, 4)
    rows = 8 * (10 + 6 + 12) * (LENGTH // 2) * 2 / 2  # of heads: queries' channels and values'
    assert sent == pytest.approx(3 * rows * 4 / 450e9, rel=1e-3)
    plain = replace(LLAMA, num_query_groups=4, kv_channels=12)
    sent = _ring(one, plain, parallel, fast, passes, 4)
    assert sent == pytest.approx(3 * 2 * 4 * 12 * (LENGTH // 2) * 4 / 450e9, rel=1e-3)


def test_gradients_travel_beside_the_last_backward_pass():
    """Two nodes of replicas: fp32 gradients scattered, bf16 weights gathered, 15 of 16 shares."""
    alone = timed(job(ParallelConfig(), batch=16, replicas=16, overlap_grad_reduce=False))
    model = job(ParallelConfig(), batch=16).model
    by_hand = parameter_count(family_of(model), model)["total"] * 15 / 16 * (4 + 2) / 50e9
    assert alone.replicas == pytest.approx(by_hand, rel=1e-3)
    forward, down, up = alone.student / 3, by_hand * 4 / 6, by_hand * 2 / 6
    left = max(0, down - 2 * forward) + max(0, up - forward)
    beside = timed(job(ParallelConfig(), batch=16, replicas=16))
    assert beside.replicas == pytest.approx(left, rel=1e-3)


def test_phases_are_added_up():
    """Work of all, the mean step, and the memory of the fullest phase."""
    parallel, long = ParallelConfig(tensor_model_parallel_size=2), {"seq_length": 4 * LENGTH}
    phases = [{"steps": 75}, {"steps": 25, "data": long}]
    plain = job(parallel, batch=8)
    both, second = (
        replace(plain, cfg=replace(plain.cfg, data=data, trainer=trainer))
        for data, trainer in (
            (plain.cfg.data, replace(plain.cfg.trainer, phases=phases)),
            (replace(plain.cfg.data, **long), plain.cfg.trainer),
        )
    )
    for kind in ("tokens", "flops"):
        whole, first, other = (getattr(work(one), kind) for one in (both, plain, second))
        assert whole == pytest.approx(0.75 * first + 0.25 * other)
    mean = 0.75 * timed(plain).total + 0.25 * timed(second).total
    assert timed(both).total == pytest.approx(mean)
    assert fullest_rank(both) == fullest_rank(second)


def test_a_slower_network_is_seen_where_experts_leave_the_node():
    overrides = ["experiment=nemotron3_nano_30b_22b", "cluster=dgx_h100", "nodes=4"]
    cfg = load.compose("plan", overrides)
    assert isinstance(cfg, PlanConfig)
    plans = {plan.name: plan for plan in plan_items(cfg, read_items(cfg, at_hand=False))}
    run = plans["distilled"].run
    assert run is not None
    fast = step_time(run.job, cfg.cluster, 0.4)
    slow = step_time(run.job, replace(cfg.cluster, network_gb_per_s=25.0), 0.4)
    assert fast is not None
    assert slow is not None
    assert slow.layers > 1.2 * fast.layers
    assert slow.teacher == fast.teacher
