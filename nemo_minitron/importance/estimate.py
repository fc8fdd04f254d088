"""The calibration loop: a dataset through the model on any layout, global scores out."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.stages import ScoreConfig
from nemo_minitron.config.training import DataConfig
from nemo_minitron.data.sampler import build_dataloader
from nemo_minitron.importance.aggregate import all_reduce_flat, reduce_sums
from nemo_minitron.importance.hooks import NORMS_PER_LAYER, ChunkRecorder, record
from nemo_minitron.importance.scores import Scores, check_finite, model_meta
from nemo_minitron.models.build import HiddenGPTModel
from nemo_minitron.models.schedule import Batch, on_this_cp_rank, run_schedule
from nemo_minitron.runtime.groups import ParallelGroups


@dataclass(frozen=True)
class Calibration:
    """How the samples are spread over micro-batches and data-parallel ranks.

    Micro-batch ``k`` of data-parallel rank ``r`` holds the samples from ``(k * dp_size + r) *
    micro_batch_size`` on; those past the end are filler that counts for nothing, so the scores do
    not depend on any of these numbers but ``samples``.
    """

    samples: int
    micro_batch_size: int
    global_batch_size: int
    dp_rank: int
    dp_size: int
    pp_size: int
    interleaved: bool

    def valid(self, micro_batch: int) -> int:
        """Leading samples of a micro-batch of this rank that are not filler."""
        start = (micro_batch * self.dp_size + self.dp_rank) * self.micro_batch_size
        return min(max(self.samples - start, 0), self.micro_batch_size)

    def schedule(self) -> list[int]:
        """Micro-batches per run of Megatron's schedule: one global batch each, the last cut short.

        Raises:
            ValueError: an interleaved pipeline is given fewer micro-batches than it has stages.
        """
        step = self.micro_batch_size * self.dp_size
        per_run = self.global_batch_size // step
        if self.interleaved and per_run % self.pp_size:
            raise ValueError(
                f"data.global_batch_size={self.global_batch_size} makes {per_run} micro-batches; "
                "the interleaved schedule needs a multiple of parallel."
                f"pipeline_model_parallel_size={self.pp_size}: set data.global_batch_size to a "
                f"multiple of {step * self.pp_size}"
            )
        left = -(-self.samples // step)
        if self.interleaved:
            left += -left % self.pp_size
        full, rest = divmod(left, per_run)
        return [per_run] * full + ([rest] if rest else [])


def _run(
    chunks: list[HiddenGPTModel],
    groups: ParallelGroups,
    batches: Iterator[Batch],
    plan: Calibration,
    on_samples: Callable[[int], None],
) -> None:
    """Forward passes over the whole calibration set; logits are never computed."""
    step = plan.micro_batch_size * plan.dp_size
    done = 0
    with _calibrating(chunks):
        device = next(chunks[0].parameters()).device
        for count in plan.schedule():
            run = [
                {key: value.to(device) for key, value in on_this_cp_rank(batch, groups).items()}
                for batch in itertools.islice(batches, count)
            ]
            run_schedule(chunks, run, _no_loss, forward_only=True, collect_outputs=True)
            before, done = done, min(done + count * step, plan.samples)
            on_samples(done - before)


def _no_loss(index: int, batch: Batch, hidden: Tensor) -> None:
    """The hooks have seen all there is to see."""


@contextmanager
def _calibrating(chunks: list[HiddenGPTModel]) -> Iterator[None]:
    """Evaluation mode and no output layer, for as long as it takes."""
    modes = [(chunk.training, chunk.return_hidden) for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
        chunk.return_hidden = True
    try:
        yield
    finally:
        for chunk, (training, return_hidden) in zip(chunks, modes, strict=True):
            chunk.train(training)
            chunk.return_hidden = return_hidden


def estimate_scores(
    chunks: list[HiddenGPTModel],
    config: ModelConfig,
    groups: ParallelGroups,
    dataset: Dataset[dict[str, Tensor]],
    data: DataConfig,
    scores: ScoreConfig,
    on_samples: Callable[[int], None] = lambda count: None,
) -> Scores:
    """Score a model on a calibration set. Collective: every rank of the layout calls it.

    Args:
        chunks: this rank's part of the model, weights loaded.
        config: global sizes of the model.
        groups: this rank's process groups.
        dataset: all calibration samples, of all ranks, each counted once.
        data: gives the batch sizes and the sequence length.
        scores: what to score and how.
        on_samples: told how many more samples are done, for progress.

    Returns:
        Global scores on the CPU, the same on every rank.

    Raises:
        ValueError: batch sizes do not fit the layout, or scores are not finite.
    """
    plan = Calibration(
        samples=len(dataset),  # type: ignore[arg-type]
        micro_batch_size=data.micro_batch_size,
        global_batch_size=data.global_batch_size,
        dp_rank=groups.dp.rank(),
        dp_size=groups.dp.size(),
        pp_size=groups.pp.size(),
        interleaved=len(chunks) > 1,
    )
    batches = build_dataloader(
        dataset, data, dp_rank=plan.dp_rank, dp_size=plan.dp_size, drop_last=False
    )
    with record(chunks, groups, scores, plan.valid) as recorders:
        _run(chunks, groups, iter(batches), plan, on_samples)
    result = gather_scores(recorders, config, groups)
    result.meta = {
        "model": model_meta(config),
        "aggregation": {"batch": scores.batch_aggregation, "seq": scores.seq_aggregation},
        "num_samples": plan.samples,
        "num_tokens": plan.samples * data.seq_length,
        "layers": config.kept_layers or list(range(config.num_layers)),
    }
    check_finite(result)
    return result


def gather_scores(
    recorders: list[ChunkRecorder], config: ModelConfig, groups: ParallelGroups
) -> Scores:
    """What all ranks recorded -> global scores, the same on every rank.

    Samples are added over data-parallel ranks, layers put in place over pipeline ranks, ffn and
    head channels concatenated over tensor-parallel ranks.
    """
    influences = [r.influence for r in recorders if r.influence is not None]
    if recorders[0].sequence_split:
        reduce_sums(influences, groups.tp)
    reduce_sums(influences, groups.cp)
    channels = [acc for recorder in recorders for acc in recorder.channels.values()]
    reduce_sums([*influences, *channels], groups.dp)
    tables = _layer_tables(recorders, config)
    all_reduce_flat(list(tables.values()), groups.pp)
    hidden, ffn, head = (tables.get(axis) for axis in ("hidden", "ffn", "head"))
    if head is not None:
        head = _gather_channels(head, groups.tp).unflatten(1, (-1, config.kv_channels))
        head = torch.linalg.vector_norm(head, dim=-1)
    return Scores(
        hidden=_final(None if hidden is None else hidden.sum(dim=(0, 1)), groups.tp),
        ffn=_final(None if ffn is None else _gather_channels(ffn, groups.tp), groups.tp),
        head=_final(head, groups.tp),
        layer=_final(tables.get("layer"), groups.tp),
    )


def _layer_tables(recorders: list[ChunkRecorder], config: ModelConfig) -> dict[str, Tensor]:
    """Axis -> ``[layers, ...]`` fp64 with this stage's layers filled in and zeros elsewhere."""
    tables: dict[str, Tensor] = {}
    for recorder in recorders:
        local = {axis: acc.scores() for axis, acc in recorder.channels.items()}
        if "hidden" in local:
            local["hidden"] = local["hidden"].unflatten(0, (-1, NORMS_PER_LAYER))
        if recorder.influence is not None:
            local["layer"] = recorder.influence.scores()
        for axis, values in local.items():
            if axis not in tables:
                tables[axis] = values.new_zeros(config.num_layers, *values.shape[1:])
            tables[axis][recorder.layers] = values
    return tables


def _gather_channels(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``[..., w]`` shards -> ``[..., w * tp]`` in rank order."""
    if group.size() == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def _final(scores: Tensor | None, tp_group: dist.ProcessGroup) -> Tensor | None:
    """fp32 on the CPU; replicas may differ in the last bit, so one of them decides."""
    if scores is None:
        return None
    scores = scores.float().contiguous()
    if tp_group.size() > 1:
        dist.broadcast(scores, src=dist.get_global_rank(tp_group, 0), group=tp_group)
    return scores.cpu()
