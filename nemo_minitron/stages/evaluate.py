"""``minitron evaluate``: language-model loss and perplexity on held-out data."""

import json
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoint.artifact import check_output
from nemo_minitron.config.layout import check_layout
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.stages import EvaluateConfig
from nemo_minitron.data.checks import check_batches, check_data
from nemo_minitron.runtime.ranks import launched_world_size
from nemo_minitron.stages.inputs import open_checkpoint


def check(cfg: EvaluateConfig) -> None:
    """Refuse bad input before any rank or weight exists.

    Raises:
        ValueError: names the value, the relation and the key to set.
    """
    check_output(cfg, "evaluate")
    open_checkpoint(cfg, "size")
    folder = Path(cfg.checkpoint) / "checkpoint"
    model = ModelConfig.load(folder)
    check_layout(model, cfg.parallel)
    check_batches(cfg.data, cfg.parallel, cfg.parallel.world_size(launched_world_size()))
    check_data(
        cfg.data,
        vocab_size=model.vocab_size,
        tokenizer_dir=folder / "tokenizer",
        max_seq_length=model.max_seq_length,
    )
    # Whole-file hashes last: a typing mistake should not cost a pass over the weights.
    if cfg.verify_inputs != "size":
        open_checkpoint(cfg, cfg.verify_inputs)


def run(cfg: EvaluateConfig) -> None:
    """Evaluate and write ``metrics.json``."""
    from nemo_minitron.checkpoint.artifact import Ranks, output_folder
    from nemo_minitron.runtime.launch import barrier, distributed
    from nemo_minitron.runtime.ranks import rank

    with distributed(cfg.parallel, cfg.data.seed):
        ranks = Ranks(rank(), barrier)
        with output_folder(cfg, "evaluate", ranks=ranks) as work:
            metrics = _evaluate(cfg)
            if ranks.rank == 0:
                (work / "metrics.json").write_text(json.dumps(metrics, indent=1))
    _show(cfg, metrics)


def _evaluate(cfg: EvaluateConfig) -> dict[str, Any]:
    from nemo_minitron.evaluation.lm_loss import evaluate_lm
    from nemo_minitron.families.registry import family_of
    from nemo_minitron.families.table import parameter_count
    from nemo_minitron.models.build import build_gpt
    from nemo_minitron.models.stage_data import stage_dataset
    from nemo_minitron.models.weights import load_weights
    from nemo_minitron.runtime.groups import ParallelGroups
    from nemo_minitron.runtime.launch import device

    folder = Path(cfg.checkpoint) / "checkpoint"
    model = ModelConfig.load(folder)
    dataset = stage_dataset(cfg.data, model, folder, cfg.output_dir)
    groups = ParallelGroups.current()
    chunks = [chunk.to(device()) for chunk in build_gpt(model, cfg.parallel, groups)]
    load_weights(chunks, groups, folder)
    for chunk in chunks:
        chunk.eval()
        chunk.return_hidden = True
    metrics = evaluate_lm(chunks, groups, model.vocab_size, dataset, cfg.data)
    return {**metrics, "parameters": parameter_count(family_of(model), model)}


def _show(cfg: EvaluateConfig, metrics: dict[str, Any]) -> None:
    from nemo_minitron.reporting.console import show_table

    rows = [
        ("parameters", f"{metrics['parameters']['total']:,}"),
        ("LM loss", f"{metrics['lm_loss']:.4f}"),
        ("perplexity", f"{metrics['perplexity']:.2f}"),
        ("tokens", f"{metrics['tokens']:,}"),
        ("tokens/s", f"{metrics['tokens_per_second']:.0f}"),
    ]
    show_table("evaluate", ("", Path(cfg.checkpoint).name), rows)
