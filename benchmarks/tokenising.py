"""Text to token ids: this package beside transformers' tokenizer alone, on one core.

``python -m benchmarks.tokenising`` from the repository root. The same text comes in three shapes:
one line of JSON, one document, and lines of a hundred characters. For each, a process builds the
whole ``.bin``/``.idx`` pair (reading, repeats, ids, shuffling), and another calls the tokenizer of
transformers
on the first ten megabytes, already in memory, in batches of a thousand (a long text in pieces of
a megabyte: all at once it takes a hundred times its size). Exit status 1 when ours has less than
half of the speed. ``--megabytes 1000`` takes an hour. With ``--cores 2`` ours runs on two cores, on
records of two thousand characters, and has to reach 0.8 of twice the speed of the tokenizer alone
on one, by the clock, on a machine that does nothing else, in less than a gigabyte of memory.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.docs_block import markdown_table, write_block

SHAPES = ("one line", "one document", "many lines")
RECORDS = "records"
"""The shape with ``--cores 2``: JSON lines of two thousand characters."""
LEAST, LEAST_OF_CORES = 0.5, 0.8
MOST_OF_CORES = 1.0
"""Gigabytes of memory with ``--cores 2``, torch and transformers included."""
_PIECE, _BATCH = 1 << 20, 1000
_ALONE = 10  # megabytes that the tokenizer alone gets
_ROOT = Path(__file__).resolve().parents[1]


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 32,000 tokens, cut by the rule of GPT-2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=32_000, special_tokens=["</s>"], show_progress=False)
    tokenizer.train_from_iterator([" ".join(_words())], trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _words() -> list[str]:
    draw = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgk"
    return ["".join(draw.choices(letters, k=draw.randint(1, 11))) for _ in range(50_000)]


def lines_of(megabytes: int) -> list[str]:
    """Lines of about a hundred characters, that many megabytes together; no two are equal."""
    draw, words = random.Random(1), _words()
    weights = [1 / (n + 1) for n in range(len(words))]
    some = [" ".join(draw.choices(words, weights, k=15)) for _ in range(20_000)]
    count = megabytes * 1_000_000 // 100
    return [f"{draw.choice(some)[:88]} {number}" for number in range(count)]


def write_shape(shape: str, lines: list[str], folder: Path) -> Path:
    """The lines as a file of one of the shapes."""
    path = folder / ("a.txt" if shape == "one document" else "a.jsonl")
    with path.open("w") as file:
        if shape == "one document":
            file.write("\n".join(lines))
        elif shape == "one line":
            file.write(json.dumps({"text": " ".join(lines)}) + "\n")
        elif shape == RECORDS:
            texts = (" ".join(lines[n : n + 20]) for n in range(0, len(lines), 20))
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        else:
            file.writelines(json.dumps({"text": line}) + "\n" for line in lines)
    return path


def ours(path: Path, tokenizer: Path, work: Path) -> int:
    """Build the pair; returns tokens, without those that end documents."""
    from nemo_minitron.config.training import DataConfig
    from nemo_minitron.data.datasets import prepare_tokens
    from nemo_minitron.data.pair import read_index

    data = DataConfig(path=str(path), split="1", seq_length=16)
    tokens = prepare_tokens(data, vocab_size=32_000, cache=work, tokenizer_dir=tokenizer)
    lengths = read_index(tokens.path).lengths
    return int(lengths.sum()) - len(lengths)


def alone(texts: list[str], tokenizer: Path) -> int:
    """transformers' tokenizer on texts in memory; returns tokens."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    found = 0
    for start in range(0, len(texts), _BATCH):
        found += sum(map(len, loaded(texts[start : start + _BATCH])["input_ids"]))
    return found


