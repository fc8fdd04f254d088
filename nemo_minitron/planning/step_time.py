"""Estimate the time of a training step: computation, the pipeline's bubble, communication.

Communication counts where nothing is computed beside it. What is not in it: the optimizer's own
step, validation, checkpoints and reading data, which are below a hundredth of a step in the runs of
the papers.
"""

from dataclasses import asdict, dataclass, replace
from itertools import chain

from nemo_minitron.config.layers import ATTENTION, EXPERTS, kinds_of
from nemo_minitron.config.layout import layers_on_stages
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.pipeline import ClusterConfig
from nemo_minitron.config.stages import DistillConfig
from nemo_minitron.planning.compute import forward_flops, forward_parts, recomputed_flops
from nemo_minitron.planning.memory import Job
from nemo_minitron.planning.precision import TrainedBytes
from nemo_minitron.planning.shares import Share, shares


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on every rank."""

    student: float
    """Forward and backward passes of what is trained."""
    recomputed: float
    """Forward passes that the backward pass does again."""
    teacher: float
    """The teacher's forward passes; if it has ranks of its own, what the student waits for."""
    layers: float
    """Exchange inside layers and between pipeline stages: tensor, context and expert parallel."""
    bubble: float
    """Ranks that wait in the pipeline: for its first and last micro-batches, and for the stage that
    computes most, with more layers than others or with the output layer."""
    replicas: float
    """Gradients and weights between data-parallel ranks, as far as no pass runs beside them."""

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return float(sum(asdict(self).values()))


def step_time(job: Job, cluster: ClusterConfig, mfu: float) -> StepTime | None:
    """Estimate a training step, the mean one if phases have others.

    None for a stage that trains nothing, or has no GPUs.

    Args:
        job: the item on its ranks.
        cluster: speed of a GPU, and of what connects them.
        mfu: share of the peak that computation reaches, communication aside.
    """
    if not (job.trains and job.on_gpus):
        return None
    total: dict[str, float] = {}
    for one in job.of_phases():
        share = one.cfg.trainer.max_steps / job.cfg.trainer.max_steps
        for part, seconds in asdict(_step_time(one, cluster, mfu)).items():
            total[part] = total.get(part, 0.0) + share * seconds
    return StepTime(**total)


def _step_time(job: Job, cluster: ClusterConfig, mfu: float) -> StepTime:
    speed = cluster.peak_tflops * 1e12 * mfu * job.parallel.model_parallel_size
    cfg, length = job.cfg, job.cfg.data.seq_length
    batch = cfg.data.global_batch_size * length / job.data_parallel_size
    forward = batch * forward_flops(job.model, length) / speed
    again = batch * recomputed_flops(job, cfg, length) / speed
    passes = {"forward": 1.0 + again / forward, "backward": 1.0}
    traffic = _layers(job, job.model, job.parallel, cluster, passes)
    teacher = teachers_traffic = 0.0
    more = (3 * forward + again) * _excess(job.model, job.parallel, length)
    resident = isinstance(cfg, DistillConfig) and job.teacher_apart is None
    if resident and job.teacher is not None:
        teacher = batch * forward_flops(job.teacher, length) / speed
        layout = cfg.teacher_parallel.of(job.parallel)
        more += teacher * _excess(job.teacher, layout, length)
        teachers_traffic = _layers(job, job.teacher, layout, cluster, {"forward": 1.0})
    pp = job.parallel.pipeline_model_parallel_size
    turns = job.micro_batches * (job.parallel.virtual_pipeline_model_parallel_size or 1)
    busy = 3 * forward + again + teacher + traffic + teachers_traffic
    # A micro-batch passes every stage once, the others wait for the slowest one alone.
    bubble = busy * (pp - 1) / turns + more * (1 - 1 / turns)
    found = StepTime(
        student=3 * forward,
        recomputed=again,
        teacher=teacher,
        layers=traffic + teachers_traffic,
        bubble=bubble,
        replicas=_replicas(job, cluster, forward / job.micro_batches),
    )
    return replace(found, teacher=teacher + _awaited(job, cluster, mfu, found.total))


def _excess(model: ModelConfig, parallel: ParallelConfig, length: int) -> float:
    """How much more the pipeline stage that computes most does than a stage does on average."""
    works = []
    for chunks in layers_on_stages(model, parallel):
        parts = forward_parts(model.resized({}, sorted(chain(*chunks))), length)
        outer = parts["output"] + parts["prediction"]
        works.append(sum(parts.values()) - outer)
    works[-1] += outer
    return max(works) * len(works) / sum(works) - 1


def _awaited(job: Job, cluster: ClusterConfig, mfu: float, student: float) -> float:
    """Return seconds that the student waits for a teacher on ranks of its own.

    For its pass over the first micro-batch, and for what its passes over the others take longer
    than the ``student`` seconds beside them. The hidden states travel meanwhile.
    """
    parallel, teacher = job.teacher_apart, job.teacher
    if parallel is None or teacher is None:
        return 0.0
    alone = replace(job, data_parallel_size=parallel.data_parallel_size or 1)
    data, each = job.cfg.data, cluster.peak_tflops * 1e12 * mfu * parallel.model_parallel_size
    batch = data.global_batch_size * data.seq_length / alone.data_parallel_size
    passes = batch * forward_flops(teacher, data.seq_length) / each
    passes *= 1 + _excess(teacher, parallel, data.seq_length)
    passes += _layers(alone, teacher, parallel, cluster, {"forward": 1.0})
    one = passes / alone.micro_batches
    return one * parallel.pipeline_model_parallel_size + max(0.0, passes - one - student)


