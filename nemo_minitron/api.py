"""The Python interface: scores, plans, pruning and distillation in programs of your own.

``docs/api.md`` shows it. Models are chunks of Megatron-Core's ``GPTModel`` or ``HybridModel``, one
per virtual pipeline stage, whoever built them; functions that take them are called by every rank.
"""

import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from nemo_minitron.checkpoint.hf import split_shards
from nemo_minitron.config.axes import score_axes
from nemo_minitron.config.model import MODEL_YAML, ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import PruningConfig, ScoreConfig, TargetConfig
from nemo_minitron.families.registry import family_of
from nemo_minitron.importance.calibration import evaluating
from nemo_minitron.importance.estimate import collected
from nemo_minitron.importance.hooks import record
from nemo_minitron.models.build import DTYPES, unwrap
from nemo_minitron.models.found import check_bare, config_of, layout_of
from nemo_minitron.models.prune_live import prune_live
from nemo_minitron.models.weights import load_frozen, save_model
from nemo_minitron.pruning import plan as plans
from nemo_minitron.pruning import slicing
from nemo_minitron.pruning.plan import Plan
from nemo_minitron.pruning.plan_check import check_plan
from nemo_minitron.pruning.scores import Scores, check_axes, check_block_sizes, check_finite
from nemo_minitron.reporting.hf_folder import write_folder
from nemo_minitron.runtime.agreement import agreed, together
from nemo_minitron.runtime.atomic import rename_folder
from nemo_minitron.runtime.groups import ParallelGroups, initialised_degrees

_OWN_PASSES = ("lm_loss", "block_lm_loss")


@contextmanager
def score(
    chunks: Sequence[nn.Module],
    *,
    axes: Sequence[str] | None = None,
    layer_criteria: Sequence[str] = ("block_influence",),
    block_sizes: Sequence[int] = (),
    batch_aggregation: str = "l2",
    seq_aggregation: str = "mean",
    criterion: str = "activation",
) -> Iterator[Scores]:
    """Score a model in the forward passes of the body, which are those of your own loop.

    The model is in evaluation mode and without gradients for as long, and its own afterwards.

    Args:
        chunks: this rank's part of the model, wrapped for training or not.
        axes: what to score, None for everything that the model has.
        layer_criteria: how to score layers: ``block_influence``, ``block_angular``.
        block_sizes: lengths of the blocks that ``block_angular`` scores.
        batch_aggregation: how samples are aggregated: ``l2``, ``mean`` or ``var``.
        seq_aggregation: how the positions of a sample are aggregated.
        criterion: what scores the channels that a linear layer reads, as ``scores.criterion``.

    Yields:
        Scores, empty until the context ends without an error. They are global and the same on every
        rank and layout.

    Raises:
        ValueError: the model, an axis or a criterion is not supported, or nothing ran.
    """
    groups, bare = ParallelGroups.current(), [unwrap(chunk) for chunk in chunks]
    config = agreed(partial(config_of, bare[0]))
    agreed(partial(_refuse_without_layers, bare))
    settings = ScoreConfig(
        axes=score_axes() if axes is None else list(axes),
        layer_criteria=list(layer_criteria),
        block_sizes=list(block_sizes),
        batch_aggregation=batch_aggregation,
        seq_aggregation=seq_aggregation,
        criterion=criterion,
    )
    check_axes(config, settings.axes)
    check_block_sizes(config, settings)
    refused = [name for name in settings.layer_criteria if name in _OWN_PASSES]
    if groups.pp.size() > 1 and settings.layers_by("block_angular"):
        refused.append("block_angular")  # it compares states of all stages as they come
    if refused:
        raise ValueError(
            f"layer_criteria={settings.layer_criteria} holds {refused}, for which the passes have "
            "to be run in an order of their own; use minitron importance for them"
        )
    found = Scores()
    with evaluating(bare), record(bare, groups, settings) as recorders:
        yield found
    seen = torch.tensor([recorders[0].samples, recorders[0].tokens])
    seen = seen.to(next(bare[0].parameters()).device)
    dist.all_reduce(seen, group=groups.dp)
    samples, tokens = seen.tolist()
    if not samples:
        raise ValueError("no forward pass was run while the model was scored")
    result = collected(recorders, config, groups, settings, (samples, tokens))
    check_finite(result)
    found.update(result)
    found.meta = {**result.meta, "config": asdict(config)}


