"""Megatron's ``GPTDataset`` over a pair of tokens, its indices in our cache."""

import copy
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.config.training import DataConfig
from nemo_minitron.data.cache import build_for_all
from nemo_minitron.data.splits import split_bounds, split_numbers
from nemo_minitron.runtime.extensions import before_megatron

if TYPE_CHECKING:
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig


@dataclass(frozen=True)
class TokenData:
    """Tokens on disk, checked: a Megatron pair, a ``.npy`` or a folder of SFT records."""

    kind: str
    """``indexed``, ``npy`` or ``sft``."""
    path: Path
    """Prefix of the pair, the ``.npy`` file, or the folder that ``sft.build_sft`` made."""
    cache: Path
    """Folder for Megatron's sample indices."""
    pad: int = 0
    """Token that fills what SFT records leave of a sample."""


@dataclass(frozen=True)
class _Tokenizer:
    """The little that ``GPTDataset`` asks of a tokenizer once tokens are on disk.

    It has no ``pad``: samples are never padded, and Megatron then masks no real token.
    """

    eod: int | None = None  # read only with the reset flags or eod_mask_loss, which are off
    vocab_size: int | None = None
    unique_identifiers: dict[str, str] = field(default_factory=lambda: {"class": "none"})


def megatron_datasets(
    data: DataConfig, tokens: TokenData, sizes: list[int | None], chosen: list[bool]
) -> list[Any]:
    """GPTDatasets of the chosen splits, None for the others.

    Args:
        data: the data keys.
        tokens: a pair.
        sizes: samples of each split at least; None is one pass over its documents.
        chosen: which of the three splits to build.
    """
    before_megatron()
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset

    config = _gpt_config(data, tokens, chosen)
    key = json.dumps([str(tokens.path), data.seq_length, data.seed, config.split_matrix, sizes])
    folder = tokens.cache / f"samples-{hashlib.sha256(key.encode()).hexdigest()[:24]}"

    def write_indices(into: Path) -> None:
        # Megatron writes its index files in place; here they appear all at once or not at all.
        writing = copy.copy(config)
        writing.path_to_cache = str(into)
        builder = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, writing)
        builder._build_megatron_dataset_splits(
            str(tokens.path), writing.split_matrix, sizes, synchronize_ranks=False
        )

    build_for_all(folder, write_indices)
    config.path_to_cache = str(folder)
    built = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    sequences = next(len(dataset.dataset) for dataset in built if dataset is not None)
    for dataset, bounds in zip(built, split_bounds(data.split, sequences), strict=True):
        assert dataset is None or (dataset.indices[0], dataset.indices[-1] + 1) == bounds
    return list(built)


def _gpt_config(data: DataConfig, tokens: TokenData, chosen: list[bool]) -> "GPTDatasetConfig":
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=data.seed,
        sequence_length=data.seq_length,
        blend=([str(tokens.path)], None),
        split=",".join(split_numbers(data.split)),
        path_to_cache=str(tokens.cache),
        tokenizer=_Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    matrix = config.split_matrix or []
    config.split_matrix = [
        part if keep else None for part, keep in zip(matrix, chosen, strict=True)
    ]
    return config
