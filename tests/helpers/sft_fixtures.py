"""A tokenizer with a chat template, and SFT records of small conversations."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from tests.helpers.data_fixtures import make_texts, save_tokenizer

PLAIN = (
    "{% for m in messages %}"
    "{{ '<' + m['role'] + '>' + m['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
"""Without marks: what is the answer is found by rendering prefixes."""
MARKED = (
    "{% for m in messages %}"
    "{{ '<' + m['role'] + '>' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
"""The same text with marks."""


def chat_tokenizer(folder: Path, template: str | None = PLAIN) -> int:
    """Save a tokenizer with a chat template; returns its vocabulary size."""
    size = save_tokenizer(folder, make_texts(30), 300)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if template is not None:
        config["chat_template"] = template
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return size


def loaded(folder: Path) -> Any:
    """The tokenizer as transformers reads it."""
    return transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))


def conversations(count: int, seed: int = 0, words: int = 3) -> list[dict[str, Any]]:
    """Records of one or two questions and answers, of different lengths."""
    draw = np.random.default_rng(seed)

    def text(number: int) -> str:
        return " ".join(f"d{number}w{n}" for n in draw.integers(0, 99, draw.integers(1, words + 1)))

    records = []
    for number in range(count):
        messages = [{"role": "system", "content": f"be {number}"}] if number % 3 == 0 else []
        for _ in range(1 + number % 2):
            messages.append({"role": "user", "content": text(number)})
            messages.append({"role": "assistant", "content": text(number + 1)})
        records.append({"messages": messages})
    return records


def write_records(path: Path, records: list[dict[str, Any]]) -> Path:
    """One record a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
