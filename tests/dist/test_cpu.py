"""What ``runtime/cpu.py`` answers where there is no CUDA, in a worker where it is installed."""

import pytest
import torch
from torch import Tensor

from tests.helpers.pool import WorkerPool

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is patched with CUDA")
FACTORIES = {
    "tensor": ([1.0, 2.0],),
    "as_tensor": ([1.0, 2.0],),
    "empty": (2,),
    "zeros": (2,),
    "ones": (2,),
    "full": ((2,), 3.0),
    "arange": (2,),
    "rand": (2,),
    "randn": (2,),
    "randint": (5, (2,)),
    "linspace": (0, 1, 2),
    **{f"{name}_like": (torch.zeros(2),) for name in ("empty", "zeros", "ones")},
    "full_like": (torch.zeros(2), 3.0),
}


def _devices_of_factories() -> list[str]:
    devices = ("cuda", "cuda:1", torch.device("cuda"), torch.device("cuda", 0))
    made = [
        getattr(torch, name)(*args, device=device)
        for name, args in FACTORIES.items()
        for device in (*devices, torch.cuda.current_device())
    ]
    return [tensor.device.type for tensor in made if tensor.shape == (2,)]


def test_a_factory_that_names_cuda_makes_a_cpu_tensor(ranks: WorkerPool) -> None:
    """All of them, whatever the spelling."""
    assert ranks.run(1, _devices_of_factories)[0] == ["cpu"] * 5 * len(FACTORIES)


def _methods() -> dict[str, object]:
    x = torch.ones(2, dtype=torch.bfloat16)
    return {
        "to": [x.to("cuda").device.type, x.to(device="cuda:0").device.type],
        "to with dtype": [str(x.to("cuda", torch.float32).dtype), str(x.to(torch.float64).dtype)],
        "cuda": x.cuda() is x and x.cuda(0, non_blocking=True) is x,
        "type": [x.type(), x.to(torch.int64).type(), str(x.type(torch.float32).dtype)],
        "parameter": torch.nn.Parameter(x).type(),
        "module": torch.nn.Linear(2, 2).cuda().weight.device.type,
        "pinned": torch.empty(2, pin_memory=True).is_pinned(),
    }


def test_methods_of_a_tensor_answer_as_on_cuda(ranks: WorkerPool) -> None:
    """Moves do nothing, and ``type()`` spells what Megatron compares with."""
    assert ranks.run(1, _methods)[0] == {
        "to": ["cpu", "cpu"],
        "to with dtype": ["torch.float32", "torch.float64"],
        "cuda": True,
        "type": ["torch.cuda.BFloat16Tensor", "torch.LongTensor", "torch.float32"],
        "parameter": "torch.cuda.BFloat16Tensor",
        "module": "cpu",
        "pinned": False,
    }


def _scripted(x: Tensor) -> Tensor:
    return x + torch.ones(2) + torch.zeros_like(x)


def _known_by_identity() -> dict[str, object]:
    with torch.device("meta"):
        made = [getattr(torch, name)(*FACTORIES[name]) for name in FACTORIES if "_like" not in name]
        layer = torch.nn.Linear(2, 2)
    compiled = torch.compile(_scripted, backend="eager", fullgraph=True)
    return {
        "default device": {tensor.device.type for tensor in (*made, layer.weight)},
        "script": torch.jit.script(_scripted)(torch.ones(2)).tolist(),
        "compile": compiled(torch.ones(2)).tolist(),
    }


def test_what_knows_the_factories_by_identity_still_does(ranks: WorkerPool) -> None:
    """Default devices (transformers loads with one), TorchScript and TorchDynamo."""
    assert ranks.run(1, _known_by_identity)[0] == {
        "default device": {"meta"},
        "script": [2.0, 2.0],
        "compile": [2.0, 2.0],
    }


def test_the_router_finds_its_name_also_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron-Core 0.16 without Transformer Engine; with CUDA nothing else is touched."""
    from megatron.core.transformer.moe import moe_utils

    from nemo_minitron.runtime import cpu

    monkeypatch.delattr(moe_utils, "te_general_gemm", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cpu, "_patch_all", lambda: pytest.fail("patched"))
    cpu._define_missing_name.cache_clear()
    assert cpu.install() is False
    assert moe_utils.te_general_gemm is None


def _reduced_and_gathered() -> dict[str, list[float]]:
    from megatron.core.distributed import param_and_grad_buffer as buffers

    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    group, found = torch.distributed.group.WORLD, {}
    given = torch.arange(1.0, 4 * size + 1) * (rank + 1)
    shard, whole = given.chunk(size)[rank], torch.zeros(4 * size)
    buffers.dist_reduce_scatter_func(shard, given, group=group)
    found["reduced in place"] = shard.tolist()
    buffers.dist_all_gather_func(whole, shard, group=group)
    found["gathered elsewhere"] = whole.tolist()
    return found


@pytest.mark.parametrize("size", [1, 2])
def test_gradients_and_weights_of_some_replicas(ranks: WorkerPool, size: int) -> None:
    """What a group of one leaves out changes nothing, and a group of two does it all."""
    factor = 3.0 if size == 2 else 1.0
    every = [factor * value for value in range(1, 4 * size + 1)]
    for rank, found in enumerate(ranks.run(size, _reduced_and_gathered)):
        assert found["reduced in place"] == every[4 * rank : 4 * rank + 4]
        assert found["gathered elsewhere"] == every


def _compiled_functions() -> list[str]:
    from megatron.core.fusions import fused_bias_swiglu

    return [
        k for k, v in vars(fused_bias_swiglu).items() if hasattr(v, "_torchdynamo_orig_callable")
    ]


def test_swiglu_needs_no_compiler(ranks: WorkerPool) -> None:
    assert ranks.run(1, _compiled_functions) == [[]]
