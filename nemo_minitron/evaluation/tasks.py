"""Tasks of lm-eval: found and refused at start-up, and their results as numbers.

lm-eval is imported where it is used: it brings transformers and datasets along.
"""

import contextlib
import difflib
import importlib.util
import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.config.inference import LmEvalConfig

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

GENERATES = "generate_until"
_KINDS = ("loglikelihood", "loglikelihood_rolling", "multiple_choice", GENERATES)
# What may be asked of a generation: nothing else changes greedy answers.
_GREEDY_KEYS = {"do_sample", "until", "max_gen_toks", "temperature", "top_p", "top_k"}
MAX_GEN_TOKS = 256
"""Tokens of an answer where the task does not say; lm-eval's default."""

Metrics = dict[str, dict[str, dict[str, float | None]]]
"""Task -> metric -> ``value`` and ``stderr`` (None where lm-eval reports none)."""


def check_installed() -> None:
    """Refuse tasks where lm-eval is not installed.

    Raises:
        ValueError: says how to install it.
    """
    missing = [n for n in ("lm_eval", "accelerate") if importlib.util.find_spec(n) is None]
    if missing:
        raise ValueError(
            f"tasks need the package {' and '.join(missing)}, which is not installed: pip install "
            "'nemo_minitron[eval]', or leave tasks out"
        )


def find_tasks(tasks: Sequence[str], path: str | None) -> "TaskManager":
    """Return lm-eval's index of tasks, which has all that are named.

    Its own 14,000 tasks take 10 seconds to list: only if ``path`` does not have them all.

    Args:
        tasks: names of tasks, groups or tags.
        path: the user's folder of task files.

    Raises:
        ValueError: an unknown task (with near names), or ``tasks_path`` is not a folder.
    """
    from lm_eval.tasks import TaskManager

    if path is not None:
        if not Path(path).is_dir():
            raise ValueError(f"tasks_path={path} is not a folder; set it to one with task files")
        own = TaskManager(include_path=path, include_defaults=False)
        if not own.all_tasks:
            raise ValueError(
                f"tasks_path={path} holds no task: no .yaml in it has a key task or group; set "
                "tasks_path to a folder of lm-eval task files"
            )
        if set(tasks) <= set(own.all_tasks):
            return own
    every = TaskManager(include_path=path)
    unknown = [name for name in tasks if name not in every.task_index]
    if unknown:
        raise ValueError(_unknown(unknown[0], every.all_tasks, path))
    return every


def _unknown(name: str, known: Sequence[str], path: str | None) -> str:
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.6)
    near += [other for other in known if name.lower() in other.lower() and other not in near][:3]
    hint = f"near names: {', '.join(near)}" if near else "lm-eval ls tasks lists all"
    where = "tasks_path" if path is None else f"tasks_path={path}"
    return (
        f"tasks holds {name}, which neither lm-eval nor {where} knows; {hint}; set tasks to a "
        "name, or tasks_path to a folder of task files"
    )


def load_tasks(tasks: Sequence[str], path: str | None) -> tuple["TaskManager", dict[str, "Task"]]:
    """Read the tasks and their data sets.

    Returns:
        The index, and the single tasks by name (those of groups too).

    Raises:
        ValueError: as ``find_tasks``; or data that are not on this machine and cannot be fetched.
    """
    manager = find_tasks(tasks, path)
    found: dict[str, Task] = {}
    for name in tasks:
        try:
            found |= manager.load(name)["tasks"]
        except OSError as error:  # datasets' own errors (missing, offline) are among these
            raise ValueError(
                f"tasks={name}: its data cannot be read ({_first_line(error)}); run it once where "
                "there is a network and set HF_HOME to that cache, or give the task local files "
                "(dataset_path: json, dataset_kwargs: {data_files: ...}) in a file of tasks_path"
            ) from error
    return manager, found


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def check_kinds(tasks: Mapping[str, "Task"], max_length: int, *, megatron: bool) -> list[str]:
    """Refuse tasks that a model cannot answer.

    Args:
        tasks: by name.
        max_length: tokens of the longest request.
        megatron: whether the model is a Megatron checkpoint, which answers greedily.

    Returns:
        Names of the tasks that generate text.

    Raises:
        ValueError: names the task, what it asks for and the way out.
    """
    generating = []
    for name, task in tasks.items():
        kind = task.get_config("output_type")
        if kind not in _KINDS or getattr(task, "MULTIMODAL", False):
            raise ValueError(
                f"tasks={name} has output_type {kind}, which evaluate does not serve; it serves "
                f"{', '.join(_KINDS)} of text: leave the task out"
            )
        if getattr(task, "UNSAFE_CODE", False):
            raise ValueError(
                f"tasks={name} runs code that the model wrote, which evaluate does not; leave it "
                "out, or run lm_eval on an exported folder"
            )
        if kind == GENERATES:
            _check_generation(name, task, max_length, megatron=megatron)
            generating.append(name)
    return generating


