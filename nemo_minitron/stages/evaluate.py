"""``minitron evaluate``: loss on held-out data, tasks of lm-eval, continuations of prompts."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.checkpoint.artifact import check_output, output_folder
from nemo_minitron.checkpoint.output_checks import is_export
from nemo_minitron.checkpoint.tokenizer_read import continuation, load_tokenizer, stop_ids
from nemo_minitron.config.inference import EvaluateConfig
from nemo_minitron.config.layout import check_cached, check_writes
from nemo_minitron.config.megatron import ForwardMegatronConfig
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.evaluation.tasks import run_tasks
from nemo_minitron.runtime.ranks import launched_world_size, rank
from nemo_minitron.stages.settings import check_forward, on_ranks, opened_inputs
from nemo_minitron.stages.tasks import answer_tasks, check_tasks, max_length, ready_to_answer

if TYPE_CHECKING:
    from nemo_minitron.evaluation.answers import Answers


def check(cfg: EvaluateConfig) -> None:
    """Refuse bad input before any rank or weight exists.

    Raises:
        ValueError: names the value, the relation and the key to set.
    """
    if not cfg.data.given and not cfg.tasks and not cfg.sample_prompts:
        raise ValueError(
            "evaluate needs data.path, tasks or sample_prompts; add data.path=... (text, for the "
            "loss), tasks=[...] (of lm-eval) or sample_prompts=[...] (that the model continues)"
        )
    if cfg.tasks_path is not None and not cfg.tasks:
        raise ValueError(
            f"tasks_path={cfg.tasks_path} is for tasks, but tasks is empty; add tasks=[...]"
        )
    check_output(cfg, "evaluate")
    with opened_inputs(cfg, exports=True):
        export, model = is_export(cfg.checkpoint), _model(cfg)
        if export:
            _check_export(cfg)
        else:
            check_forward(cfg, model, cfg.data if cfg.data.given else None)
        if cfg.tasks:
            check_tasks(cfg, model, export=export)
        if cfg.sample_prompts:
            _check_prompts(cfg, model)


def _model(cfg: EvaluateConfig) -> ModelConfig:
    """Return the config of the model to evaluate, a Megatron or a Hugging Face one."""
    folder = Path(cfg.checkpoint)
    if not is_export(cfg.checkpoint):
        return ModelConfig.load(folder / "checkpoint")
    from nemo_minitron.checkpoint.hf import model_config, open_hf
    from nemo_minitron.families.config_json import unknown_keys
    from nemo_minitron.families.registry import family_of_hf

    config, store = open_hf(folder)
    # An export holds what its source did, also keys that import was told to pass over.
    passed_over = unknown_keys(config, family_of_hf(config).hf_reads)
    return model_config(config, store, list(passed_over))[1]


def _check_export(cfg: EvaluateConfig) -> None:
    if cfg.data.given:
        raise ValueError(
            f"checkpoint={cfg.checkpoint} is an export, whose loss evaluate does not measure; set "
            "checkpoint to the result that was exported, or leave data.path out"
        )
    if cfg.sample_prompts:
        raise ValueError(
            f"checkpoint={cfg.checkpoint} is an export, which does not continue prompts here; set "
            "checkpoint to the result that was exported, or leave sample_prompts out"
        )
    if cfg.parallel != ParallelConfig() or (launched_world_size() or 1) > 1:
        raise ValueError(
            f"checkpoint={cfg.checkpoint} is an export, which lm-eval runs in one process; leave "
            "parallel.* and the launcher out, or set checkpoint to the result that was exported"
        )
    if cfg.megatron != ForwardMegatronConfig():
        raise ValueError(
            f"checkpoint={cfg.checkpoint} is an export, which lm-eval runs without Megatron; leave "
            "megatron.* out, or set checkpoint to the result that was exported"
        )


def _check_prompts(cfg: EvaluateConfig, model: ModelConfig) -> None:
    check_cached(cfg.parallel, "sample_prompts let the model write")
    check_writes(model, "sample_prompts let the model write")
    folder = Path(cfg.checkpoint) / "checkpoint" / "tokenizer"
    tokenizer = load_tokenizer(folder)
    stop_ids(folder, tokenizer, model.hf.get("eos_token_id"))
    longest = max(len(tokenizer.encode(prompt)) for prompt in cfg.sample_prompts)
    if longest + cfg.sample_tokens > model.max_written_length:
        raise ValueError(
            f"the longest of sample_prompts has {longest} tokens, and with sample_tokens="
            f"{cfg.sample_tokens} it exceeds the {model.max_written_length} positions of the "
            "model; shorten it, or lower sample_tokens"
        )


def run(cfg: EvaluateConfig) -> None:
    """Evaluate and write ``metrics.json``."""
    from nemo_minitron.families.registry import family_of
    from nemo_minitron.families.table import parameter_count

    model = _model(cfg)
    metrics: dict[str, Any] = {"parameters": parameter_count(family_of(model), model)}
    if is_export(cfg.checkpoint):
        with output_folder(cfg, "evaluate") as work:
            metrics |= tasks_of_export(cfg, model)
            (work / "metrics.json").write_text(json.dumps(metrics, indent=1))
        return _show(cfg, metrics)
    with on_ranks(cfg, "evaluate", cfg.parallel, cfg.data.seed) as work:
        metrics |= _evaluate(cfg, model)
        if rank() == 0:
            (work / "metrics.json").write_text(json.dumps(metrics, indent=1))
    _show(cfg, metrics)


def _evaluate(cfg: EvaluateConfig, model: ModelConfig) -> dict[str, Any]:
    from nemo_minitron.data.datasets import stage_dataset
    from nemo_minitron.evaluation.lm_loss import evaluate_lm
    from nemo_minitron.models.documents import check_shared
    from nemo_minitron.models.weights import load_frozen
    from nemo_minitron.runtime.groups import ParallelGroups

    folder = Path(cfg.checkpoint) / "checkpoint"
    groups = ParallelGroups.current()
    dataset = None
    if cfg.data.given:
        dataset = stage_dataset(cfg.data, model, folder, cfg.output_dir)
        check_shared(dataset, cfg.data, model, cfg.parallel)
    chunks = load_frozen(folder, cfg.parallel, groups, megatron=cfg.megatron)
    metrics: dict[str, Any] = {}
    if dataset is not None:
        metrics |= evaluate_lm(chunks, groups, model.vocab_size, dataset, cfg.data)
    if cfg.tasks or cfg.sample_prompts:
        answers = ready_to_answer(cfg, model, chunks, groups)
        metrics |= answer_tasks(cfg, model, answers) if cfg.tasks else {}
        metrics |= _continued(cfg, answers) if cfg.sample_prompts else {}
    return metrics


def _show(cfg: EvaluateConfig, metrics: dict[str, Any]) -> None:
    from nemo_minitron.reporting.rows import task_scores
    from nemo_minitron.runtime.console import show_table, show_texts

    rows = [("parameters", f"{metrics['parameters']['total']:,}")]
    if "lm_loss" in metrics:
        rows += [
            ("LM loss", f"{metrics['lm_loss']:.4f}"),
            ("perplexity", f"{metrics['perplexity']:.2f}"),
            ("tokens", f"{metrics['tokens']:,}"),
            ("tokens/s", f"{metrics['tokens_per_second']:.0f}"),
        ]
    rows += task_scores(metrics).items()
    name = Path(cfg.checkpoint).name
    show_table("evaluate", ("", name), rows)
    show_texts([(name, text) for text in metrics.get("texts", [])])


def tasks_of_export(cfg: EvaluateConfig, model: ModelConfig) -> dict[str, Any]:
    """Return metrics of an exported folder, by lm-eval's own Hugging Face backend."""
    from nemo_minitron.evaluation.lm_eval_models import hf_model

    start = time.monotonic()
    lm = hf_model(
        Path(cfg.checkpoint),
        max_length=max_length(cfg, model),
        batch_size=cfg.lm_eval.batch_size,
    )
    found = run_tasks(lm, cfg.tasks, cfg.tasks_path, cfg.lm_eval)
    return {"tasks": found, "tasks_seconds": round(time.monotonic() - start, 3)}


def _continued(cfg: EvaluateConfig, answers: "Answers") -> dict[str, Any]:
    """Return each prompt with the text that the model writes after it (collective)."""
    from nemo_minitron.evaluation.requests import Continuations

    tokenizer = answers.tokenizer
    prompts = [tokenizer.encode(prompt) for prompt in cfg.sample_prompts]
    written = answers.continued(Continuations(prompts, cfg.sample_tokens, stop=[]))
    texts = [
        {"prompt": text, "completion": continuation(tokenizer, ids, new, answers.stops)}
        for text, ids, new in zip(cfg.sample_prompts, prompts, written, strict=True)
    ]
    return {"texts": texts}
