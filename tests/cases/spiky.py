"""Task for the rank pool: a training with batches that give a spike, or no number."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.config.distillation import IntermediateConfig
from nemo_minitron.config.parallel import ParallelConfig
from tests.cases.kd import model_cfg
from tests.helpers.tiny import LLAMA, token_batch

STEPS, BATCH, SEQ, BAD = 6, 4, 16, 3
"""The batch ``BAD`` (counted from 0) is the bad one."""
TEACHER = replace(LLAMA, num_layers=2, hidden_size=48)
INNER = IntermediateConfig(losses=["embedding", "block_output"], layer_map=[[1, 2]])


def train(
    weights: str,
    work: str,
    bad: str | None,
    trainer: dict[str, Any],
    batches: Sequence[int] = (BAD,),
    steps: int = STEPS,
    parallel: dict[str, Any] | None = None,
    optim: dict[str, Any] | None = None,
    teacher: str | None = None,
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]] | str:
    """Train with or without the bad batches; one sample of each is bad, so one rank has it.

    Args:
        weights: checkpoint folder of the model.
        work: for ``fit``; may hold checkpoints to go on from.
        bad: None leaves the batches out of the data; ``spike``, ``loss``, ``gradient`` or ``slow``
            says what is wrong with them.
        trainer: further keys.
        batches: which ones, counted from 0.
        steps: of the training with them.
        parallel: keys of the layout.
        optim: further keys.
        teacher: checkpoint folder of ``TEACHER``, whose logits and inner states are learnt then.

    Returns:
        The history and the weights, or what it ended with.
    """
    from nemo_minitron.data.samples import NpyDataset
    from nemo_minitron.models.distill import DistillationGPTModel
    from nemo_minitron.models.gpt import MinitronGPTModel
    from nemo_minitron.models.training import fit
    from nemo_minitron.runtime.errors import Preempted
    from nemo_minitron.runtime.launch import init_model_parallel

    ids = token_batch(steps * BATCH, SEQ - 1, LLAMA.vocab_size)
    marked = ids[[index * BATCH + 1 for index in batches], :-1]

    base: Any = DistillationGPTModel if teacher else MinitronGPTModel

    class Spiky(base):
        def loss(self, batch, hidden, teacher):
            total, sums = super().loss(batch, hidden, teacher)
            if bad is None or not (batch["tokens"][:, : SEQ - 1] == marked).all(1).any():
                return total, sums
            time.sleep(0.5 if bad == "slow" else 0.0)
            factor = {"spike": 50.0, "slow": 1.0}.get(bad, math.nan)
            seen = 1.0 if bad == "gradient" else factor
            return total * factor, sums._replace(ce=sums.ce * seen, kd=sums.kd * seen)

    layout = ParallelConfig(**(parallel or {}))
    init_model_parallel(layout)
    steps -= len(batches) * (bad is None)
    keys = {"max_steps": steps, "limit_val_batches": 0, "save_every_n_steps": 0, **trainer}
    inner = {"intermediate": INNER} if teacher else {}
    cfg = model_cfg(LLAMA, TEACHER if teacher else None, layout, trainer=keys, **inner)
    constant = {"lr": 1e-3, "min_lr": 1e-3, "lr_decay_style": "constant"}
    cfg.optim.update({**constant, **(optim or {})})
    cfg.exp_manager = {}
    model = Spiky(cfg)
    model.load(Path(weights))
    if teacher:
        model.load_teacher(Path(teacher))
    if bad is None:
        kept = [i for i in range(len(ids)) if i // BATCH not in batches]
        ids = ids[kept]
    try:
        history = fit(model, [(NpyDataset(ids.numpy(), len(ids)), None)], Path(work))
    except (ValueError, Preempted) as error:
        return str(error)
    named = [pair for chunk in model.chunks for pair in chunk.named_parameters()]
    return history, {name: parameter.detach().clone() for name, parameter in named}
