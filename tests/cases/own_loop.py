"""Tasks for the rank pool: what the training loop of another program is compared with."""

from typing import Any

import torch

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from tests.cases.kd import loaded, model_cfg, wrap, zero_gradients
from tests.cases.live import _start


def gradients(
    models: list[tuple[ModelConfig, str]], parallel: ParallelConfig, batches: list[dict[str, Any]]
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss a token and this rank's gradients of one global batch of our own distillation."""
    _start(parallel)
    model = loaded(model_cfg(models[0][0], models[1][0], parallel), *models)
    wrap(model, use_distributed_optimizer=False)
    zero_gradients(model)
    sums = model.forward_backward(batches)
    (chunk,) = model.model
    return float(sums.kd / sums.tokens), {
        name.removeprefix("module."): parameter.main_grad.clone()
        for name, parameter in chunk.named_parameters()
    }
