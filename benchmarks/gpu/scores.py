"""Importance on the device and on the CPU: the same scores, the same indices kept; and its cost."""

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.distill_step import TEACHER
from benchmarks.gpu.common import Options, Result, fill, on_cpu, relative, seconds_of
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import PruningConfig, ScoreConfig, TargetConfig
from nemo_minitron.config.training import DataConfig
from nemo_minitron.pruning.plan import Plan, make_plan
from nemo_minitron.runtime.launch import device, distributed

SMALL = replace(
    TEACHER, num_layers=2, hidden_size=96, ffn_hidden_size=256, kv_channels=16, vocab_size=512
)
LIMIT = 1e-4
HEADER = ["scores of", "relative error", "kept", "not kept by both", "narrowest cut"]
_TOKENS = {True: (4, 32), False: (32, 512)}  # samples and their length, by ``small``


def _model(config: ModelConfig) -> tuple[Any, Any]:
    from nemo_minitron.models.build import build_gpt
    from nemo_minitron.runtime.groups import ParallelGroups

    groups = ParallelGroups.current()
    (chunk,) = build_gpt(config, ParallelConfig(), groups)
    fill([chunk])
    return chunk.to(device()), groups


def _target(config: ModelConfig) -> PruningConfig:
    """A third of everything goes, one query group of three included."""
    sizes = TargetConfig(
        num_layers=config.num_layers * 2 // 3,
        hidden_size=config.hidden_size * 2 // 3,
        ffn_hidden_size=config.ffn_hidden_size * 2 // 3,
        num_attention_heads=config.num_attention_heads * 2 // 3,
        num_query_groups=config.num_query_groups * 2 // 3,
    )
    return PruningConfig(target=sizes)


def scored(config: ModelConfig, samples: int, length: int) -> tuple[dict[str, Tensor], Plan]:
    """Scores and plan of a random model, inside ``distributed``."""
    from nemo_minitron.data.samples import NpyDataset
    from nemo_minitron.importance.estimate import estimate_scores

    chunk, groups = _model(config)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (samples, length))
    data = DataConfig(path="-", seq_length=length, micro_batch_size=4, global_batch_size=samples)
    dataset = NpyDataset(ids, samples)
    found = estimate_scores([chunk], config, groups, dataset, data, ScoreConfig())
    return found, make_plan(config, _target(config), found)


def scored_alone(config: ModelConfig, samples: int, length: int) -> tuple[dict[str, Tensor], Plan]:
    """As ``scored``, in a process that has no groups yet."""
    with distributed(ParallelConfig()):
        return scored(config, samples, length)


def _kept(plan: Plan) -> dict[str, list[Any]]:
    """Axis of the scores -> kept indices, one list for every layer or one in all."""
    return {
        "hidden": [plan["hidden"]],
        "ffn": plan["ffn"],
        "head": plan["head"],
        "layer": [plan.layers],
    }


def _narrowest(scores: Tensor, kept: list[list[int]]) -> float:
    """Smallest gap between a kept and a dropped score of a row, relative to the kept one."""
    gaps = []
    for row, indices in zip(scores.double(), kept, strict=True):
        mask = torch.zeros(len(row), dtype=torch.bool)
        mask[indices] = True
        gaps.append(((row[mask].min() - row[~mask].max()) / row[mask].min()).item())
    return min(gaps)


def _cost(config: ModelConfig, length: int, repeats: int) -> dict[str, float]:
    """Seconds of a forward pass without and with the hooks of the default scores."""
    from nemo_minitron.importance.hooks import ChunkRecorder
    from nemo_minitron.models.schedule import run_schedule

    chunk, groups = _model(config)
    chunk.return_hidden = True
    chunk.eval()
    recorder = ChunkRecorder(chunk, groups, ScoreConfig(), lambda index: 4)
    tokens = torch.randint(0, config.vocab_size, (4, length), device=device())
    positions = torch.arange(length, device=device()).expand(4, length)
    batch = {"tokens": tokens, "position_ids": positions}

    def forward() -> None:
        run_schedule([chunk], [batch], _nothing, forward_only=True, collect_outputs=True)

    with torch.no_grad():
        plain = seconds_of(forward, repeats)
        with ExitStack() as handles:
            recorder.register(lambda handle: handles.callback(handle.remove))
            hooked = seconds_of(forward, repeats)
    return {"plain": plain, "hooked": hooked}


def _nothing(index: int, batch: Any, hidden: Tensor) -> None:
    """The hooks have seen all there is to see."""


def run(options: Options) -> Result:
    """The device beside the CPU."""
    config = SMALL if options.small else TEACHER
    samples, length = _TOKENS[options.small]
    wanted, wanted_plan = on_cpu(scored_alone, config, samples, length)
    with distributed(ParallelConfig()):
        found, plan = scored(config, samples, length)
        cost = _cost(config, length, 3 if options.small else 20)
    rows: list[list[str]] = []
    figures: dict[str, Any] = {"cost": cost, "axes": {}}
    for axis, kept in _kept(plan).items():
        theirs = _kept(wanted_plan)[axis]
        differ = sum(len(set(a) ^ set(b)) for a, b in zip(kept, theirs, strict=True))
        error, count = relative(found[axis], wanted[axis]), sum(map(len, kept))
        # Heads are ranked inside groups, layers may be cut as a block: no one border there.
        gap = None
        if axis in ("hidden", "ffn"):
            rows_of = wanted[axis][wanted_plan.layers] if axis == "ffn" else wanted[axis][None]
            gap = _narrowest(rows_of, theirs)
        figures["axes"][axis] = {"error": error, "kept": count, "differ": differ, "gap": gap}
        gap_text = "" if gap is None else f"{gap:.1e}"
        rows.append([axis, f"{error:.1e}", f"{count:,}", str(differ), gap_text])
    axes = figures["axes"].values()
    checks = {
        f"scores within {LIMIT:.0e} of the CPU's": max(a["error"] for a in axes) <= LIMIT,
        "kept indices identical": not any(a["differ"] for a in axes),
    }
    ratio = cost["hooked"] / cost["plain"]
    text = (
        f"A random {config.num_layers}-layer model of width {config.hidden_size} on {samples} x "
        f"{length} tokens, fp32, on the device and on the CPU of the same machine; a third of every"
        " axis goes. Narrowest cut: the smallest relative gap between a kept and a dropped score. "
        f"A forward pass of 4 x {length} tokens takes {1e3 * cost['plain']:.1f} ms, with all hooks "
        f"{1e3 * cost['hooked']:.1f} ms ({ratio:.2f}x)."
    )
    return Result("Scores", text, HEADER, rows, checks, figures)
