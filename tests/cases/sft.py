"""Tasks for the rank pool: losses and gradients on samples that SFT records share."""

from pathlib import Path
from typing import Any

from nemo_minitron.config.distillation import DistillationConfig
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.training import DataConfig
from tests.cases.kd import loaded, model_cfg, save_gradients, wrap, zero_gradients

SEQ, BATCH = 128, 4


def gradients(
    student: tuple[ModelConfig, str],
    teacher: tuple[ModelConfig, str],
    parallel: ParallelConfig,
    keys: dict[str, Any],
    cases: dict[str, dict[str, Any]],
) -> dict[str, list[float]]:
    """One global batch forward and backward for each case.

    Args:
        student: sizes and folder of weights.
        teacher: likewise.
        parallel: the layout.
        keys: ``path``, ``tokenizer`` and ``cache`` of the data.
        cases: folder of gradients -> keys of the data (``pack``, ``micro_batch_size``) and of the
            loss.

    Returns:
        ``[KD, CE, tokens]`` of each.
    """
    from nemo_minitron.models.objective import on_host
    from nemo_minitron.models.schedule import on_this_cp_rank
    from nemo_minitron.runtime.launch import init_model_parallel

    init_model_parallel(parallel)
    model = loaded(model_cfg(student[0], teacher[0], parallel), student, teacher)
    wrap(model, use_distributed_optimizer=False)
    found = {}
    for out, over in cases.items():
        data_keys = {"micro_batch_size": 1, **over["data"]}
        model.distillation = DistillationConfig(**{"chunk_size": 7, **over["loss"]})
        mine = _batches(keys, data_keys, student[0].vocab_size, model.groups)
        zero_gradients(model)
        sums = model.forward_backward([on_this_cp_rank(batch, model.groups) for batch in mine])
        total = on_host(sums)
        found[out] = [total.kd, total.ce, total.tokens]
        save_gradients(model, Path(out), student[0])
    return found


def _batches(keys: dict[str, Any], data_keys: dict[str, Any], vocab: int, groups: Any) -> list[Any]:
    """The micro-batches of this rank: all records, filled up with samples that do not count."""
    from nemo_minitron.data.datasets import build_split, prepare_tokens
    from nemo_minitron.data.sampler import build_dataloader

    data = DataConfig(path=keys["path"], seq_length=SEQ, split="1", **data_keys)
    tokens = prepare_tokens(
        data,
        vocab_size=vocab,
        cache=Path(keys["cache"]),
        tokenizer_dir=Path(keys["tokenizer"]),
    )
    samples = build_split(data, tokens)
    data.global_batch_size = -(-len(samples) // BATCH) * BATCH
    dp = groups.dp
    loader = build_dataloader(samples, data, dp_rank=dp.rank(), dp_size=dp.size(), drop_last=False)
    return list(loader)
