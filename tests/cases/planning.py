"""Tasks for the rank pool: what models really hold, to compare with what was planned."""

import torch

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig


def parameters_held(config: ModelConfig, parallel: ParallelConfig) -> tuple[int, int]:
    """Pipeline rank, and parameters of this rank as Megatron builds them."""
    from nemo_minitron.models.build import build_gpt
    from nemo_minitron.runtime.groups import ParallelGroups
    from nemo_minitron.runtime.launch import init_model_parallel

    init_model_parallel(parallel)
    groups = ParallelGroups.current()
    chunks = build_gpt(config, parallel, groups)
    return groups.pp.rank(), sum(p.numel() for chunk in chunks for p in chunk.parameters())


def bytes_saved(configs: list[ModelConfig], parallel: ParallelConfig, length: int) -> list[int]:
    """Bytes of memory that autograd keeps of a forward pass of each model, weights left out."""
    from nemo_minitron.models.build import build_gpt
    from nemo_minitron.runtime.groups import ParallelGroups
    from nemo_minitron.runtime.launch import init_model_parallel

    init_model_parallel(parallel)
    found = []
    for config in configs:
        (model,) = build_gpt(config, parallel, ParallelGroups.current())
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        model.return_hidden = True
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages: dict[int, int] = {}

        def keep(tensor, weights=weights, storages=storages):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights and tensor.is_floating_point():
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        ids = torch.randint(0, config.vocab_size, (1, length))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = model(ids, torch.arange(length)[None], None)
        found.append(sum(storages.values()))
        del out
    return found
