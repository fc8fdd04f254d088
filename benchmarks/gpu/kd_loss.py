"""The distillation loss beside plain torch and ModelOpt's class: value, gradients, memory, time.

Every side is a process of its own (``benchmarks/kd_loss_worker.py``). Ours runs with several chunk
sizes, which is how the best one for a device is found.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.common import Options, Result, mib, relative
from benchmarks.kd_loss import WORKER
from nemo_minitron.config.distillation import DistillationConfig
from tests.oracle.environment import ROOT, OracleUnavailableError, oracle_python

# Vocabulary of Llama 3, tokens; widths of Llama-3.1-Minitron-4B (width-pruned) and its teacher.
FULL: Mapping[str, Any] = {
    "vocab": 128_256,
    "tokens": 4096,
    "widths": (3072, 4096),
    "every": 16,
    "calls": 10,
}
SMALL: Mapping[str, Any] = {"vocab": 2000, "tokens": 96, "widths": (32, 48), "every": 1, "calls": 1}
CHUNKS = {False: (64, 128, 256, 512, 1024, 2048, 4096), True: (32, 64)}
DEFAULT = DistillationConfig().chunk_size
LIMITS = {"value": 1e-5, "gradients": 1e-5, "half": 1.5}
HEADER = ["dtype, side", "value", "gradient error", "peak MiB", "ms"]
# A chunk size that is this little slower than the fastest one, and smaller, is the better choice.
_NEARLY = 1.03


def modelopt_python(options: Options) -> Path | None:
    """An interpreter that has ModelOpt: this one, or the oracle's; None where there is neither."""
    if find_spec("modelopt"):
        return Path(sys.executable)
    if options.small:  # the tests of the oracle compare with ModelOpt; here it is the road
        return None
    try:
        return oracle_python()
    except OracleUnavailableError:
        return None


def _side(side: str, dtype: str, python: Path, options: Options) -> tuple[list[Any], list[Any]]:
    """Measurements and gradients of one side in fresh process."""
    sizes = SMALL if options.small else FULL
    out = options.work / "kd_loss" / f"{side}.{dtype}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [python, WORKER, side, sizes["vocab"], sizes["tokens"], out]
    command += ["--dtype", dtype, "--calls", sizes["calls"], "--every", sizes["every"]]
    command += ["--widths", *sizes["widths"]]
    if side == "ours":
        chunks = CHUNKS[options.small]
        first = DEFAULT if DEFAULT in chunks else chunks[0]
        command += ["--chunks", first, *(chunk for chunk in chunks if chunk != first)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    line = [str(word) for word in command]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=400)
    if done.returncode:
        raise RuntimeError(f"{' '.join(line)} failed:\n{done.stderr[-4000:]}")
    return json.loads(out.read_text()), torch.load(f"{out}.pt")


def _best(by_chunk: dict[int, dict[str, float]]) -> int:
    """The smallest chunk size that is about as fast as the fastest."""
    fastest = min(found["median_seconds"] for found in by_chunk.values())
    return min(c for c, found in by_chunk.items() if found["median_seconds"] <= _NEARLY * fastest)


def _row(name: str, found: dict[str, float], error: float | None) -> list[str]:
    on_gpu = torch.cuda.is_available()
    memory = mib(int(found["extra_bytes"])) if on_gpu else ""  # RSS of tiny tensors says nothing
    milliseconds = f"{1e3 * found['median_seconds']:.1f}"
    shown = "" if error is None else f"{error:.1e}"
    return [name, f"{found['loss']:.6f}", shown, memory, milliseconds]


def _compare(
    dtype: str, options: Options, reference: list[Any] | None
) -> tuple[list[list[str]], dict[str, Any], list[Any]]:
    """All sides in one dtype: rows, figures, gradients of plain torch in fp32."""
    pythons = {"plain": Path(sys.executable), "ours": Path(sys.executable)}
    peer = modelopt_python(options)
    pythons |= {"modelopt": peer} if peer else {}
    rows, figures = [], {}
    for side, python in pythons.items():
        found, gradients = _side(side, dtype, python, options)
        reference = reference or gradients
        pairs = zip(gradients, reference, strict=True)
        error = max(relative(ours, wanted) for ours, wanted in pairs)
        figures[side] = {**found[0], "gradient_error": error}
        if side != "ours":
            rows.append(_row(f"{dtype}, {side}", found[0], error))
            continue
        chunks = CHUNKS[options.small]
        first = DEFAULT if DEFAULT in chunks else chunks[0]
        sizes = [first, *(chunk for chunk in chunks if chunk != first)]
        by_chunk = dict(sorted(zip(sizes, found, strict=True)))
        figures[side] |= {"by_chunk": by_chunk, "best_chunk": _best(by_chunk)}
        for chunk, one in by_chunk.items():
            shown = error if chunk == first else None
            rows.append(_row(f"{dtype}, ours, chunks of {chunk}", one, shown))
    assert reference is not None
    return rows, figures, reference


def _checks(figures: dict[str, Any]) -> dict[str, bool]:
    full, half = figures["float32"], figures["bfloat16"]
    values = [abs(side["loss"] / full["plain"]["loss"] - 1) for side in full.values()]
    return {
        f"fp32 values within {LIMITS['value']:.0e} of plain torch": max(values) <= LIMITS["value"],
        f"fp32 gradients within {LIMITS['gradients']:.0e} of plain torch": max(
            side["gradient_error"] for side in full.values()
        )
        <= LIMITS["gradients"],
        f"bf16 gradients at most {LIMITS['half']} times as far from fp32 as plain torch's": half[
            "ours"
        ]["gradient_error"]
        <= LIMITS["half"] * half["plain"]["gradient_error"],
    }


def run(options: Options) -> Result:
    """fp32, then bf16 against the gradients of fp32."""
    sizes = SMALL if options.small else FULL
    rows, figures, reference = [], {}, None
    for dtype in ("float32", "bfloat16"):
        more, figures[dtype], reference = _compare(dtype, options, reference)
        rows += more
    best = {dtype: found["ours"]["best_chunk"] for dtype, found in figures.items()}
    absent = "" if "modelopt" in figures["float32"] else " ModelOpt is not installed here."
    text = (
        f"Forward KL and its gradients from hidden states (widths {sizes['widths'][0]} and "
        f"{sizes['widths'][1]}) to the student's hidden states and output layer, vocabulary "
        f"{sizes['vocab']:,}, {sizes['tokens']:,} tokens, TF32 off. Peak: device memory above the "
        "inputs, without the gradient of the output layer, which every side needs. Time: median. "
        "Gradient error: against plain torch in fp32. Smallest chunk size within "
        f"{_NEARLY - 1:.0%} of the fastest: {best['float32']} in fp32, {best['bfloat16']} in bf16 "
        f"(default of `distillation.chunk_size`: {DEFAULT}).{absent}"
    )
    return Result("Distillation loss", text, HEADER, rows, _checks(figures), figures)