def job(what: str, path: Path, tokenizer: Path, work: Path, cores: int) -> None:
    """One measurement, printed as JSON: processor seconds, or those of the clock on several cores.

    The tokenizer alone is on one core anyway.
    """
    clock = time.monotonic if cores > 1 else time.process_time
    used = cores if what == "ours" else 1
    os.environ["TOKENIZERS_PARALLELISM"] = str(used > 1).lower()
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[-used:]))
    texts: list[str] = []
    if what == "ours":
        import transformers  # noqa: F401
    else:
        texts = [
            json.loads(line)["text"] if path.suffix == ".jsonl" else line
            for line in (path.open() if path.suffix == ".jsonl" else [path.read_text()])
        ]
        if len(texts) == 1:
            texts = [texts[0][n : n + _PIECE] for n in range(0, len(texts[0]), _PIECE)]
    begin = clock()
    found = ours(path, tokenizer, work) if what == "ours" else alone(texts, tokenizer)
    seconds = clock() - begin
    print(json.dumps({"seconds": seconds, "tokens": found, "peak": _peak()}))


def _peak() -> int:
    """Most bytes this process has held; what ``getrusage`` says counts the one that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measured(what: str, path: Path, tokenizer: Path, work: Path, cores: int) -> dict[str, Any]:
    """A job in a process of its own."""
    line = [sys.executable, "-m", "benchmarks.tokenising", "--job", what]
    line += map(str, (path, tokenizer, work, cores))
    done = subprocess.run(line, cwd=_ROOT, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows(megabytes: int, cores: int) -> list[list[Any]]:
    """Shape, MB/s of both, ratio, peak memory of both, tokens of ours beside theirs."""
    found = []
    with tempfile.TemporaryDirectory(prefix="minitron-") as name:
        folder = Path(name)
        make_tokenizer(folder / "tokenizer")
        lines = lines_of(megabytes)
        for shape in SHAPES if cores == 1 else (RECORDS,):
            both, speed = [], []
            for what, part in (("alone", lines[: _ALONE * 10_000]), ("ours", lines)):
                path = write_shape(shape, part, folder)
                work = folder / shape.replace(" ", "-")
                both.append(measured(what, path, folder / "tokenizer", work, cores))
                speed.append(path.stat().st_size / 1e6 / both[-1]["seconds"])
            peak = [one["peak"] / 1e9 for one in both]
            found.append([shape, *speed, speed[1] / speed[0], *peak, both[1]["tokens"]])
            print(f"{shape}: {speed[1] / speed[0]:.2f}", file=sys.stderr, flush=True)
            path.unlink()
    return found


def main() -> int:
    """Print the table; with ``--write`` put it into docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--job", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        what, path, tokenizer, work, cores = args.job
        job(what, Path(path), Path(tokenizer), Path(work), int(cores))
        return 0
    found = rows(args.megabytes, args.cores)
    head = ["shape", "transformers MB/s", "ours MB/s", "ratio", "peak GB", "tokens"]
    cells = [
        [shape, f"{a:.2f}", f"{b:.2f}", f"{ratio:.2f}", f"{q:.2f}", f"{tokens:,}"]
        for shape, a, b, ratio, _, q, tokens in found
    ]
    table, load = markdown_table(head, cells), " ".join(f"{x:.1f}" for x in os.getloadavg())
    shapes, where = "three shapes", "processor seconds on one core"
    if args.cores > 1:
        shapes, where = (
            "records",
            f"seconds by the clock, ours on {args.cores} cores, theirs on one",
        )
    text = (
        f"{'## Tokenising' if args.cores == 1 else '### On several cores'}\n\n"
        f"{args.megabytes} MB of text in {shapes} through `data.path` (reading, repeats, ids, "
        f"shuffling, writing), and {_ALONE} MB of it that lie in memory through transformers' "
        f"tokenizer alone; a byte-level BPE of 32,000 tokens, {where} "
        f"({platform.machine()}). Load of the machine at the end: {load}.\n\n{table}"
    )
    print(text)
    if args.write:
        several = "tokenising --cores 2 --megabytes 1000"
        write_block("tokenising" if args.cores == 1 else several, text)
    least = LEAST if args.cores == 1 else LEAST_OF_CORES * args.cores
    most = float("inf") if args.cores == 1 else MOST_OF_CORES
    return int(any(row[3] < least or row[5] >= most for row in found))


if __name__ == "__main__":
    sys.exit(main())
