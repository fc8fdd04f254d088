"""Tasks for the rank pool: intermediate losses on models spread over ranks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from tests.cases.kd import batches, loaded, model_cfg, zero_gradients

Member = tuple[ModelConfig, str]


def built(student: Member, teacher: Member, parallel: ParallelConfig, over: dict[str, Any]) -> Any:
    """Model with weights, gradient buffers and optimizer."""
    from nemo_minitron.runtime.launch import init_model_parallel

    init_model_parallel(parallel)
    over = dict(over)
    sharded, recompute = over.pop("sharded", False), over.pop("recompute", {})
    model = loaded(model_cfg(student[0], teacher[0], parallel, **over), student, teacher)
    model.optim_cfg = replace(model.optim_cfg, use_distributed_optimizer=sharded, lr=1e-2)
    for name, value in recompute.items():
        setattr(model.last_chunk.config, name, value)
    for chunk in model.chunks:
        for layer in chunk.decoder.layers:
            layer.self_attention.checkpoint_core_attention = (
                recompute.get("recompute_granularity") == "selective"
            )
    model.configure_optimizers()
    return model


def step(model: Any, seed: int = 0, targets: float = 1.0) -> Any:
    """Gradients of one global batch; returns its ``StepSums``. ``targets=0`` masks every token."""
    from nemo_minitron.models.objective import on_host
    from nemo_minitron.models.schedule import on_this_cp_rank

    for chunk in model.model:
        chunk.train()
    zero_gradients(model)
    dp = model.groups.dp
    mine = batches(4, 16, model.gpt.vocab_size, seed)[dp.rank() :: dp.size()]
    for batch in mine:
        batch["loss_mask"] *= targets
    sums = model.forward_backward([on_this_cp_rank(batch, model.groups) for batch in mine])
    return on_host(sums)


def inter_gradients(
    student: Member, teacher: Member, parallel: ParallelConfig, out: str, over: dict[str, Any]
) -> dict[str, Any]:
    """Losses and gradients; those of the model are saved to ``out`` as a checkpoint.

    Returns the sums, what a step logs, and the gradient of every copy of the projection here.
    """
    from nemo_minitron.models.weights import save_weights

    model = built(student, teacher, parallel, over)
    sums = step(model)
    copies = [(copy.copy, copy.weight.main_grad.clone()) for copy in model.intermediate.projections]
    for chunk in model.chunks:
        for parameter in chunk.parameters():
            parameter.data = parameter.main_grad.clone()
    folder = Path(out)
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    save_weights(model.chunks, model.groups, student[0], folder)
    return {"sums": list(sums), "losses": model.step_losses(sums), "copies": copies}


def without_targets(
    student: Member, teacher: Member, parallel: ParallelConfig, over: dict[str, Any]
) -> tuple[tuple[dict[str, float], float], tuple[float, float]]:
    """Return log and gradient norm of a batch without targets, and alpha around a later one."""
    model = built(student, teacher, parallel, over)
    logged = model.step_losses(step(model, targets=0.0))
    norm = sum(float(p.main_grad.norm()) for chunk in model.chunks for p in chunk.parameters())
    step(model)
    before = model.alpha.value.item()
    step(model, targets=0.0)
    return (logged, norm), (model.alpha.value.item(), before)


def train(
    student: Member,
    teacher: Member,
    parallel: ParallelConfig,
    over: dict[str, Any],
    folder: str,
    save_after: int,
    steps: int,
) -> list[dict[str, Any]]:
    """Steps with an optimizer; saved after ``save_after`` of them, or begun from that save (0).

    Returns per step the logged losses, gradient norm and copies of the projection.
    """
    from megatron.core import dist_checkpointing

    model = built(student, teacher, parallel, over)
    path = Path(folder)
    first = 0
    if save_after == 0:
        model.check_training_checkpoint(path)
        state = dist_checkpointing.load(model.training_state(is_loading=True), folder)
        model.load_training_state(state)
        first = state["done"]
    records = []
    for number in range(first, steps):
        sums = step(model, seed=number)
        _, norm, _ = model._megatron.step()
        model._lr_scheduler.step(increment=1)
        projections = model.intermediate.projections if model.intermediate else []
        copies = [copy.weight.detach().clone() for copy in projections]
        records.append({**model.step_losses(sums), "norm": norm, "copies": copies})
        if number + 1 == save_after:
            if torch.distributed.get_rank() == 0:
                path.mkdir(parents=True)
            torch.distributed.barrier()
            saved = model.training_state(is_loading=False)
            dist_checkpointing.save({**saved, "done": number + 1}, folder)
    return records
