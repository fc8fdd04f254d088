"""``minitron plan``: what a pipeline, or one stage, will take; runs nothing."""

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from textwrap import wrap
from typing import Any

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.stages import PlanConfig
from nemo_minitron.families.registry import family_of
from nemo_minitron.families.table import active_parameters, parameter_count
from nemo_minitron.pipeline.plan import read_items
from nemo_minitron.planning.advice import advice
from nemo_minitron.planning.items import ItemPlan, Run, plan_items, room
from nemo_minitron.planning.step_time import StepTime, step_time
from nemo_minitron.runtime.console import show_table

_SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
)
_NOT_COUNTED = {
    **dict.fromkeys(("data", "generate", "benchmark"), "it depends on the texts"),
    "search": "it trains candidates that it has yet to find (search.distill.steps)",
}
_DEGREES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)


def check(cfg: PlanConfig) -> None:
    """Refuse a file that ``run`` could not write; the rest of ``run`` is nothing but a check.

    Raises:
        ValueError: names the key to set.
    """
    if cfg.json is None:
        return
    path = Path(cfg.json)
    if path.is_dir():
        raise ValueError(f"json={path} is a folder; set a file, such as json={path / 'plan.json'}")
    if path.exists() and not cfg.overwrite:
        raise ValueError(f"json={path} exists; set overwrite=true or another file")
    if not path.parent.is_dir():
        raise ValueError(f"json={path}: its folder {path.parent} does not exist; make it")


def run(cfg: PlanConfig) -> None:
    """Print the tables, and write ``json``.

    Raises:
        ValueError: bad input, or what cannot run at all; names the item and the key to set.
    """
    plans = plan_items(cfg, read_items(cfg, at_hand=False))
    records = [_record(cfg, plan) for plan in plans]
    _show_models(records)
    _show_runs(cfg, records)
    _show_steps(records)
    _show_memory(cfg, records)
    _show_warnings(records)
    if cfg.json is not None:
        total = sum(r["gpu_hours"] or 0.0 for r in records if "gpu_hours" in r)
        whole = {"cluster": asdict(cfg.cluster), "nodes": cfg.nodes, "mfu": cfg.mfu}
        values = {**whole, "gpu_hours": total, "items": records}
        Path(cfg.json).write_text(json.dumps(values, indent=1) + "\n")


def _record(cfg: PlanConfig, plan: ItemPlan) -> dict[str, Any]:
    """Return the numbers of one item, as in ``json``."""
    record: dict[str, Any] = {"name": plan.name, "stage": plan.stage}
    for key, model in (("model", plan.before), ("result", plan.after)):
        record[key] = None if model is None else _facts(model)
    return record | ({} if plan.run is None else _run_facts(cfg, plan.run))


def _facts(model: ModelConfig) -> dict[str, Any]:
    count = parameter_count(family_of(model), model)
    parameters = {**count, "embedding": count["total"] - count["non_embedding"]}
    if model.num_moe_experts is not None:
        parameters["active"] = active_parameters(family_of(model), model)
    return {**{name: getattr(model, name) for name in _SIZES}, "parameters": parameters}


def _run_facts(cfg: PlanConfig, run: Run) -> dict[str, Any]:
    parallel = {name: getattr(run.job.parallel, name) for name in _DEGREES}
    hours = run.work.gpu_hours(cfg.cluster, cfg.mfu)
    enough = room(run, cfg.cluster)
    return {
        "ranks": run.ranks,
        "parallel": {**parallel, "data_parallel_size": run.job.data_parallel_size},
        "tokens": run.work.tokens,
        "flops": run.work.flops,
        "gpu_hours": hours,
        "hours": None if hours is None else hours / run.ranks,
        "step": _step_facts(cfg, run),
        "memory_gib": run.memory.in_gib(),
        "fits": enough,
        "advice": None if enough else advice(run, cfg.cluster),
    }


def _step_facts(cfg: PlanConfig, run: Run) -> dict[str, float] | None:
    """Return seconds of a step by what they go to, hours of all steps, share of the peak."""
    time = step_time(run.job, cfg.cluster, cfg.mfu)
    if time is None or run.work.flops is None:
        return None
    steps = run.job.cfg.trainer.max_steps
    flops = run.work.flops / steps / run.ranks
    return {
        **asdict(time),
        "total": time.total,
        "hours": time.total * steps / 3600,
        "of_peak": flops / time.total / (cfg.cluster.peak_tflops * 1e12),
    }


