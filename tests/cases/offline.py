"""Tasks for the rank pool: a teacher whose weights wait in host memory, and stored outputs."""

from pathlib import Path
from typing import Any

import torch

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from tests.cases.kd import batches, loaded, model_cfg, wrap, zero_gradients
from tests.helpers.tiny import token_batch

TOP_K = 6


def gradients(model: Any, micro_batches: list[dict[str, torch.Tensor]]) -> tuple[list, list]:
    """``[KD, CE, tokens]`` sums and this rank's gradients of one global batch."""
    from nemo_minitron.models.objective import on_host
    from nemo_minitron.models.schedule import on_this_cp_rank

    wrap(model, use_distributed_optimizer=False)
    zero_gradients(model)
    sums = model.forward_backward([on_this_cp_rank(batch, model.groups) for batch in micro_batches])
    grads = [p.main_grad.clone() for chunk in model.chunks for p in chunk.parameters()]
    return list(on_host(sums)), grads


def offload(
    student: tuple[ModelConfig, str], teacher: tuple[ModelConfig, str], parallel: ParallelConfig
) -> dict[str, Any]:
    """One global batch with the teacher on the device all the time and without."""
    from nemo_minitron.runtime.launch import init_model_parallel

    init_model_parallel(parallel)
    micro_batches = batches(2, 16, student[0].vocab_size)
    out: dict[str, Any] = {"results": []}
    for away in (False, True):
        cfg = model_cfg(student[0], teacher[0], parallel, offload_teacher=away)
        model = loaded(cfg, student, teacher)
        out["before"] = _bytes(model)
        out["results"].append(gradients(model, micro_batches))
        model.evaluate_batch(micro_batches)
        out["after"] = _bytes(model)
    last = model.teacher.chunks[-1]
    out["output_layer"] = model.teacher.output_weight.nbytes if last.post_process else 0
    return out


def _bytes(model: Any) -> int:
    """Device bytes of the teacher's weights."""
    tensors = [p for chunk in model.teacher.chunks for p in chunk.parameters()]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def _dataset(samples: int, vocab_size: int) -> Any:
    from nemo_minitron.data.samples import NpyDataset

    return NpyDataset(token_batch(samples, 15, vocab_size).numpy(), samples)


def store(
    teacher: tuple[ModelConfig, str], parallel: ParallelConfig, folder: str, samples: int
) -> None:
    """Shards of ``samples`` samples, two in each, in ``folder``."""
    from nemo_minitron.distillation.logit_index import LogitIndex
    from nemo_minitron.models.build import build_gpt
    from nemo_minitron.models.teacher_logits import LogitWriter, Storing, read_part
    from nemo_minitron.models.weights import load_weights
    from nemo_minitron.runtime.groups import ParallelGroups
    from nemo_minitron.runtime.launch import init_model_parallel

    init_model_parallel(parallel)
    config, groups, path = teacher[0], ParallelGroups.current(), Path(folder)
    chunks = build_gpt(config, parallel, groups)
    load_weights(chunks, groups, Path(teacher[1]))
    for chunk in chunks:
        chunk.eval()
        chunk.return_hidden = True
    storing = Storing(
        top_k=TOP_K + 2,
        temperature=1.0,
        dtype=torch.float32,
        shard_samples=2,
        chunk_size=7,
        micro_batch_size=1,
    )
    path.mkdir(parents=True, exist_ok=True)
    done: list[int] = []
    writer = LogitWriter(chunks, groups, config.vocab_size, storing, path)
    writer.write("train", _dataset(samples, config.vocab_size), done.append)
    assert sum(done) == samples
    if torch.distributed.get_rank() == 0:
        LogitIndex(
            top_k=TOP_K + 2,
            vocab_size=config.vocab_size,
            seq_length=16,
            temperature=1.0,
            dtype="float32",
            shard_samples=2,
            data={},
            parts={"train": read_part(path, "train", 2, samples)},
        ).save(path)
    torch.distributed.barrier()


def offline(
    student: tuple[ModelConfig, str],
    teacher: tuple[ModelConfig, str],
    parallel: ParallelConfig,
    folder: str,
    stored: str,
) -> dict[str, Any]:
    """Store 5 samples in ``folder``; train on 4 online and from what lies in ``stored``."""
    from nemo_minitron.data.sampler import build_dataloader
    from nemo_minitron.distillation.logit_shards import StoredTeacher
    from nemo_minitron.models.distill import DistillationGPTModel, OfflineDistillationGPTModel

    store(teacher, parallel, folder, 5)
    dataset = _dataset(4, student[0].vocab_size)
    joined = StoredTeacher(dataset, Path(stored), "train", top_k=TOP_K, data_path="-")
    out: dict[str, Any] = {}
    for loss in ("top_k", "top_k_tail"):
        over = {"loss": loss, "top_k": TOP_K, "ce_weight": 0.5}
        for name, data in {"online": dataset, "offline": joined}.items():
            cfg = model_cfg(student[0], teacher[0], parallel, **over)
            cfg.stored_temperature = 1.0
            cls = DistillationGPTModel if name == "online" else OfflineDistillationGPTModel
            model: Any = cls(cfg)
            model.load(Path(student[1]))
            if name == "online":
                model.load_teacher(Path(teacher[1]))
            share = {"dp_rank": model.groups.dp.rank(), "dp_size": model.groups.dp.size()}
            loader = build_dataloader(data, model.data_cfg, drop_last=True, **share)
            out[f"{loss} {name}"] = gradients(model, list(loader))
    return out
