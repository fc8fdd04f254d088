"""Runs scripts that train with a checkout of Megatron-LM where there is no GPU.

    python -m tests.helpers.megatron_lm RANKS BATCHES SCRIPT ARGUMENTS...

``MEGATRON_LM`` is its folder, whose ``megatron/core`` goes before the installed one. What it asks
of CUDA is answered here; Megatron-LM itself and the script are as they are. What every rank reads
is written to the folder BATCHES: ``tokens`` on the first stage, ``labels`` and ``loss_mask`` on
the last one.
"""

import importlib.metadata
import importlib.util
import os
import runpy
import socket
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

# Read when torch is imported, and by Megatron-LM.
os.environ.update(TORCH_COMPILE_DISABLE="1", CUDA_DEVICE_MAX_CONNECTIONS="1")

import torch

from tests.helpers.pool import kill_children


class Keep(NamedTuple):
    """Results that a rank gathers while the script runs, and the folder they are written to."""

    folder: str
    kept: Any


def _without(call: Callable[..., Any], *names: str, **always: Any) -> Callable[..., Any]:
    """``call`` without arguments that gloo or a CPU does not know, and with some of its own."""

    def made(*args: Any, **kwargs: Any) -> Any:
        known = {key: value for key, value in kwargs.items() if key not in names}
        return call(*args, **{**known, **always})

    return made


def _cuda() -> None:
    """The properties of a device, and its memory; ``runtime/cpu.py`` answers the rest."""
    cuda: Any = torch.cuda
    device = types.SimpleNamespace(
        major=9, minor=0, total_memory=1 << 33, multi_processor_count=1, name="CPU"
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "set_device": None,
        "get_device_capability": (9, 0),
        "get_device_name": "CPU",
        "get_device_properties": device,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_reserved": 0,
        "reset_peak_memory_stats": None,
        "memory_stats": {},
        "mem_get_info": (1 << 33, 1 << 33),
        "is_current_stream_capturing": False,
        "set_stream": None,
        "ipc_collect": None,
        "manual_seed_all": None,
        "_lazy_init": None,
    }
    for name, answer in answers.items():
        setattr(cuda, name, lambda *args, answer=answer, **kwargs: answer)
    for name in ("Float", "Half", "BFloat16", "Byte", "Long", "Int", "Double"):
        setattr(cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))
    setattr(torch.nn.Module, "cuda", lambda self, device=None: self)
    setattr(torch.Tensor, "pin_memory", lambda self, device=None: self)
    torch.accelerator.current_device_index = lambda: 0
    torch.accelerator.is_available = lambda *args, **kwargs: False


def _gloo() -> None:
    """Process groups of the backend that a CPU has."""
    dist = torch.distributed
    dist.barrier = _without(dist.barrier, "device_ids")
    dist.init_process_group = _without(
        dist.init_process_group, "device_id", "backend", backend="gloo"
    )
    dist.new_group = _without(dist.new_group, "pg_options", "backend", backend="gloo")


def _data_helpers() -> None:
    """The compiled helper of the installed Megatron-Core, in place of compiling one in the tree."""
    files = importlib.metadata.files("megatron-core") or []
    path = next(file.locate() for file in files if file.name.startswith("helpers_cpp"))
    name = "megatron.core.datasets.helpers_cpp"
    spec = importlib.util.spec_from_file_location(name, str(path))
    assert spec is not None
    assert spec.loader is not None
    import megatron.core.datasets.utils as utils

    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    utils.compile_helpers = lambda: None


def install(root: str) -> None:
    """Before any import of Megatron."""
    sys.path.insert(0, root)
    from nemo_minitron.runtime import cpu

    cpu.install()
    _cuda()
    _gloo()
    loader: Any = torch.utils.data.DataLoader
    loader.__init__ = _without(loader.__init__, "pin_memory")
    _data_helpers()
    # Processes that write files would import everything anew, without what is above.
    import multiprocessing

    forked = multiprocessing.get_context("fork")
    for module in (multiprocessing, torch.multiprocessing):
        setattr(module, "get_context", lambda method=None: forked)


def _kept_batches() -> list[dict[str, Any]]:
    """Every micro-batch that ``pretrain_gpt.get_batch`` returns from now on."""
    import pretrain_gpt  # type: ignore[import-not-found]  # in the checkout

    kept, own = [], pretrain_gpt.get_batch

    def get_batch(*args: Any, **kwargs: Any) -> Any:
        fields = own(*args, **kwargs)
        kept.append(dict(zip(pretrain_gpt.BATCH_KEYS, fields, strict=True)))
        return fields

    pretrain_gpt.get_batch = get_batch
    return kept


def _rank(rank: int, ranks: int, port: int, arguments: Sequence[str], keep: Keep) -> int:
    """Run the script as one rank, then write what was kept; the exit code."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    sys.argv = list(arguments)
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as stop:
        return 0 if stop.code in (None, 0) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    os.makedirs(keep.folder, exist_ok=True)
    torch.save(keep.kept, os.path.join(keep.folder, f"{rank}.pt"))
    return 0


def run_ranks(ranks: int, arguments: Sequence[str], keep: Keep) -> int:
    """Run a script on ranks, forks of this process since imports take longest; the exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            code = _rank(rank, ranks, port, arguments, keep)
            sys.stdout.flush()
            sys.stderr.flush()
            kill_children(os.getpid())
            os._exit(code)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def main(ranks: int, batches: str, arguments: Sequence[str]) -> int:
    """The exit code of a script of Megatron-LM."""
    install(os.environ["MEGATRON_LM"])
    return run_ranks(ranks, arguments, Keep(batches, _kept_batches()))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
