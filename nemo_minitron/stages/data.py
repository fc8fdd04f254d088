"""``minitron data``: weighted texts become tokens of a budget, a blend for training."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import yaml

from nemo_minitron.checkpoint.artifact import check_output, output_folder
from nemo_minitron.config.blend import naming
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.sources import SourcesStageConfig
from nemo_minitron.data.budget import Taken, sources_of, tokenise, write_pair
from nemo_minitron.data.text import INDEXED, find_source
from nemo_minitron.runtime.console import show_table
from nemo_minitron.stages.settings import opened_inputs

log = logging.getLogger(__name__)

BLEND, WORDS = "blend.yaml", "data_args.txt"
_PARTS = "parts"


def check(cfg: SourcesStageConfig) -> None:
    """Refuse bad input; of large sources the first document is read.

    Raises:
        ValueError: names the value, the relation and the key to set.
    """
    from nemo_minitron.data.checks import check_data

    check_output(cfg, "data")
    _place(cfg)
    with opened_inputs(cfg):
        if not _tokenizer(cfg).is_dir():
            raise ValueError(
                f"checkpoint={cfg.checkpoint} has no tokenizer; import the model again with "
                "tokenizer=FOLDER"
            )
        data = cfg.data.as_read()
        for index, source in enumerate(data.sources()):
            with naming(index):
                _refuse_tokens(source.path)
        vocab_size = ModelConfig.load(Path(cfg.checkpoint) / "checkpoint").vocab_size
        check_data(data, splits=("train",), vocab_size=vocab_size, tokenizer_dir=_tokenizer(cfg))


def _refuse_tokens(path: str) -> None:
    if find_source(path).kind == INDEXED:
        raise ValueError(
            f"data.path={path} holds tokens already, and minitron data makes them from text; leave "
            f"it out, and add it to {BLEND} afterwards"
        )


def _place(cfg: SourcesStageConfig) -> Path:
    """Return the final folder of the pairs, for files that refer to them."""
    place = Path(cfg.output_dir).resolve()
    if len(str(place).split()) != 1:
        raise ValueError(
            f"output_dir={cfg.output_dir} has blanks, between which Megatron-LM would read several "
            "paths; set another output_dir"
        )
    return place


def _tokenizer(cfg: SourcesStageConfig) -> Path:
    return Path(cfg.checkpoint) / "checkpoint" / "tokenizer"


def run(cfg: SourcesStageConfig) -> None:
    """Write the pairs and the files that name them; a killed run goes on with the files it read."""
    data, place = cfg.data.as_read(), _place(cfg)
    names = [re.sub(r"\W+", "_", name) for name in data.names()]
    weights = [source["weight"] for source in data.blend]
    with output_folder(cfg, "data", resumable=True, temporary=(_PARTS,)) as work:
        vocab_size = ModelConfig.load(Path(cfg.checkpoint) / "checkpoint").vocab_size
        sources = sources_of(data, cfg.shares(), _tokenizer(cfg), vocab_size, work / _PARTS)
        tokenise(sources, cfg.workers)
        taken = []
        for index, (source, name) in enumerate(zip(sources, names, strict=True)):
            with naming(index):
                taken.append(write_pair(source, work / name))
                _check_epochs(cfg, index, taken[-1])
        pairs = [(w, str(place / name)) for w, name in zip(weights, names, strict=True)]
        listed = [{"weight": weight, "path": path} for weight, path in pairs]
        (work / BLEND).write_text(yaml.safe_dump(listed, sort_keys=False))
        (work / WORDS).write_text("".join(f"{weight} {path}\n" for weight, path in pairs))
        metrics = _metrics(cfg, names, taken)
        (work / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    _show(cfg, metrics)


def _check_epochs(cfg: SourcesStageConfig, index: int, taken: Taken) -> None:
    """Say how often a source is read that is shorter than its share.

    Raises:
        ValueError: more often than ``data.blend_max_epochs`` allows.
    """
    share, limit = cfg.shares()[index], cfg.data.blend_max_epochs
    epochs = share / taken.tokens
    said = (
        f"data.path={cfg.data.blend[index]['path']} has {taken.tokens:,} tokens, and its share of "
        f"total_tokens={cfg.total_tokens} is {share:,}, {epochs:.2f} epochs"
    )
    if limit is not None and epochs > limit:
        raise ValueError(
            f"{said}, more than data.blend_max_epochs={limit}; lower total_tokens or raise "
            "data.blend_max_epochs to go on with what is tokenised, or add text or lower its "
            "weight with overwrite=true"
        )
    if epochs > 1:
        log.warning("%s", said)


def _metrics(cfg: SourcesStageConfig, names: list[str], taken: list[Taken]) -> dict[str, Any]:
    sources = {
        name: {"share": share, **one._asdict(), "epochs": round(max(share / one.tokens, 1.0), 4)}
        for name, share, one in zip(names, cfg.shares(), taken, strict=True)
    }
    return {"total_tokens": sum(one.tokens for one in taken), "sources": sources}


def _show(cfg: SourcesStageConfig, metrics: dict[str, Any]) -> None:
    head = ("source", "tokens", "of share", "epochs", "documents", "repeats", "files")
    rows = [
        [
            name,
            f"{one['tokens']:,}",
            f"{one['share']:,}",
            f"{one['epochs']:.2f}",
            f"{one['documents']:,}",
            f"{one['repeats']:,}",
            f"{one['files']} of {one['of_files']}",
        ]
        for name, one in metrics["sources"].items()
    ]
    show_table(f"data.blend={Path(cfg.output_dir) / BLEND}", head, rows)
