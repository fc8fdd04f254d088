"""The calibration loop: a dataset through the model on any layout, global scores out."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from nemo_minitron.config.axes import AXES, Axis
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.stages import ScoreConfig
from nemo_minitron.config.training import DataConfig
from nemo_minitron.families.dims import DIMS
from nemo_minitron.importance.ablation import LayerAblation, ablated_blocks
from nemo_minitron.importance.aggregate import TokenSums, all_reduce_flat, reduce_sums
from nemo_minitron.importance.calibration import Calibration, calibrating, calibration_runs
from nemo_minitron.importance.experts import EXPERT_AXES, gather
from nemo_minitron.importance.hooks import ChunkRecorder, record
from nemo_minitron.importance.moments import save_moments
from nemo_minitron.importance.resume import SavedState
from nemo_minitron.models.build import HiddenGPTModel
from nemo_minitron.models.schedule import Batch, run_schedule
from nemo_minitron.pruning.scores import (
    Scores,
    check_block_sizes,
    check_finite,
    layer_scores,
    model_meta,
    stored_order,
)
from nemo_minitron.runtime.groups import ParallelGroups

Samples = Dataset[dict[str, Tensor]]


def forward_passes(config: ModelConfig, scores: ScoreConfig, samples: int) -> tuple[int, int]:
    """Return a sample's forward passes: those that record, and those that measure the LM loss.

    Args:
        config: global sizes of the model.
        scores: what to score.
        samples: of the calibration set.
    """
    recorded = samples if _records(scores) else 0
    blocks = len(ablated_blocks(config.num_layers, scores))
    return recorded, blocks * min(scores.lm_loss_samples, samples)


def _records(scores: ScoreConfig) -> bool:
    """Whether anything is scored from activations."""
    return (
        bool(scores.moments)
        or set(scores.axes) != {"layer"}
        or any(scores.layers_by(criterion) for criterion in ("block_influence", "block_angular"))
    )


class _Calibrator:
    """Two loops over samples, either of which can be left and taken up again."""

    def __init__(
        self,
        chunks: list[HiddenGPTModel],
        config: ModelConfig,
        groups: ParallelGroups,
        dataset: Samples,
        data: DataConfig,
        scores: ScoreConfig,
        on_samples: Callable[[int], None],
        saved: SavedState | None,
    ) -> None:
        self.chunks, self.groups = chunks, groups
        self.dataset, self.data = dataset, data
        self.on_samples, self.saved = on_samples, saved
        self.runs = self.done = 0
        samples = len(dataset)  # type: ignore[arg-type]  # torch's Dataset has no len
        interleaved = len(chunks) > 1
        # A micro-batch is many passes there, enough to keep a pipeline busy.
        least = data.micro_batch_size * groups.dp.size() * (groups.pp.size() if interleaved else 1)
        self.ablation_data = replace(data, global_batch_size=least)
        self.plan = Calibration.of(
            samples if _records(scores) else 0, data, groups, interleaved=interleaved
        )
        self.ablation_plan = Calibration.of(
            min(samples, scores.lm_loss_samples),
            self.ablation_data,
            groups,
            interleaved=interleaved,
        )
        blocks = ablated_blocks(config.num_layers, scores)
        self.ablation = LayerAblation(chunks, groups, blocks) if blocks else None
        self.recorders: list[ChunkRecorder] = []

    def run(self, scores: ScoreConfig, vocab_size: int) -> None:
        """Run both loops, from where the saved state is on."""
        state = self.saved.load() if self.saved else None
        with calibrating(self.chunks):
            with record(self.chunks, self.groups, scores, self.plan.valid) as self.recorders:
                if state is not None:
                    self._load(state)
                self._record()
            if self.ablation is not None:
                plan, data = self.ablation_plan, self.ablation_data
                self.ablation.run(self.dataset, data, plan, vocab_size, self._advance)

    def _record(self) -> None:
        runs = calibration_runs(
            self.chunks, self.groups, self.dataset, self.data, self.plan, self.runs
        )
        for batches in runs:
            run_schedule(self.chunks, batches, _no_loss, forward_only=True, collect_outputs=True)
            angles = self.recorders[0].angles
            if angles is not None:
                angles.flush(self.plan.valid)
            before, self.runs = self.plan.done(self.runs), self.runs + 1
            self._advance(self.plan.done(self.runs) - before)

    def _advance(self, samples: int) -> None:
        self.done += samples
        if self.saved is not None:
            self.saved.after(samples, self.done, self._state)
        self.on_samples(samples)

    def _state(self) -> dict[str, Any]:
        return {
            "runs": self.runs,
            "done": self.done,
            "recorders": [recorder.state_dict() for recorder in self.recorders],
            "removal": None if self.ablation is None else self.ablation.state_dict(),
        }

    def _load(self, state: dict[str, Any]) -> None:
        self.runs, self.done = state["runs"], state["done"]
        for recorder, values in zip(self.recorders, state["recorders"], strict=True):
            recorder.load_state_dict(values)
        if self.ablation is not None:
            self.ablation.load_state_dict(state["removal"])
        self.on_samples(self.done)


def _no_loss(index: int, batch: Batch, hidden: Tensor) -> None:
    """Return no loss: the hooks have recorded everything that is needed."""


def estimate_scores(
    chunks: list[HiddenGPTModel],
    config: ModelConfig,
    groups: ParallelGroups,
    dataset: Samples,
    data: DataConfig,
    scores: ScoreConfig,
    on_samples: Callable[[int], None] = lambda count: None,
    saved: SavedState | None = None,
    folder: Path | None = None,
) -> Scores:
    """Score a model on a calibration set. Collective: every rank of the layout calls it.

    Args:
        chunks: this rank's part of the model, weights loaded.
        config: global sizes of the model.
        groups: this rank's process groups.
        dataset: all calibration samples, of all ranks, each counted once.
        data: gives the batch sizes and the sequence length.
        scores: what to score and how.
        on_samples: told how many more forward passes of a sample are done (``forward_passes``).
        saved: where the state of a calibration that may be killed is kept.
        folder: on a file system that all ranks share; gets the second moments, if any.

    Returns:
        Global scores on the CPU, the same on every rank.

    Raises:
        ValueError: batch sizes do not fit the layout, blocks do not fit the model, no token counts
            for the LM loss, or scores are not finite.
    """
    check_block_sizes(config, scores)
    calibrator = _Calibrator(chunks, config, groups, dataset, data, scores, on_samples, saved)
    calibrator.run(scores, config.vocab_size)
    recorders = calibrator.recorders if calibrator.plan.samples else []
    # Where losses alone are measured, that is on the first samples.
    samples = calibrator.plan.samples or calibrator.ablation_plan.samples
    result = collected(recorders, config, groups, scores, (samples, samples * data.seq_length))
    if scores.moments:
        assert folder is not None
        moments = [r.moments for r in calibrator.recorders if r.moments is not None]
        save_moments(moments, groups, result.meta["num_tokens"], folder)
        result.meta["moments"] = scores.moments
    if calibrator.ablation is not None:
        _add_losses(result, calibrator.ablation, scores)
        result.meta["lm_loss_samples"] = calibrator.ablation_plan.samples
    check_finite(result)
    return result


def collected(
    recorders: list[ChunkRecorder],
    config: ModelConfig,
    groups: ParallelGroups,
    scores: ScoreConfig,
    seen: tuple[int, int],
) -> Scores:
    """Return scores of what was recorded, with what they were made of (collective).

    Args:
        recorders: of this rank's chunks; empty where only losses are measured.
        config: global sizes of the model.
        groups: this rank's process groups.
        scores: what was scored and how.
        seen: samples and tokens, over all ranks.
    """
    result = gather_scores(recorders, config, groups) if recorders else Scores()
    result.meta = {
        "model": model_meta(config),
        "aggregation": {"batch": scores.batch_aggregation, "seq": scores.seq_aggregation},
        "num_samples": seen[0],
        "num_tokens": seen[1],
        "layers": config.kept_layers or list(range(config.num_layers)),
    }
    if scores.criterion != "activation":
        result.meta["criterion"] = scores.criterion
    return result


def _add_losses(result: Scores, ablation: LayerAblation, scores: ScoreConfig) -> None:
    """Fill in the scores by LM loss."""
    losses = ablation.losses()
    by_size: dict[int, list[float]] = {}
    for (first, stop), loss in losses.items():  # in the order of ``first``
        by_size.setdefault(stop - first, []).append(loss)
    result.meta["lm_loss"] = by_size.pop(0)[0]
    if scores.layers_by("lm_loss"):
        result["layer_lm_loss"] = torch.tensor(by_size[1])
    if scores.layers_by("block_lm_loss"):
        for size in scores.block_sizes:
            result[layer_scores("block_lm_loss", size)] = torch.tensor(by_size[size])


def gather_scores(
    recorders: list[ChunkRecorder], config: ModelConfig, groups: ParallelGroups
) -> Scores:
    """Combine what all ranks recorded into global scores, the same on every rank.

    Samples are added over data-parallel ranks, layers put in place over pipeline ranks, ffn and
    head channels concatenated over tensor-parallel ranks.
    """
    influences = [r.influence for r in recorders if r.influence is not None]
    channels = [acc for recorder in recorders for acc in recorder.channels.values()]
    angles = [] if recorders[0].angles is None else [recorders[0].angles]
    tokens: list[TokenSums] = [*influences, *angles]
    reduce_sums(tokens, groups.tp)
    reduce_sums(tokens, groups.cp)
    reduce_sums([*tokens, *channels], groups.dp)
    reduce_sums(angles, groups.pp)
    tables = _layer_tables(recorders, config)
    all_reduce_flat(list(tables.values()), groups.pp)
    for axis in (axis for axis in AXES.values() if axis.seen_at and axis.name in tables):
        tables[axis.name] = _of_axis(axis, gather(tables[axis.name], groups.tp, dim=-1), config)
    if "hidden" in tables:
        tables["hidden"] = tables["hidden"].sum(dim=0)
    for size, values in (angles[0].scores() if angles else {}).items():
        tables[layer_scores("block_angular", size)] = values
    names = sorted(tables, key=stored_order)
    return Scores({name: _final(tables[name], groups.tp) for name in names})


def _of_axis(axis: Axis, table: Tensor, config: ModelConfig) -> Tensor:
    """Scores of the rows of a dim -> scores of one axis: the L2 norm over the rows of each index.

    Where rows belong to two axes that are both pruned (``Axis.within``), all are kept.

    The score of a head is the norm over its channels. Of an axis inside others, as the channels of
    a head are, each index has a row in all of them.

    Args:
        axis: what is scored.
        table: ``[layers, rows]`` of ``axis.scored_dim``.
        config: global sizes of the model.
    """
    part = DIMS[axis.scored_dim].parts[axis.seen_part or 0]
    table = table.unflatten(1, (part.count(config), part.rows(config)))
    if axis.within:
        return table
    over = 2 if axis.name == part.axis else 1
    return (
        table.squeeze(over) if table.size(over) == 1 else torch.linalg.vector_norm(table, dim=over)
    )


def _layer_tables(recorders: list[ChunkRecorder], config: ModelConfig) -> dict[str, Tensor]:
    """Axis -> ``[layers, ...]`` fp64 with this stage's layers filled in and zeros elsewhere."""
    tables: dict[str, Tensor] = {}
    for recorder in recorders:
        local = recorder.scores()
        layers = {axis: recorder.seen[axis] for axis in local}
        if recorder.influence is not None:
            local["layer"] = recorder.influence.scores()
        if recorder.experts is not None:
            local |= recorder.experts.scores()
            layers |= dict.fromkeys(EXPERT_AXES, recorder.routed)
        numbers = torch.tensor(recorder.layers)
        for axis, values in local.items():
            if axis not in tables:
                tables[axis] = values.new_zeros(config.num_layers, *values.shape[1:])
            places = numbers[layers[axis]] if axis in layers else numbers
            tables[axis].index_add_(0, places.to(values.device), values)  # norms of a layer add up
    return tables


def _final(scores: Tensor, tp_group: dist.ProcessGroup) -> Tensor:
    """Return the first TP rank's scores, fp32 on the CPU; ranks may differ in the last bit."""
    scores = scores.float().contiguous()
    if tp_group.size() > 1:
        dist.broadcast(scores, src=dist.get_global_rank(tp_group, 0), group=tp_group)
    return scores.cpu()
