"""Inputs and command lines for the tests of what ``minitron`` refuses."""

import contextlib
import io
import logging
import shutil
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_minitron.cli import main
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.llama import LLAMA as FAMILY
from nemo_minitron.pruning.scores import Scores, model_meta
from tests.helpers.data_fixtures import make_texts, save_tokenizer
from tests.helpers.tiny import LLAMA, write_npy

STAGES = (
    "import",
    "importance",
    "prune",
    "teacher_logits",
    "distill",
    "finetune",
    "evaluate",
    "export",
)
SECONDS = 5.0
DATA = {
    "data.path": "{home}/ids.npy",
    "data.seq_length": 16,
    "data.global_batch_size": 4,
}
# A command line that works, for every stage.
KEYS: dict[str, dict[str, object]] = {
    "import": {"source": "{home}/hf"},
    "importance": {"checkpoint": "{home}/model", **DATA, "data.num_samples": 4},
    "prune": {
        "checkpoint": "{home}/model",
        "importance": "{home}/scores",
        "pruning.target.ffn_hidden_size": 48,
    },
    "search": {
        "checkpoint": "{home}/model",
        "importance": "{home}/scores",
        **DATA,
        "data.num_samples": 4,
        "search.ffn_hidden_size": "[48,64]",
    },
    "teacher_logits": {
        "checkpoint": "{home}/model",
        **DATA,
        "trainer.max_steps": 1,
        "trainer.limit_val_batches": 0,
    },
    "distill": {
        "student": "{home}/student",
        "teacher": "{home}/model",
        **DATA,
        "trainer.max_steps": 1,
        "trainer.limit_val_batches": 0,
        "trainer.save_every_n_steps": 0,
    },
    "finetune": {
        "checkpoint": "{home}/model",
        **DATA,
        "trainer.max_steps": 1,
        "trainer.limit_val_batches": 0,
        "trainer.save_every_n_steps": 0,
    },
    "evaluate": {"checkpoint": "{home}/model", **DATA, "data.num_samples": 4},
    "generate": {
        "checkpoint": "{home}/model",
        "prompts": "{home}/prompts.txt",
        "sampling.max_new_tokens": 8,
        "filters.min_tokens": 1,
    },
    "benchmark": {
        "checkpoint": "{home}/model",
        "prompt_length": 8,
        "new_tokens": 2,
        "rounds": 1,
    },
    "export": {"checkpoint": "{home}/model"},
}


def line(stage: str, home: Path, out: Path, /, **changes: object) -> list[str]:
    """Command line of ``stage`` into ``out``; ``changes`` by key, None leaves a key out."""
    keys = {**KEYS[stage], "output_dir": str(out), **changes}
    given = {
        key: str(value).replace("{home}", str(home))
        for key, value in keys.items()
        if value is not None
    }
    return [stage, *(f"{key}={value}" for key, value in given.items())]


@dataclass(frozen=True)
class Ending:
    """How a command line ended."""

    code: int
    out: str
    err: str
    seconds: float
    """Wall time, or CPU time where that is less: the machine may be busy with other things."""


def run_line(arguments: list[str]) -> Ending:
    """``minitron <arguments>`` in this process, which is left as it was.

    It is a task for the rank pool too: there Megatron is imported already.
    """
    from hydra.core.hydra_config import HydraConfig

    out, err = io.StringIO(), io.StringIO()
    handler, before = signal.getsignal(signal.SIGTERM), _logging()
    start, cpu = time.monotonic(), time.process_time()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(arguments)
    finally:
        signal.signal(signal.SIGTERM, handler)
        for logger in _loggers():
            logger.handlers[:], logger.level = before.get(logger, ([], logger.level))
        HydraConfig.instance().cfg = None
    seconds = min(time.monotonic() - start, time.process_time() - cpu)
    return Ending(code, out.getvalue(), err.getvalue(), seconds)


def _loggers() -> list[logging.Logger]:
    known = logging.root.manager.loggerDict.values()
    return [logging.root, *(logger for logger in known if isinstance(logger, logging.Logger))]


def _logging() -> dict[logging.Logger, tuple[list[logging.Handler], int]]:
    """Handlers and level of every logger; NeMo gives several of them files in the result folder."""
    return {logger: (logger.handlers[:], logger.level) for logger in _loggers()}


