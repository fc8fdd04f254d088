"""A small real tokenizer and small corpora for the data tests."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nemo_minitron.config.training import DataConfig
from nemo_minitron.data.pair import write_index

EOS = "<|end|>"


def save_tokenizer(folder: Path, texts: list[str], vocab_size: int = 400) -> int:
    """Train a byte-level BPE on ``texts`` and save it as a fast-tokenizer folder.

    Returns:
        Its vocabulary size.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    return int(tokenizer.get_vocab_size())


def make_texts(count: int, words: int = 60, seed: int = 0) -> list[str]:
    """Documents of which every word starts with the document's own letters and number."""
    draw = np.random.default_rng(seed)
    return [
        " ".join(
            f"d{document}w{n}" for n in draw.integers(0, 99, int(words * draw.uniform(0.5, 2)))
        )
        for document in range(count)
    ]


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    """One record a line."""
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


def data_config(path: Path | str, **keys: object) -> DataConfig:
    """Small sequences, an even split."""
    return DataConfig(**{"path": str(path), "seq_length": 32, "split": "60/20/20", **keys})  # type: ignore[arg-type]  # keys of any type


def write_pair(
    prefix: Path, documents: int = 40, vocab: int = 90, seed: int = 0, last: int | None = None
) -> str:
    """A Megatron pair of random ids, each document ending with ``last``; returns its prefix."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(10, 90, documents)
    ids = draw.integers(0, vocab, lengths.sum()).astype(np.uint16)
    if last is not None:
        ids[np.cumsum(lengths) - 1] = last
    Path(f"{prefix}.bin").write_bytes(ids.tobytes())
    write_index(prefix, np.uint16, lengths)
    return str(prefix)
