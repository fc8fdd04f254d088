"""A model with a tokenizer, and a folder of small tasks for lm-eval that need no network."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from nemo_minitron.families.llama import LLAMA as FAMILY
from tests.helpers.bad_input import done, line, run_line
from tests.helpers.data_fixtures import EOS, make_texts, save_tokenizer
from tests.helpers.tiny import LLAMA

_HEAD = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {docs}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
"""
_TASKS = {
    "mini_choice": ("multiple_choice", "doc_to_choice: choices\ndoc_to_target: answer\n", "acc"),
    "mini_cloze": ("loglikelihood", 'doc_to_target: "{{choices[0]}}"\n', "perplexity"),
    "mini_text": ("loglikelihood_rolling", 'doc_to_target: "{{text}}"\n', "bits_per_byte"),
    "mini_answer": (
        "generate_until",
        'doc_to_target: "{{answer_text}}"\n'
        "generation_kwargs: {do_sample: false, max_gen_toks: 12, until: [w]}\n",
        "exact_match",
    ),
}
_NO_QUESTION = {"mini_text"}


def write_tasks(
    folder: Path, documents: int = 12, answered: Callable[[str], str] = lambda question: "no"
) -> Path:
    """Task files, and the documents they all read.

    Args:
        folder: where.
        documents: of each task.
        answered: right answer to every other question; the rest have none.
    """
    folder.mkdir(parents=True)
    texts = make_texts(documents, words=30, seed=7)
    docs = folder / "docs.jsonl"
    rows = [_document(number, text) for number, text in enumerate(texts)]
    for row in rows[::2]:
        row["answer_text"] = answered(str(row["question"]))
    docs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, (kind, more, metric) in _TASKS.items():
        head = _HEAD.format(name=name, kind=kind, docs=docs)
        if name in _NO_QUESTION:
            head = head.replace('"{{question}}"', '""')
        (folder / f"{name}.yaml").write_text(f"{head}{more}metric_list:\n  - metric: {metric}\n")
    return folder


def _document(number: int, text: str) -> dict[str, object]:
    words = text.split()
    return {
        "question": " ".join(words[: 3 + number]),
        "choices": [f" {word}" for word in words[-3:]],
        "answer": number % 3,
        "answer_text": "none",
        "text": text,
    }


def build_model(home: Path) -> None:
    """``hf``, ``model`` (imported) and ``exported``: a random model that is not quite random.

    Weights five times the usual make choices differ.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    vocab = save_tokenizer(home / "hf", make_texts(30))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS}
    (home / "hf" / "tokenizer_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    sizes = FAMILY.to_hf(replace(LLAMA, vocab_size=vocab, max_position_embeddings=64))
    LlamaForCausalLM(LlamaConfig(**{**sizes, "initializer_range": 0.1})).save_pretrained(
        home / "hf"
    )
    done(run_line(line("import", home, home / "model")))
    done(run_line(line("export", home, home / "exported")))
