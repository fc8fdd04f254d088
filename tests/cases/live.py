"""Tasks for the rank pool: a model scored, pruned in memory, run and saved at one layout."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import PruningConfig, ScoreConfig
from nemo_minitron.config.training import DataConfig
from nemo_minitron.pruning.plan import Plan, make_plan

Result = dict[str, Any]


def _start(parallel: ParallelConfig):
    from nemo_minitron.runtime.groups import ParallelGroups
    from nemo_minitron.runtime.launch import init_model_parallel

    init_model_parallel(parallel)
    return ParallelGroups.current()


def _load(config: ModelConfig, folder: str, parallel: ParallelConfig, groups):
    from nemo_minitron.models.build import build_gpt
    from nemo_minitron.models.weights import load_weights

    chunks = build_gpt(config, parallel, groups)
    load_weights(chunks, groups, Path(folder))
    return chunks


def _score(chunks, config: ModelConfig, groups, ids: torch.Tensor, global_batch_size: int):
    from nemo_minitron.data.samples import NpyDataset
    from nemo_minitron.importance.estimate import estimate_scores

    data = DataConfig(
        path="-",
        seq_length=ids.size(1),
        micro_batch_size=1,
        global_batch_size=global_batch_size,
    )
    dataset = NpyDataset(ids.numpy(), len(ids))
    return estimate_scores(chunks, config, groups, dataset, data, ScoreConfig())


@torch.no_grad()
def _logits(chunks, groups, ids: torch.Tensor) -> torch.Tensor | None:
    """``[samples, s, v]`` of the whole sequence and vocabulary (padded); last stage only."""
    from nemo_minitron.models.schedule import on_this_cp_rank, run_schedule

    samples, length = ids.shape
    positions = torch.arange(length).expand(samples, length).contiguous()
    batch = {"tokens": ids, "labels": ids, "loss_mask": ids, "position_ids": positions}
    batches = [
        on_this_cp_rank({key: value[i : i + 1] for key, value in batch.items()}, groups)
        for i in range(samples)
    ]
    found = run_schedule(
        chunks, batches, lambda i, b, out: out, forward_only=True, collect_outputs=True
    )
    if not found:
        return None
    local = torch.cat(found)  # [samples, s / cp, v / tp]
    shards = [torch.empty_like(local) for _ in range(groups.tp.size())]
    dist.all_gather(shards, local.contiguous(), group=groups.tp)
    local = torch.cat(shards, dim=-1)
    pieces = [torch.empty_like(local) for _ in range(groups.cp.size())]
    dist.all_gather(pieces, local, group=groups.cp)
    places = [torch.empty_like(batches[0]["position_ids"]) for _ in range(groups.cp.size())]
    dist.all_gather(places, batches[0]["position_ids"].contiguous(), group=groups.cp)
    return torch.cat(pieces, dim=1)[:, torch.cat(places, dim=1)[0].argsort()]


def _held(tensors) -> int:
    """Bytes of the storages behind tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@contextmanager
def _watching_memory(chunks) -> Iterator[list[int]]:
    """Bytes of weights this rank holds whenever rows travel: old model, new model, in between."""
    from nemo_minitron.models import prune_live as live

    held: list[int] = []
    models = list(chunks)
    build, redistribute = live.build_empty_gpt, live.redistribute

    def building(*args, **kwargs):
        built, shapes = build(*args, **kwargs)
        models.extend(built)
        return built, shapes

    def moving(local, out, *args):
        weights = [p for model in models for p in model.parameters()]
        held.append(_held([*weights, *local.values(), *out.values()]))
        redistribute(local, out, *args)

    with (
        patch.object(live, "build_empty_gpt", building),
        patch.object(live, "redistribute", moving),
    ):
        yield held


def _prune(chunks, config: ModelConfig, plan: Plan, parallel: ParallelConfig, groups, folder: str):
    from nemo_minitron.families.registry import family_of
    from nemo_minitron.models.prune_live import prune_live
    from nemo_minitron.models.weights import save_weights
    from nemo_minitron.pruning.exchange import Traffic

    traffic = Traffic()
    before = _held(p for chunk in chunks for p in chunk.parameters())
    layer = _held(chunks[0].decoder.layers[0].parameters())
    with _watching_memory(chunks) as held:
        small, pruned = prune_live(
            chunks, family_of(config), config, plan, parallel, groups, traffic
        )
    after = [p for chunk in small for p in chunk.parameters()]
    result = {
        "bytes": traffic.bytes_sent,
        "layers": [[layer.layer_number - 1 for layer in c.decoder.layers] for c in small],
        "shapes": {
            f"{i}.{n}": p.shape for i, c in enumerate(small) for n, p in c.named_parameters()
        },
        "bytes_left": _held(p for chunk in chunks for p in chunk.parameters()),
        "bytes_before": before,
        "bytes_peak": max(held, default=0),
        "bytes_layer": layer,
        # Nothing larger than the parameter itself is kept alive by it.
        "bytes_after": _held(after),
        "bytes_weights": sum(p.nbytes for p in after),
    }
    if dist.get_rank() == 0:
        Path(folder).mkdir(parents=True)
    dist.barrier()
    save_weights(small, groups, pruned, Path(folder))
    return small, result


