"""Tasks for the rank pool: a teacher whose weights wait in host memory, and stored outputs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from tests.dist.kd_cases import batches, model_cfg


def gradients(model: Any, micro_batches: list[dict[str, torch.Tensor]]) -> tuple[list, list]:
    """``[KD, CE, tokens]`` sums and this rank's gradients of one global batch."""
    from nemo_minitron.models.optim import build_optimizer, wrap_ddp
    from nemo_minitron.models.schedule import on_this_cp_rank

    optim = replace(model.optim_cfg, use_distributed_optimizer=False)
    model.model = torch.nn.ModuleList(wrap_ddp(model.chunks, optim))
    build_optimizer(list(model.model), optim, model.trainer_cfg)
    for chunk in model.model:
        chunk.zero_grad_buffer()
    sums = model.forward_backward([on_this_cp_rank(batch, model.groups) for batch in micro_batches])
    grads = [p.main_grad.clone() for chunk in model.chunks for p in chunk.parameters()]
    return sums.tolist(), grads


def offload(
    student: tuple[ModelConfig, str], teacher: tuple[ModelConfig, str], parallel: ParallelConfig
) -> dict[str, Any]:
    """One global batch with the teacher on the device all the time and without."""
    from nemo_minitron.models.distill import DistillationGPTModel
    from nemo_minitron.runtime.launch import init_model_parallel

    init_model_parallel(parallel)
    micro_batches = batches(2, 16, student[0].vocab_size)
    out: dict[str, Any] = {"results": []}
    for away in (False, True):
        cfg = model_cfg(student[0], teacher[0], parallel, offload_teacher=away)
        model = DistillationGPTModel(cfg)
        model.load(Path(student[1]))
        model.load_teacher(Path(teacher[1]))
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
