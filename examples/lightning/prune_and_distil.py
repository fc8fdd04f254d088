"""A script of Lightning and NeMo: a model is trained, scored, pruned, and taught by what it was.

Its data are numbers that go up by a step of their own, which a small model learns in seconds.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from omegaconf import OmegaConf

import nemo_minitron
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import TeacherParallelConfig
from nemo_minitron.config.training import DataConfig, OptimConfig, TrainerConfig
from nemo_minitron.data.datasets import NpyDataset
from nemo_minitron.data.sampler import build_dataloader
from nemo_minitron.models.distill import DistillationGPTModel
from nemo_minitron.models.gpt import MinitronGPTModel
from nemo_minitron.models.lightning import MegatronStrategy
from nemo_minitron.runtime.launch import device, distributed

LAYOUT, LENGTH, NUMBERS = nemo_minitron.ParallelConfig(), 16, 32
TARGETS = {"hidden_size": 48, "ffn_hidden_size": 64, "num_layers": 3}
SIZES = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4}
SIZES |= {"num_query_groups": 2, "kv_channels": 16, "vocab_size": NUMBERS}
TEACHER = ModelConfig(family="llama", **SIZES, max_position_embeddings=LENGTH)


def settings(gpt: ModelConfig, steps: int, **more: Any) -> Any:
    """The config of a model has one entry for each of these dataclasses."""
    data = DataConfig(path="-", micro_batch_size=16, global_batch_size=32, seq_length=LENGTH)
    parts = {"gpt": gpt, "parallel": LAYOUT, "data": data, **more}
    parts["trainer"] = TrainerConfig(max_steps=steps, precision="32")
    parts["optim"] = OptimConfig(lr=5e-3, min_lr=5e-4)
    entries = {name: asdict(part) for name, part in parts.items()}
    return OmegaConf.create({**entries, "chunk_size": 512})


def give_samples(model: MinitronGPTModel) -> None:
    """Each data-parallel rank reads its share."""
    first, step = np.random.default_rng(0).integers(1, [[NUMBERS], [6]], (2, 4096))
    rows = (first[:, None] + step[:, None] * np.arange(LENGTH)) % NUMBERS
    share = {"dp_rank": model.groups.dp.rank(), "dp_size": model.groups.dp.size()}
    training, validation = NpyDataset(rows[64:], 1 << 20), NpyDataset(rows[:64], 64)
    model.set_loaders(
        build_dataloader(training, model.data_cfg, drop_last=True, **share),
        build_dataloader(validation, model.data_cfg, drop_last=False, **share),
    )


def trainer(model: MinitronGPTModel) -> Trainer:
    """Lightning's, with a strategy that leaves everything between ranks to Megatron."""
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return Trainer(
        strategy=MegatronStrategy(device()),
        max_steps=model.trainer_cfg.max_steps,
        limit_val_batches=2,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **dict.fromkeys(off, False),
    )


def loss(model: MinitronGPTModel) -> float:
    """Cross entropy per token of the samples for validation."""
    (found,) = trainer(model).validate(model, verbose=False)
    return found["val_loss"]


def main(folder: Path) -> None:
    """Print the loss of the teacher, and of the student before and after its training."""
    teacher = MinitronGPTModel(settings(TEACHER, 100))
    give_samples(teacher)
    for parameter in (p for p in teacher.parameters() if p.dim() > 1):
        torch.nn.init.normal_(parameter, std=0.1)
    trainer(teacher).fit(teacher)
    with nemo_minitron.score(teacher.chunks) as scores:
        print(f"teacher {loss(teacher):.3f}")
    teacher.save(folder / "teacher")
    plan = nemo_minitron.make_plan(scores, TARGETS)
    nemo_minitron.prune_checkpoint(folder / "teacher", plan, folder / "pruned")
    roles = {"teacher": TEACHER, "teacher_parallel": TeacherParallelConfig()}
    roles["distillation"] = nemo_minitron.DistillationConfig()
    small = ModelConfig.load(folder / "pruned")
    student = DistillationGPTModel(settings(small, 60, **roles))
    give_samples(student)
    student.load(folder / "pruned")
    student.load_teacher(folder / "teacher")
    print(f"pruned {loss(student):.3f}")
    trainer(student).fit(student)
    print(f"distilled {loss(student):.3f}")
    nemo_minitron.export(student.chunks, folder / "exported")


if __name__ == "__main__":
    with distributed(LAYOUT):
        main(Path(sys.argv[1]))