def score_and_prune(
    config: ModelConfig,
    folder: str,
    ids: torch.Tensor,
    parallel: ParallelConfig,
    prunings: dict[str, PruningConfig],
    out: str,
) -> Result:
    """Scores of a checkpoint; the model pruned in every way, run, and saved under ``out``."""
    groups = _start(parallel)
    chunks = _load(config, folder, parallel, groups)
    scores = _score(chunks, config, groups, ids, global_batch_size=len(ids))
    result: Result = {"scores": scores, "place": (groups.pp.rank(), groups.tp.rank())}
    for kind, pruning in prunings.items():
        plan = make_plan(config, pruning, scores)
        chunks = _load(config, folder, parallel, groups)
        small, found = _prune(chunks, config, plan, parallel, groups, f"{out}/{kind}")
        result[kind] = {"plan": plan, "logits": _logits(small, groups, ids), **found}
    return result


def logits_at(
    config: ModelConfig,
    folder: str,
    ids: torch.Tensor,
    parallel: ParallelConfig,
    double: bool = False,
) -> torch.Tensor | None:
    """Logits of a checkpoint loaded at a layout; ``double`` computes in fp64 (one rank)."""
    groups = _start(parallel)
    chunks = _load(config, folder, parallel, groups)
    if double:
        for chunk in chunks:
            chunk.double()
    return _logits(chunks, groups, ids)


def refused(
    config: ModelConfig, folder: str, parallel: ParallelConfig, plan: Plan
) -> tuple[str, bool]:
    """Return the error of live pruning, and whether the model is unchanged."""
    from nemo_minitron.families.registry import family_of
    from nemo_minitron.models.prune_live import prune_live

    groups = _start(parallel)
    chunks = _load(config, folder, parallel, groups)
    before = [p.detach().clone() for chunk in chunks for p in chunk.parameters()]
    try:
        prune_live(chunks, family_of(config), config, plan, parallel, groups)
    except ValueError as error:
        after = [p for chunk in chunks for p in chunk.parameters()]
        return str(error), all(map(torch.equal, before, after))
    return "", False


def refused_scoring(
    config: ModelConfig, folder: str, ids: torch.Tensor, parallel: ParallelConfig, batch: int
) -> str:
    """Return the error of scoring with a global batch size."""
    groups = _start(parallel)
    try:
        _score(_load(config, folder, parallel, groups), config, groups, ids, batch)
    except ValueError as error:
        return str(error)
    return ""


def gradients_after_pruning(
    config: ModelConfig, folder: str, ids: torch.Tensor, parallel: ParallelConfig, plan: Plan
) -> None:
    """A pruned model takes a backward pass, under Megatron's DDP as in training."""
    from nemo_minitron.config.training import OptimConfig
    from nemo_minitron.families.registry import family_of
    from nemo_minitron.models.optim import wrap_ddp
    from nemo_minitron.models.prune_live import prune_live
    from nemo_minitron.models.schedule import run_schedule

    groups = _start(parallel)
    chunks = _load(config, folder, parallel, groups)
    small, _ = prune_live(chunks, family_of(config), config, plan, parallel, groups)
    positions = torch.arange(ids.size(1)).expand_as(ids).contiguous()
    batch = {"tokens": ids, "labels": ids, "loss_mask": ids, "position_ids": positions}
    wrapped = wrap_ddp(small, OptimConfig())

    def loss(index: int, batch: dict[str, torch.Tensor], logits: torch.Tensor):
        return logits.square().sum(), torch.tensor(1, dtype=torch.int32), {}

    run_schedule(wrapped, [batch], loss, forward_only=False)
    for chunk in small:
        for name, parameter in chunk.named_parameters():
            assert parameter.main_grad.shape == parameter.shape, name
            assert parameter.main_grad.any(), name


def exchange_rows(dtype: torch.dtype) -> None:
    """Rows and whole tensors change hands in one batch."""
    from nemo_minitron.pruning.exchange import Move, Traffic, Transfer, plan_transfers, redistribute

    me, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    rows = torch.arange(8)
    table = rows[:, None] * torch.ones(1, 3, dtype=torch.long)
    owned = {0: rows[:4], 1: rows[4:]}
    wanted = {0: torch.tensor([1, 4]), 1: torch.tensor([6, 2])}
    moves = {
        "columns": Move(1, plan_transfers(owned, wanted)),
        "whole": Move(0, [Transfer(0, 1)]),
    }
    local = {"columns": table[owned[me]].T.to(dtype), "whole": table.to(dtype)}
    out = {"columns": torch.empty(3, 2, dtype=dtype), "whole": torch.empty(8, 3, dtype=dtype)}
    traffic = Traffic()
    redistribute(local, out, moves, group, traffic)
    assert torch.equal(out["columns"], table[wanted[me]].T.to(dtype))
    if me == 1:
        assert torch.equal(out["whole"], table.to(dtype))
    sent = 3 + 24 if me == 0 else 3
    assert traffic == Traffic(bytes_sent=sent * dtype.itemsize, messages=2 - me)
