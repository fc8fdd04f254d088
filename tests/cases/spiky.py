"""Task for the rank pool: a training one of whose batches gives a spike, or no number."""

import math
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.config.parallel import ParallelConfig
from tests.cases.kd import model_cfg
from tests.helpers.tiny import LLAMA, token_batch

STEPS, BATCH, SEQ, BAD = 6, 4, 16, 3
"""The batch ``BAD`` (counted from 0) is the bad one."""


def train(
    weights: str, work: str, bad: str | None, trainer: dict[str, Any]
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]] | str:
    """Train with or without the bad batch; one of its samples is bad, so one rank has it.

    Args:
        weights: checkpoint folder of the model.
        work: for ``fit``; may hold checkpoints to go on from.
        bad: None leaves the batch out of the data; ``spike``, ``loss`` or ``gradient`` says what is
            wrong with it.
        trainer: further keys.

    Returns:
        The history and the weights, or the error.
    """
    from nemo_minitron.data.samples import NpyDataset
    from nemo_minitron.models.gpt import MinitronGPTModel
    from nemo_minitron.models.training import fit
    from nemo_minitron.runtime.launch import init_model_parallel

    ids = token_batch(STEPS * BATCH, SEQ - 1, LLAMA.vocab_size)
    marked = ids[BAD * BATCH + 1]

    class Spiky(MinitronGPTModel):
        def loss(self, batch, hidden, teacher):
            total, sums = super().loss(batch, hidden, teacher)
            if bad is None or not torch.equal(batch["tokens"][0, : SEQ - 1], marked[:-1]):
                return total, sums
            factor = {"spike": 50.0, "loss": math.nan, "gradient": math.nan}[bad]
            ce = sums.ce if bad == "gradient" else sums.ce * factor
            return total * factor, sums._replace(ce=ce)

    init_model_parallel(ParallelConfig())
    steps = STEPS - (bad is None)
    keys = {"max_steps": steps, "limit_val_batches": 0, "save_every_n_steps": 0, **trainer}
    cfg = model_cfg(LLAMA, None, ParallelConfig(), trainer=keys)
    cfg.optim.update({"lr": 1e-3, "min_lr": 1e-3, "lr_decay_style": "constant"})
    cfg.exp_manager = {}
    model = Spiky(cfg)
    model.load(Path(weights))
    if bad is None:
        ids = torch.cat([ids[: BAD * BATCH], ids[(BAD + 1) * BATCH :]])
    try:
        history = fit(model, [(NpyDataset(ids.numpy(), len(ids)), None)], Path(work))
    except ValueError as error:
        return str(error)
    named = [pair for chunk in model.chunks for pair in chunk.named_parameters()]
    return history, {name: parameter.detach().clone() for name, parameter in named}
