"""``minitron teacher_logits``: the teacher's outputs on the samples that ``distill`` will read."""

import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoint.artifact import check_output
from nemo_minitron.config.layout import check_layout
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.stages import TeacherLogitsConfig
from nemo_minitron.data.checks import check_data, check_sequence
from nemo_minitron.data.sft import check_packing
from nemo_minitron.distillation.logit_index import FOLDER, PARTS, LogitIndex, data_keys
from nemo_minitron.families.registry import longest_sequence
from nemo_minitron.runtime.ranks import launched_world_size, rank
from nemo_minitron.stages.settings import check_settings, on_ranks, opened_inputs, splits

log = logging.getLogger(__name__)


def check(cfg: TeacherLogitsConfig) -> None:
    """Refuse bad input before any rank or weight exists.

    Raises:
        ValueError: names the value, the relation and the key to set.
    """
    check_output(cfg, "teacher_logits")
    with opened_inputs(cfg):
        folder = Path(cfg.checkpoint) / "checkpoint"
        model = ModelConfig.load(folder)
        if cfg.top_k > model.vocab_size:
            raise ValueError(
                f"top_k={cfg.top_k} is larger than the vocabulary of {model.vocab_size}; set top_k "
                f"to {model.vocab_size} or less"
            )
        if cfg.dtype == "bfloat16" and model.final_logit_softcapping is not None:
            log.warning(
                "dtype=bfloat16 rounds these logits, which are fp32 behind final_logit_softcapping="
                "%g, by up to 1/256 of each; dtype=float32 stores them as they are",
                model.final_logit_softcapping,
            )
        check_layout(model, cfg.parallel)
        check_settings(cfg, model, precision=cfg.trainer.precision)
        cfg.parallel.world_size(launched_world_size())
        check_sequence(cfg.data, cfg.parallel)
        check_data(
            cfg.data,
            splits=splits(cfg.trainer),
            train_samples=cfg.trainer.max_steps * cfg.data.global_batch_size,
            vocab_size=model.vocab_size,
            tokenizer_dir=folder / "tokenizer",
            max_seq_length=longest_sequence(model),
        )
        check_packing(cfg.data, model.without_prediction())


def run(cfg: TeacherLogitsConfig) -> None:
    """Write the result; a killed run goes on after the shards that are complete."""
    with on_ranks(cfg, "teacher_logits", cfg.parallel, cfg.data.seed, resumable=True) as work:
        metrics = _store(cfg, work / FOLDER)
        if rank() == 0:
            source = Path(cfg.checkpoint) / "checkpoint" / "tokenizer"
            if source.is_dir():
                shutil.copytree(source, work / "tokenizer", dirs_exist_ok=True)
            (work / "metrics.json").write_text(json.dumps(metrics, indent=1))
    _show(cfg, metrics)


def _store(cfg: TeacherLogitsConfig, folder: Path) -> dict[str, Any]:
    from nemo_minitron.data.datasets import training_datasets
    from nemo_minitron.models.documents import check_shared
    from nemo_minitron.models.teacher_logits import read_part
    from nemo_minitron.runtime.console import progress
    from nemo_minitron.runtime.stop import StopOnRequest

    source = Path(cfg.checkpoint) / "checkpoint"
    model = ModelConfig.load(source)
    datasets = training_datasets(
        cfg.data, cfg.trainer, model, source, cfg.output_dir, splits(cfg.trainer)
    )
    check_shared(datasets[0], cfg.data, model, cfg.parallel)
    parts = {name: d for name, d in zip(PARTS, datasets, strict=True) if d is not None}
    samples = sum(map(len, parts.values()))
    writer = _writer(cfg, model, source, folder)
    start = time.monotonic()
    with progress("storing samples", samples) as advance, StopOnRequest() as stop:
        for name, dataset in parts.items():
            writer.write(name, dataset, advance, stop.check)
    seconds = time.monotonic() - start
    if rank() == 0:
        for draft in folder.glob("*.draft"):
            draft.unlink()
        read = {n: read_part(folder, n, cfg.shard_samples, len(d)) for n, d in parts.items()}
        _index(cfg, model, read).save(folder)
    return _metrics(cfg, {name: len(d) for name, d in parts.items()}, seconds)


def _writer(cfg: TeacherLogitsConfig, model: ModelConfig, source: Path, folder: Path) -> Any:
    import torch

    from nemo_minitron.models.build import DTYPES
    from nemo_minitron.models.teacher_logits import LogitWriter, Storing
    from nemo_minitron.models.weights import load_frozen
    from nemo_minitron.runtime.groups import ParallelGroups

    groups = ParallelGroups.current()
    precision = torch.bfloat16 if cfg.trainer.precision == "bf16-mixed" else torch.float32
    chunks = load_frozen(source, cfg.parallel, groups, dtype=precision, megatron=cfg.megatron)
    storing = Storing(
        top_k=cfg.top_k,
        temperature=cfg.temperature,
        dtype=DTYPES[cfg.dtype],
        shard_samples=cfg.shard_samples,
        chunk_size=cfg.chunk_size,
        micro_batch_size=cfg.data.micro_batch_size,
    )
    folder.mkdir(exist_ok=True)
    return LogitWriter(chunks, groups, model.vocab_size, storing, folder)


def _index(cfg: TeacherLogitsConfig, model: ModelConfig, parts: dict[str, Any]) -> LogitIndex:
    return LogitIndex(
        top_k=cfg.top_k,
        vocab_size=model.vocab_size,
        seq_length=cfg.data.seq_length,
        temperature=cfg.temperature,
        dtype=cfg.dtype,
        shard_samples=cfg.shard_samples,
        data=data_keys(cfg.data),
        parts=parts,
    )


def _metrics(cfg: TeacherLogitsConfig, samples: dict[str, int], seconds: float) -> dict[str, Any]:
    tokens = sum(samples.values()) * cfg.data.seq_length
    value = {"float32": 4, "bfloat16": 2}[cfg.dtype]
    return {
        "samples": samples,
        "tokens": tokens,
        "bytes": tokens * (cfg.top_k * (value + 4) + 4),
        "seconds": round(seconds, 3),
    }


def _show(cfg: TeacherLogitsConfig, metrics: dict[str, Any]) -> None:
    from nemo_minitron.runtime.console import show_table

    rows = [(f"{name} samples", f"{count:,}") for name, count in metrics["samples"].items()]
    rows += [("tokens", f"{metrics['tokens']:,}"), ("bytes", f"{metrics['bytes']:,}")]
    show_table("teacher logits", ("", f"k = {cfg.top_k}"), rows)