def _refuse_without_layers(chunks: Sequence[Any]) -> None:
    """Refuse a stage that sees no layer, and so can count neither samples nor scores."""
    if not all(len(chunk.decoder.layers) for chunk in chunks):
        raise ValueError(
            "a pipeline stage without a layer of the decoder is not supported for scores; set "
            "pipeline_model_parallel_layout with at least one t in each stage"
        )


def make_plan(
    scores: Scores | None,
    targets: Mapping[str, int] | None = None,
    *,
    model: "Sequence[nn.Module] | Path | str | None" = None,
    drop_layers: Sequence[int] | None = None,
    layer_criterion: str = "block_influence",
    merge_heads: bool = False,
) -> Plan:
    """Choose what to keep.

    Args:
        scores: of ``score`` or of a result of ``minitron importance``; None where only
            ``drop_layers`` is given.
        targets: Megatron's name of a size -> its new value; sizes that are left out stay.
        model: chunks, or a result folder, where the scores do not say what model they are of.
        drop_layers: layers that go, counted from 1.
        layer_criterion: which scores choose the layers that stay.
        merge_heads: whether kept query heads take over what others did.

    Raises:
        ValueError: names the target and what it needs.
    """
    if isinstance(model, str | Path):
        config = ModelConfig.load(_checkpoint(model))
    elif model is not None:
        config = config_of(unwrap(model[0]))
    elif scores is not None and "config" in scores.meta:
        config = ModelConfig(**scores.meta["config"])
    else:
        raise ValueError("these scores do not say what model they are of; give model=")
    pruning = PruningConfig(
        target=TargetConfig(targets or {}),
        drop_layers=None if drop_layers is None else list(drop_layers),
        layer_criterion=layer_criterion,
        merge_heads=merge_heads,
    )
    return plans.make_plan(config, pruning, scores)


def prune(chunks: Sequence[nn.Module], plan: Plan) -> list[Any]:
    """Prune a model in memory.

    Args:
        chunks: this rank's part of the model, not wrapped for training. Its layers are empty
            afterwards.
        plan: what to keep, the same on every rank.

    Returns:
        This rank's part of the smaller model, of the same class, dtype and settings; to be wrapped
        for training as a new one. Layers are spread anew where some are dropped.

    Raises:
        ValueError: the model, the plan or the layout is not supported. The model is untouched then.
    """
    groups = ParallelGroups.current()
    agreed(partial(check_bare, chunks))
    config = agreed(partial(config_of, chunks[0]))
    parallel = agreed(partial(layout_of, chunks[0]))
    small, _ = prune_live(
        list(chunks),  # type: ignore[arg-type]  # any model of Megatron-Core will do
        family_of(config),
        config,
        plan,
        parallel,
        groups,
    )
    return list(small)


def prune_checkpoint(
    source: Path | str, plan: Plan, folder: Path | str, *, workers: int = 1
) -> None:
    """Prune a checkpoint, tensor by tensor, in one process and without building a model.

    Args:
        source: result folder of a stage, or its ``checkpoint/``.
        plan: what to keep.
        folder: to create; gets weights, ``model.yaml`` and the tokenizer.
        workers: tensors in flight.

    Raises:
        ValueError: ``folder`` exists, or the plan is of another model.
    """
    checkpoint = _checkpoint(source)
    config = ModelConfig.load(checkpoint)
    check_plan(config, plan)
    _refuse_existing(Path(folder))
    slicing.prune_checkpoint(checkpoint, config, plan, Path(folder), workers)


