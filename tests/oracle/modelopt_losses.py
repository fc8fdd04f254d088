"""The oracle: ModelOpt's logit losses on vocabulary shards. Runs in an environment of its own.

``python modelopt_losses.py FOLDER``; nothing of this project is imported. ``FOLDER/job.json``::

    {"tp": [1, 2], "temperature": 2.0, "top_k": 7}

and ``FOLDER/inputs.safetensors``: ``hidden [N, h]``, ``weight [v, h]``, ``teacher_hidden [N, H]``,
``teacher_weight [v, H]``, ``mask [N]``. Every rank writes ``KIND.TP.RANK.safetensors``: ``loss``
(masked sum), ``hidden`` (its part of the gradient) and ``weight`` (gradient of its rows).
"""

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor


def masked_loss(loss: Any, inputs: dict[str, Tensor], rank: int, tp: int) -> dict[str, Tensor]:
    """One loss and its gradients, reduced as Megatron-LM's post-training loss function does it."""
    from megatron.core import parallel_state

    hidden = inputs["hidden"].clone().requires_grad_()
    weight = inputs["weight"].chunk(tp)[rank].clone().requires_grad_()
    teacher = inputs["teacher_hidden"] @ inputs["teacher_weight"].chunk(tp)[rank].t()
    student = hidden @ weight.t()
    per_token, tp_reduce, _ = loss(student[:, None], teacher[:, None])  # [s, b, v] -> [b, s]
    total = (per_token[0] * inputs["mask"]).sum()
    if tp_reduce:  # the value alone: autograd does not see it
        dist.all_reduce(total.detach(), group=parallel_state.get_tensor_model_parallel_group())
    total.backward()
    return {"loss": total.detach(), "hidden": hidden.grad, "weight": weight.grad}


def run_rank(rank: int, world: int, folder: Path, store: str) -> None:
    """One process: both losses at every tensor-parallel size."""
    from megatron.core import parallel_state
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss, TopKLogitsKLLoss

    file_store = dist.FileStore(store, world)
    dist.init_process_group("gloo", store=file_store, rank=rank, world_size=world)
    job = json.loads((folder / "job.json").read_text())
    inputs = load_file(folder / "inputs.safetensors")
    temperature, top_k = job["temperature"], job["top_k"]
    for tp in job["tp"]:
        parallel_state.initialize_model_parallel(tp)
        config = SimpleNamespace(tensor_model_parallel_size=tp, sequence_parallel=False)
        losses = {
            "forward_kl": LogitsKLLoss(config, temperature=temperature),
            "top_k": TopKLogitsKLLoss(config, temperature=temperature, top_k=top_k),
        }
        for kind, loss in losses.items():
            found = masked_loss(loss, inputs, rank % tp, tp)
            if rank < tp:  # the others are data-parallel copies
                save_file(found, folder / f"{kind}.{tp}.{rank}.safetensors")
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def main() -> None:
    """Start as many ranks as the largest tensor-parallel size."""
    folder = Path(sys.argv[1])
    world = max(json.loads((folder / "job.json").read_text())["tp"])
    with tempfile.TemporaryDirectory() as scratch:
        mp.spawn(run_rank, (world, folder, f"{scratch}/store"), nprocs=world)


if __name__ == "__main__":
    main()
