"""The streaming executor: a plan applied to a checkpoint on disk, tensor by tensor."""

import shutil
from functools import partial
from pathlib import Path

from nemo_minitron.checkpoint.lazy import on_done, on_read, refuse_nonfinite
from nemo_minitron.checkpoint.torch_dist import read_torch_dist, write_torch_dist
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.registry import family_of
from nemo_minitron.pruning.compensate import Compensation
from nemo_minitron.pruning.plan import Plan, pruned_config
from nemo_minitron.pruning.slicing import prune_store
from nemo_minitron.runtime.console import progress


def prune_checkpoint(
    source: Path,
    config: ModelConfig,
    plan: Plan,
    folder: Path,
    workers: int,
    compensation: Compensation | None = None,
) -> None:
    """Lazy store in, lazy store out, one writer: no model is built, no process group needed.

    Args:
        source: ``checkpoint/`` of a result.
        config: its model.
        plan: what to keep.
        folder: to create; gets weights, ``model.yaml`` and the tokenizer.
        workers: tensors in flight.
        compensation: how what is left makes up for what is cut.
    """
    family, small = family_of(config), pruned_config(config, plan)
    whole = on_read(
        read_torch_dist(source, family, config), partial(refuse_nonfinite, key="checkpoint")
    )
    store = prune_store(family, config, plan, whole, compensation)
    folder.mkdir()
    with progress("pruning tensors", len(store)) as advance:
        counted = on_done(store, advance)
        write_torch_dist(folder, counted, family, small, workers=workers)
    small.save(folder)
    if (source / "tokenizer").is_dir():
        shutil.copytree(source / "tokenizer", folder / "tokenizer")
