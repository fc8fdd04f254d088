"""Tasks for the rank pool: what layers for multi-token prediction say."""

import torch
import torch.distributed as dist

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from tests.cases.live import _load, _start


@torch.no_grad()
def prediction_logits(
    config: ModelConfig, folder: str, ids: torch.Tensor, parallel: ParallelConfig
) -> list[torch.Tensor] | None:
    """``[samples, s, v]`` logits of the next token and of the one after it; last stage only."""
    from nemo_minitron.models.prediction import final_states
    from nemo_minitron.models.schedule import run_schedule

    groups = _start(parallel)
    chunks = _load(config, folder, parallel, groups)
    for chunk in chunks:
        chunk.eval()
        chunk.return_hidden = True
    samples, length = ids.shape
    positions = torch.arange(length).expand(samples, length).contiguous()

    def whole(hidden: torch.Tensor) -> torch.Tensor:
        local = chunks[-1].output_layer(hidden)[0].transpose(0, 1).contiguous()
        shards = [torch.empty_like(local) for _ in range(groups.tp.size())]
        dist.all_gather(shards, local, group=groups.tp)
        return torch.cat(shards, dim=-1)[..., : config.vocab_size]

    found = run_schedule(
        chunks,
        [{"tokens": ids, "labels": ids, "loss_mask": ids, "position_ids": positions}],
        lambda i, b, hidden: [whole(state) for state in final_states(chunks[-1], hidden)],
        forward_only=True,
        collect_outputs=True,
    )
    return found[0] if found else None
