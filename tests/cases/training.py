"""Tasks for the rank pool: training runs of a few steps, from the start or from a checkpoint."""

from pathlib import Path
from typing import Any

import torch

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from tests.cases.kd import model_cfg
from tests.helpers.tiny import token_batch

STEPS = 6
SEQ = 16
GLOBAL_BATCH = 4


def train(
    student: tuple[ModelConfig, str],
    teacher: tuple[ModelConfig, str],
    parallel: ParallelConfig,
    work: str,
    over: dict[str, Any],
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """``fit`` in ``work``, which may hold a checkpoint to go on from.

    Returns the history and the final weights of this rank.
    """
    from nemo_minitron.data.samples import NpyDataset
    from nemo_minitron.models.distill import DistillationGPTModel
    from nemo_minitron.models.training import fit
    from nemo_minitron.runtime.launch import init_model_parallel

    init_model_parallel(parallel)
    flops = over.pop("flops", ())
    model = DistillationGPTModel(training_cfg(student[0], teacher[0], parallel, **over))
    model.load(Path(student[1]))
    model.load_teacher(Path(teacher[1]))
    ids = token_batch(STEPS * GLOBAL_BATCH, SEQ - 1, student[0].vocab_size)
    held_out = token_batch(GLOBAL_BATCH, SEQ - 1, student[0].vocab_size, seed=1)
    datasets = (NpyDataset(ids.numpy(), len(ids)), NpyDataset(held_out.numpy(), len(held_out)))
    history = fit(model, [datasets], Path(work), flops=flops)
    weights = {
        f"{index}.{name}": parameter.detach().clone()
        for index, chunk in enumerate(model.chunks)
        for name, parameter in chunk.named_parameters()
    }
    return history, weights


def left_in_memory(*args: Any) -> list[str]:
    """Types of what Megatron made for ``train(*args)`` and still holds when it is over."""
    import gc

    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer

    train(*args)
    gc.collect()
    kinds = (DistributedDataParallel, MegatronOptimizer, torch.optim.Optimizer)
    return [type(found).__name__ for found in gc.get_objects() if isinstance(found, kinds)]


def found_where_one_rank_sees_less(work: str) -> tuple[str, int]:
    """The checkpoint to go on from, and how many are written at its step when a signal comes.

    Rank 0 sees one of step 3; the others see none yet.
    """
    from types import SimpleNamespace
    from unittest.mock import patch

    import torch.distributed as dist

    from nemo_minitron.models import training
    from nemo_minitron.models.lightning import MegatronStrategy

    first = dist.get_rank() == 0
    seen = [Path(work) / "step=3"] if first else []
    with patch.object(training, "complete_checkpoints", lambda folder: seen):
        newest = training.newest_checkpoint(Path(work))
    written: list[Path] = []
    strategy: Any = MegatronStrategy(torch.device("cpu"))
    trainer: Any = SimpleNamespace(
        strategy=strategy, global_step=3, save_checkpoint=lambda path: written.append(path)
    )
    callback: Any = SimpleNamespace(dirpath=work if first else f"{work}/not_yet")
    training.save_now(trainer, callback)
    return str(newest), len(written)


def log_files(*args: Any) -> tuple[list[str], list[str]]:
    """Log files that ``train(*args)`` wrote, and those that loggers still write to after it."""
    import logging

    train(*args)
    folder = Path(args[3]) / "logs"
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = [handler for logger in loggers for handler in getattr(logger, "handlers", [])]
    open_ = [h.baseFilename for h in handlers if isinstance(h, logging.FileHandler)]
    written = [path.name for path in folder.glob("*.txt")]
    return written, [name for name in open_ if Path(name).is_relative_to(folder)]


def training_cfg(
    student: ModelConfig, teacher: ModelConfig, parallel: ParallelConfig, **over: Any
) -> Any:
    """Config of a run that saves after every step and validates at the last one."""
    trainer = {
        "max_steps": STEPS,
        "val_check_interval": STEPS // 2,
        "limit_val_batches": 1,
        "save_every_n_steps": 1,
        "save_top_k": STEPS,
        **over.pop("trainer", {}),
    }
    optim, data = over.pop("optim", {}), over.pop("data", {})
    loggers = over.pop("exp_manager", {})
    cfg = model_cfg(student, teacher, parallel, trainer=trainer, **over)
    cfg.exp_manager = loggers
    cfg.optim.update({"lr": 1e-2, "min_lr": 1e-3, "lr_warmup_steps": 2, **optim})
    cfg.data.update(data)
    return cfg


def decayed(config: ModelConfig, parallel: ParallelConfig) -> tuple[list[str], list[str]]:
    """Names of the parameters that are decayed, and of those that are not."""
    from nemo_minitron.models.gpt import MinitronGPTModel
    from nemo_minitron.runtime.launch import init_model_parallel

    init_model_parallel(parallel)
    cfg = model_cfg(config, None, parallel)
    cfg.optim.use_distributed_optimizer = False  # its groups hold flat shards, not parameters
    model = MinitronGPTModel(cfg)
    (adapter,) = model.configure_optimizers()
    found: tuple[list[str], list[str]] = ([], [])
    for group in adapter.param_groups:
        ids = {id(parameter) for parameter in group["params"]}
        decay = group["wd_mult"] * cfg.optim.weight_decay
        names = [
            name for chunk in model.chunks for name, p in chunk.named_parameters() if id(p) in ids
        ]
        found[decay == 0].extend(names)
    return found
