"""The tasks of ``minitron evaluate``: checks, and answers of either kind of model."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.checkpoint.tokenizer_files import tokenizer_files
from nemo_minitron.checkpoint.tokenizer_read import load_tokenizer, stop_ids
from nemo_minitron.config.inference import EvaluateConfig
from nemo_minitron.config.layout import check_cached
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.evaluation.tasks import (
    check_installed,
    check_kinds,
    load_tasks,
    run_tasks,
)

if TYPE_CHECKING:
    from nemo_minitron.evaluation.requests import Question
    from nemo_minitron.models.build import HiddenGPTModel
    from nemo_minitron.runtime.groups import ParallelGroups


def check_tasks(cfg: EvaluateConfig, model: ModelConfig, *, export: bool) -> None:
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
    limit = model.max_seq_length
    if limit is not None and max_length(cfg, model) > limit:
        raise ValueError(
            f"lm_eval.max_length={cfg.lm_eval.max_length} is longer than max_position_embeddings="
            f"{limit} of the model, whose positions end there; lower lm_eval.max_length"
        )
    _, tasks = load_tasks(cfg.tasks, cfg.tasks_path)
    generating = check_kinds(tasks, max_length(cfg, model), megatron=not export)
    if generating and not export:
        check_cached(cfg.parallel, f"tasks={generating[0]} lets the model write")


def max_length(cfg: EvaluateConfig, model: ModelConfig) -> int:
    """Tokens of the longest request, a length that the layout can cut."""
    multiple = cfg.parallel.sequence_multiple
    wanted = cfg.lm_eval.max_length or model.max_position_embeddings
    return max(wanted // multiple, 1) * multiple


def tasks_of_export(cfg: EvaluateConfig, model: ModelConfig) -> dict[str, Any]:
    """Metrics of an exported folder, by lm-eval's own Hugging Face backend."""
    from nemo_minitron.evaluation.lm_eval_models import hf_model

    start = time.monotonic()
    lm = hf_model(
        Path(cfg.checkpoint),
        max_length=max_length(cfg, model),
        batch_size=cfg.lm_eval.batch_size,
    )
    found = run_tasks(lm, cfg.tasks, cfg.tasks_path, cfg.lm_eval)
    return {"tasks": found, "tasks_seconds": round(time.monotonic() - start, 3)}


def answer_tasks(
    cfg: EvaluateConfig,
    model: ModelConfig,
    chunks: "list[HiddenGPTModel]",
    groups: "ParallelGroups",
) -> dict[str, Any]:
    """Metrics of a Megatron model; rank 0 runs lm-eval, and every rank the model (collective)."""
    from nemo_minitron.evaluation.answers import Answers
    from nemo_minitron.evaluation.lm_eval_models import MegatronLM
    from nemo_minitron.evaluation.lockstep import led_by_first
    from nemo_minitron.evaluation.requests import RequestScorer

    folder = Path(cfg.checkpoint) / "checkpoint" / "tokenizer"
    tokenizer = load_tokenizer(folder)
    start = time.monotonic()
    multiple = cfg.parallel.sequence_multiple
    scorer = RequestScorer(chunks, groups, model.vocab_size, cfg.lm_eval.batch_size, multiple)
    stops = stop_ids(folder, tokenizer, model.hf.get("eos_token_id"))
    answers = Answers(scorer, tokenizer, stops)

    def lead(ask: "Callable[[Question], Any]") -> Any:
        lm = MegatronLM(ask, tokenizer, max_length=max_length(cfg, model))
        return run_tasks(lm, cfg.tasks, cfg.tasks_path, cfg.lm_eval)

    found = led_by_first(lead, answers)
    return {"tasks": found, "tasks_seconds": round(time.monotonic() - start, 3)}
