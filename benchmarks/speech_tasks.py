"""Two lm-eval tasks out of speeches that no training sees, and the folder of those it may see.

- ``speech_next``: which of four continuations a speech has; the others come from other speeches.
- ``speech_bits``: bits per byte of the beginnings of speeches.
"""

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

# Task -> its metric.
TASKS = {"speech_next": "acc", "speech_bits": "bits_per_byte"}
HELD_OUT_EVERY = 15
QUESTIONS, CONTEXT_WORDS, CHOICE_WORDS = 60, 40, 8
BEGINNING_WORDS = 200

_HEAD = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {docs}}}
test_split: test
output_type: {kind}
doc_to_text: {question}
doc_to_target: {target}
{more}metric_list:
  - metric: {metric}
"""
_CHOICES = "doc_to_choice: choices\n"


def write_tasks(folder: Path, speeches: Path) -> Path:
    """Write ``text/`` (for training) and ``tasks/`` (what ``tasks_path`` takes) into ``folder``.

    Args:
        folder: where; nothing is done when an earlier run finished there.
        speeches: one text file each.

    Returns:
        ``folder``.
    """
    if (folder / "done").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    files = sorted(speeches.glob("*.txt"))
    (folder / "text").mkdir(parents=True)
    (folder / "tasks").mkdir()
    for number, path in enumerate(files):
        if number % HELD_OUT_EVERY:
            shutil.copy(path, folder / "text")
    held_out = [path.read_text(encoding="utf-8").split() for path in files[::HELD_OUT_EVERY]]
    beginnings = [{"text": " ".join(words[:BEGINNING_WORDS])} for words in held_out]
    _write(folder / "tasks", "speech_next", _questions(held_out), "multiple_choice")
    _write(folder / "tasks", "speech_bits", beginnings, "loglikelihood_rolling")
    (folder / "done").touch()
    return folder


def _questions(speeches: list[list[str]]) -> list[dict[str, object]]:
    """Contexts with four continuations each, all of words of real speeches."""
    draw = random.Random(0)

    def cut(words: list[str], count: int) -> tuple[list[str], list[str]]:
        start = draw.randrange(len(words) - count - CHOICE_WORDS)
        middle = start + count
        return words[start:middle], words[middle : middle + CHOICE_WORDS]

    rows: list[dict[str, object]] = []
    for number in range(QUESTIONS):
        speech = number % len(speeches)
        context, right = cut(speeches[speech], CONTEXT_WORDS)
        others = draw.sample([s for i, s in enumerate(speeches) if i != speech], 3)
        choices = [" ".join(cut(words, 0)[1]) for words in others]
        answer = draw.randrange(4)
        choices.insert(answer, " ".join(right))
        rows.append({"question": " ".join(context), "choices": choices, "answer": answer})
    return rows


def _write(folder: Path, name: str, rows: Sequence[Mapping[str, object]], kind: str) -> None:
    docs = folder / f"{name}.jsonl"
    docs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chooses = kind == "multiple_choice"
    text = _HEAD.format(
        name=name,
        docs=docs,
        kind=kind,
        metric=TASKS[name],
        question='"{{question}}"' if chooses else '""',
        target="answer" if chooses else '"{{text}}"',
        more=_CHOICES if chooses else "",
    )
    (folder / f"{name}.yaml").write_text(text)
