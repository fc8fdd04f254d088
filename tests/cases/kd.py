"""Tasks for the rank pool: losses and gradients of models spread over ranks."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from nemo_minitron.checkpoint.torch_dist import read_torch_dist
from nemo_minitron.config.distillation import DistillationConfig
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig, TeacherParallelConfig
from nemo_minitron.config.training import DataConfig, OptimConfig, TrainerConfig
from nemo_minitron.families.registry import family_of
from tests.helpers.tiny import token_batch


def model_cfg(
    student: ModelConfig, teacher: ModelConfig | None, parallel: ParallelConfig, **over: Any
) -> Any:
    """Config of a (distillation) model."""
    split = TeacherParallelConfig(**over.pop("teacher_parallel", {}))
    keys = {"max_steps": 2, "precision": over.pop("precision", "32"), **over.pop("trainer", {})}
    trainer = TrainerConfig(**keys)
    megatron = over.pop("megatron", {})
    cfg = {
        "gpt": asdict(student),
        "parallel": asdict(parallel),
        "data": asdict(
            DataConfig(path="-", seq_length=16, micro_batch_size=1, global_batch_size=4)
        ),
        "trainer": asdict(trainer),
        "optim": asdict(OptimConfig()),
        "megatron": megatron,
        "chunk_size": 8,
    }
    if teacher is not None:
        cfg["teacher"] = asdict(teacher)
        cfg["teacher_parallel"] = asdict(split)
        cfg["distillation"] = asdict(DistillationConfig(**{"chunk_size": 7, **over}))
    return OmegaConf.create(cfg)


def batches(samples: int, seq: int, vocab: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Micro-batches of one sample each; a few tokens are masked."""
    ids = token_batch(samples, seq, vocab, seed)
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


def loaded(cfg: Any, student: tuple[ModelConfig, str], teacher: tuple[ModelConfig, str]) -> Any:
    """The distillation model of a config, with its weights and its teacher's."""
    from nemo_minitron.models.distill import DistillationGPTModel

    model = DistillationGPTModel(cfg)
    model.load(Path(student[1]))
    model.load_teacher(Path(teacher[1]))
    return model


def wrap(model: Any, **over: Any) -> None:
    """Do what ``fit`` does before the first step; ``over`` changes the optimizer's config."""
    from nemo_minitron.models.optim import build_optimizer, wrap_ddp

    optim = replace(model.optim_cfg, **over)
    model.model = torch.nn.ModuleList(wrap_ddp(model.chunks, optim))
    build_optimizer(list(model.model), optim, model.trainer_cfg)


def zero_gradients(model: Any) -> None:
    """Clear the gradient buffers, as Megatron's DDP needs before each step."""
    for chunk in model.model:
        chunk.zero_grad_buffer()


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
    return kd_gradients_of_kinds(student, teacher, parallel, {out: over})[0]


def kd_gradients_of_kinds(
    student: tuple[ModelConfig, str],
    teacher: tuple[ModelConfig, str],
    parallel: ParallelConfig,
    kinds: dict[str, dict[str, Any]],
) -> list[list[float]]:
    """``kd_gradients`` of one model for several losses: folder -> keys of the loss.

    Other keys (``precision``) are those of the first entry.
    """
    from nemo_minitron.models.objective import on_host
    from nemo_minitron.models.schedule import on_this_cp_rank
    from nemo_minitron.runtime.launch import init_model_parallel

    init_model_parallel(parallel)
    first = next(iter(kinds.values()))
    model = loaded(model_cfg(student[0], teacher[0], parallel, **first), student, teacher)
    wrap(model, use_distributed_optimizer=False)
    dp = model.groups.dp
    mine = batches(4, 16, student[0].vocab_size)[dp.rank() :: dp.size()]
    mine = [on_this_cp_rank(batch, model.groups) for batch in mine]
    found = []
    for out, over in kinds.items():
        if over is not first:
            model.distillation = DistillationConfig(**{"chunk_size": 7, **over})
        zero_gradients(model)
        found.append(list(on_host(model.forward_backward(mine))))
        save_gradients(model, Path(out), student[0])
    return found


def save_gradients(model: Any, folder: Path, config: ModelConfig) -> None:
    """Write the gradients of the model as a checkpoint (collective)."""

    from nemo_minitron.models.weights import save_weights

    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    weights = [parameter.data for chunk in model.chunks for parameter in chunk.parameters()]
    parameters = [parameter for chunk in model.chunks for parameter in chunk.parameters()]
    for parameter in parameters:
        parameter.data = parameter.main_grad.clone()
    save_weights(model.chunks, model.groups, config, folder)
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data = weight


def read_gradients(folder: Path, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Read what ``kd_gradients`` saved: Megatron name -> global gradient."""
    store = read_torch_dist(folder, family_of(config), config)
    return {name: tensor.read() for name, tensor in store.items()}


class _MaskedSamples(torch.utils.data.Dataset):
    """Two samples a step; those of step ``masked`` (from 0) have no target token."""

    def __init__(self, steps: int, masked: int, vocab: int) -> None:
        self.samples = [
            {key: value[0] for key, value in batch.items()}
            for batch in batches(2 * steps, 16, vocab)
        ]
        for sample in self.samples[2 * masked : 2 * masked + 2]:
            sample["loss_mask"].zero_()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.samples[index]


def train_with_masked_step(
    student: tuple[ModelConfig, str],
    teacher: tuple[ModelConfig, str],
    parallel: ParallelConfig,
    work: str,
) -> tuple[list[float], list[float]]:
    """Three steps with weight decay, the second one without target tokens.

    Returns how far the weights and Adam's moments moved in each step (this rank), and the losses.
    """
    from nemo_minitron.models.distill import DistillationGPTModel
    from nemo_minitron.models.phases import Course
    from nemo_minitron.models.training import _checkpoint_callbacks, _trainer
    from nemo_minitron.runtime.launch import init_model_parallel

    init_model_parallel(parallel)
    cfg = model_cfg(student[0], teacher[0], parallel)
    cfg.data.global_batch_size = 2
    cfg.trainer.update(max_steps=3, log_every_n_steps=1, save_every_n_steps=0)
    cfg.optim.update(lr=1e-2, lr_warmup_steps=0, weight_decay=0.1)
    moved, losses = [], []

    def state(model: Any) -> torch.Tensor:
        adam = model._megatron.chained_optimizers[0].optimizer.state.values()
        moments = [value for one in adam for value in one.values() if torch.is_tensor(value)]
        weights = [p for chunk in model.chunks for p in chunk.parameters()]
        return torch.cat([t.detach().flatten().double() for t in (*weights, *moments)])

    class Watched(DistillationGPTModel):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            before = state(self)
            super().training_step(batch, batch_idx)
            after = state(self)
            moved.append(float((after[: len(before)] - before).abs().max()))
            losses.append(self.last_metrics["loss"])

    model = Watched(cfg)
    model.load(Path(student[1]))
    model.load_teacher(Path(teacher[1]))
    samples = _MaskedSamples(3, 1, student[0].vocab_size)
    course = Course(model.phases, [(samples, None)])
    model.set_step_loaders(course.training(model.groups, 0), None)
    callbacks = _checkpoint_callbacks(model.trainer_cfg, Path(work))  # write none
    trainer = _trainer(model.trainer_cfg, callbacks, validate=False, max_steps=3)
    trainer.fit(model)
    assert trainer.global_step == 3, "a skipped step counts too"
    return moved, losses
