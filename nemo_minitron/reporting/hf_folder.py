"""A Hugging Face folder of a checkpoint: weights, config.json, tokenizer and model card."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.checkpoint.lineage import README, copy_licence_texts, read_lineage
from nemo_minitron.checkpoint.tokenizer import AUTO_MAP, TOKENIZER_CONFIG, save_tokenizer
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.documents import read_json_object
from nemo_minitron.families.registry import family_of, written_config
from nemo_minitron.reporting.model_card import model_card
from nemo_minitron.runtime.console import progress

if TYPE_CHECKING:
    from nemo_minitron.checkpoint.lazy import Store


def open_store(checkpoint: Path) -> "tuple[ModelConfig, Store]":
    """Return sizes and store under Hugging Face names; only metadata is read.

    Args:
        checkpoint: ``checkpoint/`` of a result.
    """
    from nemo_minitron.checkpoint.hf import to_hf
    from nemo_minitron.checkpoint.lazy import on_read, refuse_nonfinite
    from nemo_minitron.checkpoint.torch_dist import read_torch_dist

    config = ModelConfig.load(checkpoint)
    family = family_of(config)
    store = read_torch_dist(checkpoint, family, config)
    store = on_read(store, partial(refuse_nonfinite, key="checkpoint"))
    return config, to_hf(family, config, store)


def write_folder(
    checkpoint: Path, folder: Path, *, title: str, max_shard_size: str, workers: int
) -> list[str]:
    """Write config.json, safetensors, tokenizer and README.md.

    Args:
        checkpoint: ``checkpoint/`` of a result.
        folder: an existing folder.
        title: of the model card.
        max_shard_size: largest safetensors file, as in ``5GB``.
        workers: tensors in flight.

    Returns:
        Names of the files with weights.
    """
    from nemo_minitron.checkpoint.hf import copy_generation_config, write_hf
    from nemo_minitron.checkpoint.lazy import on_done

    config, store = open_store(checkpoint)
    tokenizer = checkpoint / "tokenizer"
    with progress("exporting tensors", len(store)) as advance:
        counted = on_done(store, advance)
        files = write_hf(folder, counted, written_config(config), max_shard_size, workers)
    if tokenizer.is_dir():
        save_tokenizer(tokenizer, folder)
        _drop_auto_map(folder / TOKENIZER_CONFIG)
        copy_generation_config(tokenizer, folder)
        copy_licence_texts(tokenizer, folder)
    card = model_card(title, config, read_lineage(checkpoint))
    (folder / README).write_text(card, encoding="utf-8")
    return files


def _drop_auto_map(path: Path) -> None:
    """Drop the key that names Python files, which are not carried over, and change nothing else."""
    values = read_json_object(path) if path.is_file() else {}
    if AUTO_MAP in values:
        del values[AUTO_MAP]
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")