def _show_models(records: list[dict[str, Any]]) -> None:
    header = ("model", *(name.removeprefix("num_") for name in _SIZES))
    rows = []
    for record in records:
        made = record["result"]
        if record["stage"] not in ("import", "prune") or made is None:
            continue
        count, before = made["parameters"], record["model"]["parameters"]
        kept = "" if made == record["model"] else f"{count['total'] / before['total']:.1%}"
        sizes = [f"{made[name]:,}" for name in _SIZES]
        counts = [_billions(count[k]) for k in ("total", "non_embedding", "embedding")]
        if "active" in count:
            counts[0] = f"{counts[0]} (A{_billions(count['active'])})"
        rows.append((record["name"], *sizes, *counts, f"{count['total']:,}", kept))
    if rows:
        names = ("parameters", "non-embedding", "embedding", "exactly", "kept")
        show_table("models", (*header, *names), rows)


def _show_runs(cfg: PlanConfig, records: list[dict[str, Any]]) -> None:
    rows = []
    for record in records:
        if "ranks" not in record:
            continue
        layout = record["parallel"]
        degrees = [str(layout[name] or 1) for name in (*_DEGREES, "data_parallel_size")]
        numbers = (
            _number(record["tokens"], _short),
            _number(record["flops"], lambda x: f"{x:.2e}"),
            _number(record["gpu_hours"], lambda x: f"{x:,.1f}"),
            _number(record["hours"], lambda x: f"{x:,.1f}"),
        )
        rows.append((record["name"], record["stage"], str(record["ranks"]), *degrees, *numbers))
    if not rows:
        return
    kind = "GPUs" if cfg.cluster.gpus_per_node else "ranks"
    hours = "GPU hours" if cfg.cluster.gpus_per_node else "rank hours"
    total = sum(record.get("gpu_hours") or 0.0 for record in records)
    rows.append(("all", "", *[""] * 9, f"{total:,.1f}", ""))
    header = ("run", "stage", kind, "TP", "PP", "VPP", "CP", "EP", "DP", "tokens", "FLOPs")
    title = (
        f"{cfg.nodes} x {cfg.cluster.ranks_per_node} {kind} of {cfg.cluster.peak_tflops:g} TFLOPS "
        f"at mfu={cfg.mfu:g}"
    )
    show_table(title, (*header, hours, "hours"), rows)


def _show_steps(records: list[dict[str, Any]]) -> None:
    rows, parts = [], tuple(field.name for field in fields(StepTime))
    for record in records:
        step = record.get("step")
        if step is not None:
            shares = [f"{step[name] / step['total']:.1%}" for name in parts]
            ends = f"{step['total']:.2f}", f"{step['hours']:,.1f}", f"{step['of_peak']:.1%}"
            rows.append((record["name"], *shares, *ends))
    if rows:
        header = ("run", *parts, "step, s", "all steps, hours", "of the peak")
        show_table("where the time of a training step goes", header, rows)


def _show_memory(cfg: PlanConfig, records: list[dict[str, Any]]) -> None:
    names: tuple[str, ...] = ()
    rows = []
    for record in records:
        if "memory_gib" not in record:
            continue
        memory = record["memory_gib"]
        names = tuple(memory)
        figures = [f"{memory[name]:.1f}" for name in names]
        rows.append((record["name"], *figures, "yes" if record["fits"] else "NO"))
    if rows:
        usable = cfg.cluster.gpu_memory_gb - cfg.cluster.reserved_memory_gb
        title = (
            f"memory of the fullest rank, GiB ({usable:g} usable of {cfg.cluster.gpu_memory_gb:g})"
        )
        show_table(title, ("run", *names, "fits"), rows)


def _show_warnings(records: list[dict[str, Any]]) -> None:
    rows = []
    for record in (record for record in records if record.get("fits") is False):
        # A table cuts off cells that are wider than the terminal, and every key counts.
        first, *others = wrap(record["advice"], 60, break_long_words=False, break_on_hyphens=False)
        rows.append((record["name"], f"{record['memory_gib']['total']:.1f} GiB", first))
        rows += [("", "", line) for line in others]
    if rows:
        show_table("DOES NOT FIT", ("run", "needs", "what to change"), rows)
    left = [r for r in records if r["stage"] in _NOT_COUNTED and "ranks" not in r]
    if left:
        rows = [(r["name"], r["stage"], _NOT_COUNTED[r["stage"]]) for r in left]
        show_table("not counted", ("run", "stage", "because"), rows)


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def _short(count: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return f"{count:g}"


def _number(value: float | None, text: Callable[[float], str]) -> str:
    """Write a number, or ``?`` where it depends on the amount of data."""
    return "?" if value is None else text(value)
