"""Tasks for the rank pool: everything that a model family is tested for at one layout."""

from pathlib import Path
from typing import Any

import torch

from nemo_minitron.config.balance import balanced_layout
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.families.registry import family_of
from nemo_minitron.pruning.plan import Plan
from tests.cases.live import _load, _logits, _score, _start


def family_at(
    folders: dict[str, str], plan: Plan, ids: torch.Tensor, parallel: ParallelConfig
) -> dict[str, Any]:
    """Logits of several checkpoints; scores of "whole", and how it differs from "several" pruned.

    Args:
        folders: name -> result folder.
        plan: what makes "several" of "whole".
        ids: ``[samples, s]`` tokens.
        parallel: the layout.
    """
    from nemo_minitron.models.prune_live import prune_live

    groups = _start(parallel)
    result: dict[str, Any] = {"logits": {}}
    models = {}
    whole = ModelConfig.load(Path(folders["whole"]) / "checkpoint")
    for name, folder in folders.items():
        checkpoint = Path(folder) / "checkpoint"
        config = ModelConfig.load(checkpoint)
        layout = balanced_layout(whole, config, parallel)
        models[name] = config, _load(config, str(checkpoint), layout, groups)
        result["logits"][name] = _logits(models[name][1], groups, ids)
    config, chunks = models["whole"]
    result["names"] = [
        name for chunk in chunks for name in chunk.state_dict() if "extra" not in name
    ]
    batch = len(ids) + len(ids) % (parallel.data_parallel_size or 1)
    result["scores"] = _score(chunks, config, groups, ids, batch)
    small, pruned = prune_live(chunks, family_of(config), config, plan, parallel, groups)
    assert pruned == models["several"][0]
    layout = balanced_layout(config, pruned, parallel)
    several = _load(pruned, str(Path(folders["several"]) / "checkpoint"), layout, groups)
    streamed = dict(torch.nn.ModuleList(several).named_parameters())
    live = dict(torch.nn.ModuleList(small).named_parameters())
    assert live.keys() == streamed.keys()
    result["differ"] = [name for name in live if not torch.equal(live[name], streamed[name])]
    return result
