"""``minitron generate``: text that a model writes, as data for ``finetune``."""

import json
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.checkpoint.artifact import check_output
from nemo_minitron.checkpoint.tokenizer_read import continuation, load_tokenizer, stop_ids
from nemo_minitron.config.inference import GenerateConfig
from nemo_minitron.config.layout import check_cached, check_layout, check_writes
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.data.prompts import Prompt, read_prompts
from nemo_minitron.runtime.ranks import launched_world_size, rank
from nemo_minitron.stages.settings import check_settings, on_ranks, opened_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from nemo_minitron.data.filters import Generated

DATA = "data.jsonl"
_RAW = "samples"


def check(cfg: GenerateConfig) -> None:
    """Refuse bad input before any rank or weight exists.

    Raises:
        ValueError: names the value, the relation and the key to set.
    """
    check_output(cfg, "generate")
    with opened_inputs(cfg):
        model = ModelConfig.load(Path(cfg.checkpoint) / "checkpoint")
        check_layout(model, cfg.parallel)
        check_settings(cfg, model, precision=cfg.precision)
        check_cached(cfg.parallel, "generate writes")
        check_writes(model, "generate writes")
        cfg.parallel.world_size(launched_world_size())
        _prompts(cfg, model)


def _prompts(cfg: GenerateConfig, model: ModelConfig) -> tuple[list[Prompt], Any, frozenset[int]]:
    """Return prompts, tokenizer, and the tokens that end a text."""
    folder = Path(cfg.checkpoint) / "checkpoint" / "tokenizer"
    tokenizer = load_tokenizer(folder)
    stops = stop_ids(folder, tokenizer, model.hf.get("eos_token_id"))
    return read_prompts(cfg, tokenizer, model.max_written_length), tokenizer, stops


def run(cfg: GenerateConfig) -> None:
    """Write ``data.jsonl``; a killed run goes on after the samples that are there."""
    metrics: dict[str, Any] = {}
    with on_ranks(
        cfg, "generate", cfg.parallel, cfg.sampling.seed, resumable=True, temporary=(_RAW,)
    ) as work:
        model = ModelConfig.load(Path(cfg.checkpoint) / "checkpoint")
        prompts, tokenizer, stops = _prompts(cfg, model)
        speed = _sample(cfg, model, prompts, stops, work / _RAW)
        if rank() == 0:
            metrics = {**_write(cfg, prompts, tokenizer, stops, work), **speed}
            (work / "metrics.json").write_text(json.dumps(metrics, indent=1))
    _show(cfg, metrics)


def _sample(
    cfg: GenerateConfig,
    model: ModelConfig,
    prompts: list[Prompt],
    stops: frozenset[int],
    folder: Path,
) -> dict[str, float]:
    """Fill ``folder`` with the samples that are missing (collective); how fast that went."""
    from nemo_minitron.models.build import PRECISION_DTYPES
    from nemo_minitron.models.generate import SampleWriter
    from nemo_minitron.models.inference import CachedModel, Sampling
    from nemo_minitron.models.weights import load_frozen
    from nemo_minitron.runtime.console import progress
    from nemo_minitron.runtime.groups import ParallelGroups
    from nemo_minitron.runtime.stop import StopOnRequest

    groups, dtype = ParallelGroups.current(), PRECISION_DTYPES[cfg.precision]
    chunks = load_frozen(
        Path(cfg.checkpoint) / "checkpoint",
        cfg.parallel,
        groups,
        dtype=dtype,
        megatron=cfg.megatron,
    )
    sampling = cfg.sampling
    writer = SampleWriter(
        CachedModel(chunks[0], groups, model.vocab_size),
        [prompt.ids for prompt in prompts for _ in range(cfg.samples_per_prompt)],
        Sampling(sampling.temperature, sampling.top_p),
        stops,
        seed=sampling.seed,
        max_new_tokens=sampling.max_new_tokens,
        batch_size=cfg.batch_size,
        folder=folder,
    )
    start = time.monotonic()
    with progress("writing samples", len(writer.prompts)) as advance, StopOnRequest() as stop:
        tokens = writer.write(cfg.save_every_n_samples, advance, stop.check)
    seconds = time.monotonic() - start
    return {"seconds": round(seconds, 3), "tokens_per_second": round(tokens / seconds, 1)}


def _write(
    cfg: GenerateConfig,
    prompts: list[Prompt],
    tokenizer: "PreTrainedTokenizerFast",
    stops: frozenset[int],
    work: Path,
) -> dict[str, Any]:
    """Filter what was written into ``data.jsonl``.

    Raises:
        ValueError: nothing is left.
    """
    from nemo_minitron.data.filters import kept_texts
    from nemo_minitron.models.generate import read_samples

    def text_of(sample: "Generated") -> str:
        return sample.prompt + sample.completion if cfg.keep_prompt else sample.completion

    ids = read_samples(work / _RAW)
    samples = [
        _generated(index, new, prompts[index // cfg.samples_per_prompt], tokenizer, stops)
        for index, new in sorted(ids.items())
    ]
    dropped: Counter[str] = Counter()
    kept = list(kept_texts(samples, text_of, cfg.filters, dropped))
    if not kept:
        why = ", ".join(f"{count} by {key}" for key, count in dropped.most_common())
        raise ValueError(
            f"none of the {len(samples)} samples is kept ({why}); loosen filters.* or raise "
            "sampling.max_new_tokens (with other filters the same command does not write them anew)"
        )
    with (work / DATA).open("w", encoding="utf-8") as file:
        for sample in kept:
            record = {"text": text_of(sample), "prompt": sample.prompt, "index": sample.index}
            record |= {"completion": sample.completion, "ended": sample.ended}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return {
        "prompts": len(prompts),
        "samples": len(samples),
        "kept": len(kept),
        "dropped": dict(sorted(dropped.items())),
        "new_tokens": sum(sample.tokens for sample in samples),
        "kept_tokens": sum(sample.tokens for sample in kept),
        "ended": sum(sample.ended for sample in samples),
    }


def _generated(
    index: int,
    new: list[int],
    prompt: Prompt,
    tokenizer: "PreTrainedTokenizerFast",
    stops: frozenset[int],
) -> "Generated":
    """Return a sample as text."""
    from nemo_minitron.data.filters import Generated

    ended = bool(new) and new[-1] in stops
    completion = continuation(tokenizer, prompt.ids, new, stops)
    return Generated(index, prompt.text, completion, len(new), ended)


def _show(cfg: GenerateConfig, metrics: dict[str, Any]) -> None:
    from nemo_minitron.reporting.speed import generation_rows
    from nemo_minitron.runtime.console import show_table

    if metrics:  # rank 0
        show_table("generate", ("", Path(cfg.checkpoint).name), generation_rows(metrics))