def _layers(
    job: Job,
    model: ModelConfig,
    parallel: ParallelConfig,
    cluster: ClusterConfig,
    passes: dict[str, float],
) -> float:
    """Return seconds of exchange inside the layers of the busiest stage, for all micro-batches.

    Args:
        job: gives the batch.
        model: the student or the teacher.
        parallel: its layout.
        cluster: speed of what connects the GPUs.
        passes: number of forward passes and, where there is one, backward passes.
    """
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    pp, ep = parallel.pipeline_model_parallel_size, parallel.expert_model_parallel_size
    data = job.cfg.data
    state = data.micro_batch_size * data.seq_length // cp * model.hidden_size * job.element
    letters = max(("".join(share.kinds) for share in shares(model, parallel)), key=len)
    forward, backward = passes["forward"], passes.get("backward", 0.0)
    # A gather before and a scatter after each part of a layer; under sequence parallelism the
    # backward pass gathers the input once more. One all-reduce is both.
    times = 2 * forward + (3 if parallel.sequence_parallel else 2) * backward
    inner = times * len(letters) * state * (tp - 1) / tp
    seconds = inner / _link(cluster, tp)
    # Tokens travel to their experts and back, evenly spread: so much of it leaves the node.
    split = tp if parallel.sequence_parallel else 1
    sent = 2 * (forward + backward) * letters.count(EXPERTS) * model.moe_router_topk * state / split
    away = max(0.0, 1 - cluster.ranks_per_node / (tp * ep))
    seconds += sent * away / cluster.network_gb_per_s / 1e9
    seconds += sent * ((ep - 1) / ep - away) / cluster.gpu_link_gb_per_s / 1e9
    seconds += _ring(job, model, parallel, cluster, passes, letters.count(ATTENTION))
    if pp > 1 and parallel.virtual_pipeline_model_parallel_size is None:
        seconds += (forward + backward) * state / split / cluster.network_gb_per_s / 1e9
    return seconds * job.micro_batches


def _ring(
    job: Job,
    model: ModelConfig,
    parallel: ParallelConfig,
    cluster: ClusterConfig,
    passes: dict[str, float],
    layers: int,
) -> float:
    """Return keys and values that context-parallel ranks pass round, less what attention hides.

    Args:
        job: gives the batch.
        model: the student or the teacher.
        parallel: its layout.
        cluster: speed of what connects the GPUs.
        passes: as ``_layers``.
        layers: number of a stage's layers that have attention.
    """
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    if cp == 1:
        return 0.0
    data = job.cfg.data
    count = data.micro_batch_size * data.seq_length // cp
    # As attention reads them: latents have become keys and values of every head.
    groups = model.num_attention_heads if model.multi_latent else model.num_query_groups
    rows = groups * (model.query_channels + model.kv_channels) * count * job.element / tp
    rounds = passes["forward"] + 2 * passes.get("backward", 0.0)
    sent = rounds * (cp - 1) * rows * layers / _link(cluster, tp * cp)
    share = layers / max(1, "".join(kinds_of(model)).count(ATTENTION))
    core = forward_parts(model, data.seq_length)["core_attn"] * count * share / tp
    return max(0.0, sent - rounds * core / (cluster.peak_tflops * 1e12))


def _replicas(job: Job, cluster: ClusterConfig, forward: float) -> float:
    """Return seconds of the exchange of gradients and weights that no pass hides.

    Overlapped, gradients travel beside the backward pass of the last micro-batch and weights beside
    the forward pass of the first: gradients are summed up before.

    Args:
        job: the item on its ranks.
        cluster: speed of what connects the GPUs.
        forward: seconds of one micro-batch's forward pass.
    """
    ddp, sharded = job.megatron.ddp, job.cfg.optim.use_distributed_optimizer
    reduced = ddp.get("overlap_grad_reduce", True)
    gathered = ddp.get("overlap_param_gather", reduced and sharded)
    gradient = TrainedBytes.of(job.megatron, bf16=job.bf16).gradient
    rank = max(shares(job.model, job.parallel), key=lambda share: share.total)
    down = _exchange(job, rank, cluster) * gradient * (1 if sharded else 2)
    up = _exchange(job, rank, cluster) * job.element if sharded else 0.0
    hidden = 2 * forward * bool(reduced), forward * bool(gathered)
    return max(0.0, down - hidden[0]) + max(0.0, up - hidden[1])


def _exchange(job: Job, rank: Share, cluster: ClusterConfig) -> float:
    """Return seconds for each byte of a parameter, scattered over or gathered from its replicas."""
    parallel, count = job.parallel, job.data_parallel_size * job.parallel.context_parallel_size
    link = _link(cluster, count * parallel.tensor_model_parallel_size)
    experts = max(1, count // parallel.expert_model_parallel_size)
    sent = rank.dense * (count - 1) / count + rank.expert * (experts - 1) / experts
    return sent / link


def _link(cluster: ClusterConfig, ranks: int) -> float:
    """Bytes a second and GPU among neighbouring ranks: inside a node, or also between nodes."""
    inside = ranks <= cluster.ranks_per_node
    return (cluster.gpu_link_gb_per_s if inside else cluster.network_gb_per_s) * 1e9