def contents(*folders: Path) -> dict[Path, tuple[int, int]]:
    """Every file and folder below ``folders``: size and time of change."""
    found = [path for folder in folders for path in folder.rglob("*")]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


def build(home: Path) -> None:
    """Good inputs: ``hf``, ``model`` (imported), ``scores``, ``student`` (pruned), data."""
    from transformers import LlamaConfig, LlamaForCausalLM

    texts = make_texts(30)
    vocab = save_tokenizer(home / "hf", texts)
    torch.manual_seed(0)
    config = LlamaConfig(**FAMILY.to_hf(replace(LLAMA, vocab_size=vocab)))
    LlamaForCausalLM(config).save_pretrained(home / "hf")
    (home / "text.txt").write_text("\n\n".join(texts))
    write_npy(home / "ids.npy", 8, 16, vocab)
    done(run_line(line("import", home, home / "model")))
    write_scores(home / "scores", home / "model")
    done(run_line(line("prune", home, home / "student")))


def done(ending: Ending) -> None:
    """The command line has to have worked."""
    assert ending.code == 0, ending.err


def write_scores(folder: Path, model: Path, **axes: torch.Tensor | None) -> None:
    """Random scores of a result as a result of ``importance``."""
    from nemo_minitron.checkpoint.artifact import output_folder
    from nemo_minitron.config.stages import ImportanceConfig
    from nemo_minitron.config.training import DataConfig

    config = ModelConfig.load(model / "checkpoint")
    shapes = {
        "hidden": (config.hidden_size,),
        "ffn": (config.num_layers, config.ffn_hidden_size),
        "head": (config.num_layers, config.num_attention_heads),
        "layer": (config.num_layers,),
    }
    random = {axis: torch.rand(shape) for axis, shape in shapes.items()}
    given = {axis: values for axis, values in {**random, **axes}.items() if values is not None}
    scores = Scores(given, meta={"model": model_meta(config)})
    data = DataConfig(path=str(model))
    cfg = ImportanceConfig(checkpoint=str(model), data=data, output_dir=str(folder))
    with output_folder(cfg, "importance", {"checkpoint": model}) as work:
        scores.save(work)


def edited(result: Path, copy: Path, edit: Callable[[Path], None]) -> Path:
    """A copy of a result whose ``checkpoint/`` was edited before its manifest was written."""
    from nemo_minitron.checkpoint.artifact import output_folder
    from nemo_minitron.config.stages import ImportConfig

    cfg = ImportConfig(output_dir=str(copy), source="-")
    with output_folder(cfg, "import", {}) as work:
        shutil.copytree(result / "checkpoint", work / "checkpoint")
        edit(work / "checkpoint")
    return copy


def put_nan(folder: Path) -> None:
    """NaN into one value of layer 2 (0-based) of a ``checkpoint/`` folder."""
    from nemo_minitron.checkpoint.lazy import from_tensor
    from nemo_minitron.checkpoint.torch_dist import read_torch_dist, write_torch_dist

    config = ModelConfig.load(folder)
    store = {n: t.read() for n, t in read_torch_dist(folder, FAMILY, config).items()}
    store["decoder.layers.2.mlp.linear_fc2.weight"][3, 4] = float("nan")
    for path in folder.glob("*.distcp"):
        path.unlink()
    lazy = {name: from_tensor(tensor) for name, tensor in store.items()}
    write_torch_dist(folder, lazy, FAMILY, config, workers=1)


def resized(**sizes: Any) -> Callable[[Path], None]:
    """An edit that changes sizes in ``model.yaml`` alone."""

    def edit(folder: Path) -> None:
        replace(ModelConfig.load(folder), **sizes).save(folder)

    return edit


def write_pair(prefix: Path, lengths: list[int]) -> None:
    """Megatron's ``.bin/.idx`` of documents of zeros, one sequence each."""
    sizes = np.array(lengths, np.int32)
    starts = np.concatenate([[0], np.cumsum(sizes[:-1], dtype=np.int64) * 2]).astype(np.int64)
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(sizes), len(sizes) + 1)
    documents = np.arange(len(sizes) + 1, dtype=np.int64)
    parts = (head, sizes.tobytes(), starts.tobytes(), documents.tobytes())
    Path(f"{prefix}.idx").write_bytes(b"".join(parts))
    Path(f"{prefix}.bin").write_bytes(bytes(2 * int(sizes.sum())))
