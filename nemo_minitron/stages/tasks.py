"""Tasks of lm-eval as ``evaluate`` and ``search`` run them on a Megatron model."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.checkpoint.tokenizer import tokenizer_files
from nemo_minitron.checkpoint.tokenizer_read import load_tokenizer, stop_ids
from nemo_minitron.config.inference import EvaluateConfig
from nemo_minitron.config.layout import check_cached, check_writes
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.search import SearchConfig
from nemo_minitron.evaluation.tasks import (
    check_installed,
    check_kinds,
    check_metric,
    load_tasks,
    run_tasks,
)
from nemo_minitron.families.registry import longest_sequence

if TYPE_CHECKING:
    from nemo_minitron.evaluation.answers import Answers
    from nemo_minitron.evaluation.requests import Question
    from nemo_minitron.models.build import HiddenGPTModel
    from nemo_minitron.runtime.groups import ParallelGroups

TaskConfig = EvaluateConfig | SearchConfig
"""A stage with ``tasks``, ``tasks_path``, ``lm_eval``, ``parallel`` and ``checkpoint``."""


def check_tasks(cfg: TaskConfig, model: ModelConfig, *, export: bool) -> None:
    """Refuse tasks that do not exist, whose data are missing, or that the model cannot answer.

    Raises:
        ValueError: names the task or key, and the way out.
    """
    folder = Path(cfg.checkpoint) if export else Path(cfg.checkpoint) / "checkpoint" / "tokenizer"
    if not tokenizer_files(folder):
        raise ValueError(
            f"tasks={','.join(cfg.tasks)} are text, and checkpoint={cfg.checkpoint} has no "
            "tokenizer; import the model from a source that has one"
        )
    if not export:
        load_tokenizer(folder)
    check_installed()
    limit = model.max_seq_length if export else longest_sequence(model)
    if limit is not None and max_length(cfg, model) > limit:
        raise ValueError(
            f"lm_eval.max_length={cfg.lm_eval.max_length} is longer than {limit}, where the "
            "positions of the model end: its max_position_embeddings, or a sliding_window above "
            "them; lower lm_eval.max_length"
        )
    longest = model.longrope_length
    if not export and longest is not None and max_length(cfg, model) > longest:
        raise ValueError(
            f"lm_eval.max_length={cfg.lm_eval.max_length} must be at most "
            f"original_max_position_embeddings={longest} with rope_scaling of type longrope, which "
            "rotates all tokens of a batch by its longest text; lower it"
        )
    _, tasks = load_tasks(cfg.tasks, cfg.tasks_path)
    if isinstance(cfg, SearchConfig):
        check_metric(tasks, cfg.tasks, cfg.task_metric)
    generating = check_kinds(tasks, max_length(cfg, model), megatron=not export)
    if generating and not export:
        check_cached(cfg.parallel, f"tasks={generating[0]} lets the model write")
        check_writes(model, f"tasks={generating[0]} lets the model write")


def max_length(cfg: TaskConfig, model: ModelConfig) -> int:
    """Return tokens of the longest request, a length that the layout can cut."""
    multiple = cfg.parallel.sequence_multiple
    wanted = cfg.lm_eval.max_length or model.max_written_length
    return max(wanted // multiple, 1) * multiple


def ready_to_answer(
    cfg: TaskConfig,
    model: ModelConfig,
    chunks: "list[HiddenGPTModel]",
    groups: "ParallelGroups",
) -> "Answers":
    """Return the model with its tokenizer, ready to be asked."""
    from nemo_minitron.evaluation.answers import Answers
    from nemo_minitron.evaluation.requests import RequestScorer

    folder = Path(cfg.checkpoint) / "checkpoint" / "tokenizer"
    tokenizer = load_tokenizer(folder)
    multiple = cfg.parallel.sequence_multiple
    scorer = RequestScorer(chunks, groups, model.vocab_size, cfg.lm_eval.batch_size, multiple)
    return Answers(scorer, tokenizer, stop_ids(folder, tokenizer, model.hf.get("eos_token_id")))


def answer_tasks(cfg: TaskConfig, model: ModelConfig, answers: "Answers") -> dict[str, Any]:
    """Return a Megatron model's metrics: rank 0 runs lm-eval, all ranks the model (collective)."""
    from nemo_minitron.evaluation.lm_eval_models import MegatronLM
    from nemo_minitron.evaluation.lockstep import led_by_first

    start = time.monotonic()

    def lead(ask: "Callable[[Question], Any]") -> Any:
        lm = MegatronLM(ask, answers.tokenizer, max_length=max_length(cfg, model))
        return run_tasks(lm, cfg.tasks, cfg.tasks_path, cfg.lm_eval)

    found = led_by_first(lead, answers)
    return {"tasks": found, "tasks_seconds": round(time.monotonic() - start, 3)}
