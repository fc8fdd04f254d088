"""What ``benchmarks.recipe`` starts from: two kinds of real text, a tokenizer, random models."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 2048
END = "<|endoftext|>"
# Speeches: those before 1900 are what the teacher learns, those since 1945 are the shifted data.
OLD, NEW = range(1790, 1900), range(1945, 2100)
# Every so many of the old speeches only gives beginnings, for the teacher to go on from.
PROMPTS_EVERY = 12
PROMPT_WORDS = 6


def make_inputs(
    folder: Path,
    speeches: Path,
    sizes: Mapping[str, Mapping[str, Any]],
    seeds: list[int],
    architecture: str = "Llama",
) -> None:
    """Write ``old/``, ``new/``, ``prompts.txt`` and ``SEED/NAME`` (Hugging Face folders).

    Args:
        folder: where; nothing is done when an earlier run finished there.
        speeches: one text file each, named ``YEAR-...``.
        sizes: of the models to make, by name; keys of transformers' config of the architecture.
        seeds: of their weights.
        architecture: what transformers' classes of it begin with.
    """
    if (folder / "done").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    _split_text(folder, speeches)
    tokenizer = _train_tokenizer(folder / "old")
    for seed in seeds:
        for name, config in sizes.items():
            _random_model(folder / str(seed) / name, architecture, config, tokenizer, seed)
    (folder / "done").touch()


def _split_text(folder: Path, speeches: Path) -> None:
    years = {path: int(path.name.partition("-")[0]) for path in sorted(speeches.glob("*.txt"))}
    old = [path for path, year in years.items() if year in OLD]
    parts = {
        "old": [path for number, path in enumerate(old) if number % PROMPTS_EVERY],
        "new": [path for path, year in years.items() if year in NEW],
    }
    for name, files in parts.items():
        (folder / name).mkdir(parents=True)
        for path in files:
            shutil.copy(path, folder / name)
    prompts = [_beginnings(path) for path in old[::PROMPTS_EVERY]]
    lines = [line for speech in prompts for line in speech]
    (folder / "prompts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _beginnings(path: Path) -> list[str]:
    """The first words of each paragraph that has some more."""
    paragraphs = [text.split() for text in path.read_text(encoding="utf-8").split("\n\n")]
    return [" ".join(words[:PROMPT_WORDS]) for words in paragraphs if len(words) > 2 * PROMPT_WORDS]


def _train_tokenizer(text: Path) -> "PreTrainedTokenizerFast":
    """A byte-level BPE of the old speeches, as a transformers tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in sorted(text.glob("*.txt"))], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END)


def _random_model(
    folder: Path,
    architecture: str,
    sizes: Mapping[str, Any],
    tokenizer: "PreTrainedTokenizerFast",
    seed: int,
) -> None:
    import transformers

    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    config = getattr(transformers, f"{architecture}Config")(
        **{"tie_word_embeddings": True, **sizes},
        vocab_size=VOCAB_SIZE,
        bos_token_id=end,
        eos_token_id=end,
    )
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "seed.json").write_text(json.dumps({"seed": seed}))