def _check_generation(name: str, task: "Task", max_length: int, *, megatron: bool) -> None:
    from lm_eval.models.utils import normalize_gen_kwargs

    with _quiet():  # it warns of keys that it changes
        asked = normalize_gen_kwargs(task.get_config("generation_kwargs") or {}, MAX_GEN_TOKS)
    more = sorted(set(asked) - _GREEDY_KEYS)
    if megatron and (asked["do_sample"] or more):
        what = (
            f"{', '.join(more)}" if more else f"do_sample with temperature {asked['temperature']}"
        )
        raise ValueError(
            f"tasks={name} asks for {what}, but a Megatron checkpoint answers greedily; export the "
            "model and set checkpoint to the export, or leave the task out"
        )
    if asked["max_gen_toks"] >= max_length:
        raise ValueError(
            f"tasks={name} generates {asked['max_gen_toks']} tokens, which leaves no room for a "
            f"question in lm_eval.max_length={max_length}; raise lm_eval.max_length, or leave the "
            "task out"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence lm-eval's warnings and prints."""
    logger = logging.getLogger("lm_eval")
    before, logger.disabled = logger.disabled, True
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.disabled = before


def run_tasks(model: "LM", tasks: Sequence[str], path: str | None, cfg: LmEvalConfig) -> Metrics:
    """Run tasks on a model.

    Raises:
        ValueError: as ``load_tasks``.
    """
    from lm_eval import simple_evaluate

    # Its pool of processes would be forked from one that has threads, and maybe a GPU.
    os.environ["DISABLE_MULTIPROC"] = "1"
    manager, _ = load_tasks(tasks, path)
    found = simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=manager,
        num_fewshot=cfg.num_fewshot,
        limit=cfg.limit,
        bootstrap_iters=cfg.bootstrap_iters,
        log_samples=False,
    )
    return task_metrics(found["results"])


def task_metrics(results: Mapping[str, Mapping[str, Any]]) -> Metrics:
    """Return lm-eval's ``metric,filter`` and ``metric_stderr,filter`` of every task as pairs.

    The filter is left out of the name where it is ``none``.
    """
    found: Metrics = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{chosen}")
            name = metric if chosen == "none" else key
            found.setdefault(task, {})[name] = {
                "value": float(value),
                "stderr": float(error) if isinstance(error, int | float) else None,
            }
    return found


def check_metric(tasks: Mapping[str, "Task"], names: Sequence[str], metric: str) -> None:
    """Refuse a metric that a task does not have. What a group has is known after it was run.

    Raises:
        ValueError: names the task and its metrics.
    """
    for name in names:
        known = sorted(tasks[name].aggregation()) if name in tasks else None
        if known is not None and metric.partition(",")[0] not in known:
            raise ValueError(
                f"task_metric={metric} is not a metric of tasks={name}, which has "
                f"{', '.join(known)}; set task_metric to one of them"
            )


def mean_metric(found: Metrics, names: Sequence[str], metric: str) -> float:
    """Return the mean of one metric over the tasks that were named, a group counting as one task.

    Raises:
        ValueError: a task or group does not have it.
    """
    for name in names:
        if metric not in found.get(name, {}):
            raise ValueError(
                f"task_metric={metric} is not a metric of tasks={name}, which has "
                f"{', '.join(found.get(name, {})) or 'no figure of its own'}; set task_metric to "
                "one of them, or name the tasks of a group one by one"
            )
    values = [found[name][metric]["value"] for name in names]
    return sum(value for value in values if value is not None) / len(values)
