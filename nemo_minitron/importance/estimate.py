"""The calibration loop: a dataset through the model on any layout, global scores out."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.utils.data import Dataset

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.stages import ScoreConfig
from nemo_minitron.config.training import DataConfig
from nemo_minitron.data.sampler import build_dataloader
from nemo_minitron.importance.aggregate import all_reduce_flat, reduce_sums
from nemo_minitron.importance.hooks import NORMS_PER_LAYER, ChunkRecorder, record
from nemo_minitron.importance.scores import Scores, check_finite, model_meta
from nemo_minitron.models.attention import zigzag_positions
from nemo_minitron.models.build import HiddenGPTModel
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


def local_tokens(batch: dict[str, Tensor], cp_group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """This context-parallel rank's part of a micro-batch.

    Args:
        batch: ``tokens`` and ``position_ids``, ``[b, seq_length]``.
        cp_group: ranks that share the sequences.

    Returns:
        ``[b, seq_length / cp]`` token ids and positions, in Megatron's zigzag order.
    """
    tokens, positions = batch["tokens"], batch["position_ids"]
    if cp_group.size() > 1:
        length = tokens.size(1) // cp_group.size()
        mine = zigzag_positions(length, cp_group.rank(), cp_group.size())
        tokens, positions = tokens[:, mine], positions[:, mine]
    return tokens, positions


def _forward_step(
    groups: ParallelGroups, device: torch.device, on_batch: Callable[[], None]
) -> Callable[..., Any]:
    """Megatron's forward step: hooks do the work, so there is no loss to speak of."""

    def no_loss(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return output.new_zeros(()), {}

    def step(batches: Iterator[dict[str, Tensor]], model: Any) -> tuple[Tensor, Any]:
        tokens, positions = local_tokens(next(batches), groups.cp)
        output = model(tokens.to(device), positions.to(device), None)
        on_batch()
        return output, no_loss

    return step


def _run(
    chunks: list[HiddenGPTModel],
    groups: ParallelGroups,
    dataset: Dataset[dict[str, Tensor]],
    data: DataConfig,
    plan: Calibration,
    on_batch: Callable[[], None],
) -> None:
    """Forward passes over the whole calibration set, logits never computed."""
    loaders = [
        iter(
            build_dataloader(
                dataset, data, dp_rank=plan.dp_rank, dp_size=plan.dp_size, drop_last=False
            )
        )
        for _ in chunks
    ]
    modes = [(chunk.training, chunk.return_hidden) for chunk in chunks]
    step = _forward_step(groups, next(chunks[0].parameters()).device, on_batch)
    for chunk in chunks:
        chunk.eval()
        chunk.return_hidden = True
    try:
        for micro_batches in plan.schedule():
            get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=loaders if len(chunks) > 1 else loaders[0],
                model=chunks if len(chunks) > 1 else chunks[0],
                num_microbatches=micro_batches,
                seq_length=data.seq_length,
                micro_batch_size=data.micro_batch_size,
                forward_only=True,
            )
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
    on_batch: Callable[[], None] = lambda: None,
) -> Scores:
    """Score a model on a calibration set. Collective: every rank of the layout calls it.

    Args:
        chunks: this rank's part of the model, weights loaded.
        config: global sizes of the model.
        groups: this rank's process groups.
        dataset: all calibration samples, of all ranks, each counted once.
        data: gives the batch sizes and the sequence length.
        scores: what to score and how.
        on_batch: called after every micro-batch of every chunk (progress).

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
    with record(chunks, groups, scores, plan.valid) as recorders:
        _run(chunks, groups, dataset, data, plan, on_batch)
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
