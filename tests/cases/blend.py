"""Tasks for the rank pool: a training on a blend that notes which samples it read."""

import os
import signal
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.training import DataConfig, TrainerConfig
from tests.cases.kd import model_cfg
from tests.helpers.pool import kill_children
from tests.helpers.tiny import LLAMA

MODEL = replace(LLAMA, num_layers=2)
WEIGHTS = (3, 1, 2, 4, 5)
STEPS, BATCH, SAVED_AT, DIES_AT = 6, 8, 2, 4

Read = tuple[int, int, int, int]
"""Index in the run, source, sample in it, and a hash of its tokens."""


def blend(folder: Path, **keys: Any) -> DataConfig:
    """Five sources, the second of which is read more than once."""
    sources = [{"weight": w, "path": str(folder / f"s{i}")} for i, w in enumerate(WEIGHTS)]
    values = {"seq_length": 16, "split": "80,20", "global_batch_size": BATCH, **keys}
    return DataConfig(path="", blend=sources, **values)


def train(
    folder: str, work: str, parallel: ParallelConfig, data_keys: dict[str, Any], dies: bool
) -> tuple[list[Read], list[dict[str, float]]] | str:
    """``fit`` in ``work``; returns the samples that this rank read and the history.

    Args:
        folder: of the pairs and the weights of the model.
        work: may hold a checkpoint to go on from.
        parallel: the layout.
        data_keys: further keys of the data.
        dies: whether the process kills itself in the middle.

    Returns:
        The error instead, if it was refused.
    """
    from nemo_minitron.data.blend import BlendedSamples
    from nemo_minitron.data.datasets import training_datasets
    from nemo_minitron.models.gpt import MinitronGPTModel
    from nemo_minitron.models.training import fit
    from nemo_minitron.runtime.launch import init_model_parallel

    read: list[Read] = []

    class Noted(BlendedSamples):
        def __getitem__(self, index):
            if dies and index == DIES_AT * BATCH:
                kill_children(os.getpid())
                os.kill(os.getpid(), signal.SIGKILL)
            sample = super().__getitem__(index)
            if index is not None:
                crc = zlib.crc32(sample["tokens"].numpy().tobytes())
                read.append((index, *(int(order[index]) for order in self.order), crc))
            return sample

    init_model_parallel(parallel)
    data = blend(Path(folder), **data_keys)
    trainer = TrainerConfig(
        max_steps=STEPS,
        val_check_interval=3,
        limit_val_batches=1,
        save_every_n_steps=SAVED_AT,
        save_top_k=STEPS,
    )
    cfg = model_cfg(MODEL, None, parallel, trainer=asdict(trainer))
    cfg.data, cfg.exp_manager = asdict(data), {}
    model = MinitronGPTModel(cfg)
    model.load(Path(folder) / "weights")
    samples, held_out = training_datasets(
        data, trainer, MODEL, Path(folder), f"{work}/out", ("train", "validation")
    )
    assert isinstance(samples, BlendedSamples)
    noted = Noted(samples.parts, samples.order, samples.names, samples.held)
    try:
        return read, fit(model, [(noted, held_out)], Path(work))
    except ValueError as error:
        return str(error)