def open_model(
    folder: Path | str, *, parallel: ParallelConfig | None = None, dtype: str | None = None
) -> list[Any]:
    """Build this rank's part of a model and load its weights, written at any layout (collective).

    Args:
        folder: result folder of a stage, or its ``checkpoint/``.
        parallel: the initialised layout, where it is more than degrees.
        dtype: of the weights in memory; None is the stored one, ``float32`` on a CPU.

    Returns:
        Chunks of Megatron-Core's GPTModel or HybridModel in evaluation mode.

    Raises:
        ValueError: it is no checkpoint of this package, or does not fit the layout; ``dtype`` is
            unknown.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} must be one of {', '.join(DTYPES)}, or None")
    checkpoint, groups = _checkpoint(folder), ParallelGroups.current()
    config = ModelConfig.load(checkpoint)
    dtype = dtype or (config.dtype if torch.cuda.is_available() else "float32")
    degrees = initialised_degrees()
    layout = parallel or ParallelConfig(**degrees)  # type: ignore[arg-type]  # only one may be None
    chunks = load_frozen(checkpoint, layout, groups, dtype=DTYPES[dtype], prediction=True)
    for chunk in chunks:
        chunk.return_hidden = False
    return list(chunks)


def export(
    model: "Path | str | Sequence[nn.Module]",
    folder: Path | str,
    *,
    max_shard_size: str = "5GB",
    workers: int = 1,
) -> None:
    """Write a Hugging Face folder that ``AutoModelForCausalLM.from_pretrained`` opens.

    Args:
        model: result folder of a stage, or its ``checkpoint/`` (in one process); or this rank's
            part of a model, not wrapped for training (collective; ``folder`` is on a file system
            that all ranks share).
        folder: to create.
        max_shard_size: largest safetensors file.
        workers: tensors in flight.

    Raises:
        ValueError: ``folder`` exists, the model is not supported, a weight is not finite, or the
            folder cannot be written; the same on every rank.
    """
    target = Path(folder)
    if isinstance(model, str | Path):
        _refuse_existing(target)
        checkpoint = _checkpoint(model)
        _refuse_sizes(ModelConfig.load(checkpoint))
        return _write_export(checkpoint, target, max_shard_size, workers)
    groups, first = ParallelGroups.current(), dist.get_rank() == 0
    agreed(partial(check_bare, model))
    config = agreed(partial(config_of, model[0]))
    agreed(partial(_refuse_sizes, config))
    draft = Path(f"{target}.checkpoint")
    agreed(partial(_refuse_existing, *([target, draft] if first else [])))
    agreed(partial(split_shards, {}, max_shard_size))
    try:
        together(partial(draft.mkdir, parents=True) if first else None)
        try:
            chunks: list[Any] = list(model)  # any of Megatron's
            together(partial(save_model, chunks, groups, config, draft))
            write = partial(_write_export, draft, target, max_shard_size, workers)
            together(write if first else None)
        finally:
            if first:
                shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise ValueError(f"export: {error}") from error


def _write_export(checkpoint: Path, target: Path, max_shard_size: str, workers: int) -> None:
    """Write the folder under another name and rename it."""
    title = target.resolve().name
    work = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    work.mkdir(parents=True)
    try:
        write_folder(checkpoint, work, title=title, max_shard_size=max_shard_size, workers=workers)
        rename_folder(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _refuse_sizes(config: ModelConfig) -> None:
    """Refuse a model that no config.json can describe."""
    family_of(config).to_hf(config)


def _refuse_existing(*folders: Path) -> None:
    for folder in folders:
        if folder.exists():
            raise ValueError(f"{folder} exists already; give another folder")


def _checkpoint(folder: Path | str) -> Path:
    """Return ``checkpoint/`` of a result folder, or the folder itself where it is one."""
    inner = Path(folder) / "checkpoint"
    return inner if (inner / MODEL_YAML).is_file() else Path(folder)
