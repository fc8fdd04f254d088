"""Tasks for the rank pool: losses and gradients of models spread over ranks."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import DistillationConfig
from nemo_minitron.config.training import DataConfig, OptimConfig, TrainerConfig
from tests.tiny import token_batch


def model_cfg(
    student: ModelConfig, teacher: ModelConfig | None, parallel: ParallelConfig, **over: Any
) -> Any:
    """Config of a (distillation) model."""
    keys = {"max_steps": 2, "precision": over.pop("precision", "32"), **over.pop("trainer", {})}
    trainer = TrainerConfig(**keys)
    cfg = {
        "gpt": asdict(student),
        "parallel": asdict(parallel),
        "data": asdict(
            DataConfig(path="-", seq_length=16, micro_batch_size=1, global_batch_size=4)
        ),
        "trainer": asdict(trainer),
        "optim": asdict(OptimConfig()),
        "chunk_size": 8,
    }
    if teacher is not None:
        cfg["teacher"] = asdict(teacher)
        cfg["distillation"] = asdict(DistillationConfig(chunk_size=7, **over))
    return OmegaConf.create(cfg)


def batches(samples: int, seq: int, vocab: int) -> list[dict[str, torch.Tensor]]:
    """Micro-batches of one sample each; a few tokens are masked."""
    ids = token_batch(samples, seq, vocab)
    out = []
    for row in ids:
        mask = torch.ones(1, seq)
        mask[0, :: 5 + int(row[0]) % 3] = 0.0
        out.append(
            {
                "tokens": row[None, :-1],
                "labels": row[None, 1:],
                "loss_mask": mask,
                "position_ids": torch.arange(seq)[None],
            }
        )
    return out


def kd_gradients(
    student: tuple[ModelConfig, str],
    teacher: tuple[ModelConfig, str],
    parallel: ParallelConfig,
    out: str,
    over: dict[str, Any],
) -> list[float]:
    """One global batch forward and backward; gradients are saved to ``out`` as a checkpoint.

    Returns the ``[KD, CE, tokens]`` sums.
    """
    from nemo_minitron.models.distill import DistillationGPTModel
    from nemo_minitron.models.optim import build_optimizer, wrap_ddp
    from nemo_minitron.models.schedule import on_this_cp_rank
    from nemo_minitron.models.weights import save_weights
    from nemo_minitron.runtime.launch import init_model_parallel

    init_model_parallel(parallel)
    model = DistillationGPTModel(model_cfg(student[0], teacher[0], parallel, **over))
    model.load(Path(student[1]))
    model.load_teacher(Path(teacher[1]))
    optim = replace(model.optim_cfg, use_distributed_optimizer=False)
    model.model = torch.nn.ModuleList(wrap_ddp(model.chunks, optim))
    build_optimizer(list(model.model), optim, model.trainer_cfg)
    for chunk in model.model:
        chunk.zero_grad_buffer()
    dp = model.groups.dp
    mine = batches(4, 16, student[0].vocab_size)[dp.rank() :: dp.size()]
    sums = model.forward_backward([on_this_cp_rank(batch, model.groups) for batch in mine])
    for chunk in model.chunks:
        for parameter in chunk.parameters():
            parameter.data = parameter.main_grad.clone()
    folder = Path(out)
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    save_weights(model.chunks, model.groups, student[0], folder)
    return sums.tolist()
