"""Wrong command lines and wrong files, at random but the same each time: what does minitron say?

    python -m benchmarks.fuzz                      300 command lines and 500 files
    python -m benchmarks.fuzz --only files --seed 7 --cases 50

Every case runs in a process of its own, forked from one that has imported everything. It has to end
with 0, or with 2 and a message, without a traceback, within 20 seconds and 2 GB. A table by kind is
printed, then every case that did not.
"""

import argparse
import collections
import faulthandler
import importlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron import cli
from nemo_minitron.config import schema
from tests.helpers.bad_input import KEYS, build, edited, line, run_line, write_pair

SECONDS = 20
MEMORY = 2 << 30
# Base command lines only differ in one stage each; of these keys a large value is no mistake.
_LONG = ("trainer.max_steps", "rounds", "new_tokens", "new_tokens_per_prompt")
# Would start other processes, or write elsewhere.
_LEFT_OUT = ("output_dir", "parallel.", "trainer.num_nodes", "exp_manager.create_wandb")
VALUES = (
    *("-1", "0", "1", "-0.0", "0.5", "1.5", "nan", "inf", "-inf", "1e308", "1e-308", "1e999"),
    *("2147483648", "9223372036854775808", "99999999999999999999999", "-9223372036854775809"),
    *("null", "true", "false", "", "''", "'  '", "???", "[]", "{}", "[1,2]", "[null]", "[-1]"),
    *(
        "[[[[[]]]]]",
        "{a:1}",
        "{a:{b:[1,{c:2}]}}",
        "[a,1,true]",
        "word",
        "'two words'",
        "../..",
        "/",
    ),
    *("/dev/null", "${output_dir}", "${nothing.there}", "${oc.env:HOME}", "${stage:x}"),
    *("a,b", "../..", "=", "a=b", "x" * 5000, "int(3.5)"),
    *(
        "日本語",
        "'\\u0000'",
        "'\U0001f389'",
        "[red]x[/red]",
        "0x10",
        "1_000",
        "+1",
        "1e3",
        "x" * 5000,
    ),
    *(
        "[" * 200 + "]" * 200,
        "{",
        "]",
        "range(1,3)",
        "choice(1,2)",
        "glob(*)",
        "int(3.5)",
        "=",
        "a=b",
    ),
)
JSON_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 0.5, 1e308, 10**30, 2**63, -(2**63), "", "x", "\ud800", "\x1b[31m"),
    *([], {}, [1], [[]], {"a": 1}, ["x"], "../../etc/passwd", "/dev/zero", "x" * 100_000),
)


def _nested(depth: int) -> str:
    return "[" * depth + "]" * depth


# ---------------------------------------------------------------- command lines


def command_line(random_: random.Random, home: Path, out: Path) -> tuple[str, list[str]]:
    """A stage's good command line with one to three wrong keys, maybe as a sweep."""
    stage = random_.choice(sorted(KEYS))
    names = [key.name for key in schema.keys(schema.COMMANDS[stage])]
    names = [name for name in names if not name.startswith(_LEFT_OUT)]
    extra = []
    for _ in range(random_.randint(1, 3)):
        name, value = random_.choice(names), random_.choice(VALUES)
        if name in _LONG and value.lstrip("+").isdigit() and len(value) > 1:
            value = "-" + value
        mark = random_.choice(["", "", "", "", "+", "++", "~"])
        extra.append(f"{mark}{name}" if mark == "~" else f"{mark}{name}={value}")
    if random_.random() < 0.1:
        extra.append(random_.choice(["", "=", "x", "-m", "--multirun", "a=", "no.such.key=1"]))
    return stage, [*line(stage, home, out), *extra]


# ---------------------------------------------------------------- files


def wrong_bytes(random_: random.Random, text: bytes) -> bytes:
    """Bytes flipped, cut, doubled, or a length that cannot be."""
    data = bytearray(text)
    for _ in range(random_.randint(1, 4)):
        at = random_.randrange(len(data) + 1)
        # Headers are what matters: most of the changes are near the beginning.
        at = at if random_.random() < 0.4 else min(at, random_.randrange(1, 600))
        what = random_.randrange(6)
        if what == 0 and at < len(data):
            data[at] ^= 1 << random_.randrange(8)
        elif what == 1:
            del data[at:]
        elif what == 2:
            del data[at : at + random_.randint(1, 64)]
        elif what == 3:
            data[at:at] = random_.randbytes(random_.randint(1, 64))
        elif what == 4:
            number = random_.choice([2**64 - 1, 2**63, 2**60, 2**40, 2**31, 2**32 - 1, 0])
            data[at : at + 8] = struct.pack("<Q", number)
        else:
            data[at:at] = data[at : at + random_.randint(1, 256)]
    return bytes(data)


def wrong_json(random_: random.Random, text: bytes) -> bytes:
    """One to three values replaced, dropped or renamed; or no longer JSON at all."""
    if random_.random() < 0.25:
        return wrong_bytes(random_, text)
    if random_.random() < 0.05:
        return _nested(random_.choice([150, 5000, 100_000])).encode()
    value = json.loads(text)
    for _ in range(random_.randint(1, 3)):
        parent: Any = value
        while isinstance(parent, dict | list) and parent:
            keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
            key = random_.choice(keys)
            if not isinstance(parent[key], dict | list) or random_.random() < 0.4:
                _change(random_, parent, key)
                break
            parent = parent[key]
    return json.dumps(value).encode()


def _change(random_: random.Random, parent: Any, key: Any) -> None:
    what = random_.random()
    if what < 0.2:
        del parent[key]
    elif what < 0.3 and isinstance(parent, dict):
        parent["another"] = parent.pop(key)
    else:
        parent[key] = random_.choice(JSON_VALUES)


def wrong_yaml(random_: random.Random, text: bytes) -> bytes:
    """As ``wrong_json``; and texts that only YAML has."""
    import yaml

    if random_.random() < 0.3:
        bombs = [
            "&a [*a]",
            "a: !!python/object/apply:os.system [ls]",
            "x: !!timestamp x",
            "\n".join(["a: &a [x,x]"] + [f"{n}: &{n} [*a,*a]" for n in "bcd"]),
            "- " * 5000,
            _nested(100_000),
        ]
        return random_.choice(bombs).encode()
    value = json.dumps(yaml.safe_load(text)).encode()
    return wrong_json(random_, value)


Change = Callable[[random.Random, bytes], bytes]
# File of a Hugging Face folder -> how it is changed.
HF: dict[str, Change] = {
    "config.json": wrong_json,
    "tokenizer.json": wrong_json,
    "tokenizer_config.json": wrong_json,
    "generation_config.json": wrong_json,
    "model.safetensors": wrong_bytes,
}
RESULT: dict[str, Change] = {
    ".metadata": wrong_bytes,
    "common.pt": wrong_bytes,
    "metadata.json": wrong_json,
    "model.yaml": wrong_yaml,
    "lineage.json": wrong_json,
    "tokenizer/tokenizer_config.json": wrong_json,
    "tokenizer/tokenizer.json": wrong_json,
}


def _rewrite(path: Path, change: Change, random_: random.Random) -> None:
    path.write_bytes(change(random_, path.read_bytes()))


def of_hf(random_: random.Random, home: Path, work: Path) -> tuple[str, list[str]]:
    """A model to import."""
    name = random_.choice(sorted(HF))
    shutil.copytree(home / "hf", work / "hf")
    _rewrite(work / "hf" / name, HF[name], random_)
    return name, ["import", f"source={work / 'hf'}", f"output_dir={work / 'out'}"]


def of_gguf(random_: random.Random, home: Path, work: Path) -> tuple[str, list[str]]:
    """A GGUF file to import."""
    shutil.copyfile(home / "m.gguf", work / "m.gguf")
    _rewrite(work / "m.gguf", wrong_bytes, random_)
    return "gguf", ["import", f"source={work / 'm.gguf'}", f"output_dir={work / 'out'}"]


def of_nemo(random_: random.Random, home: Path, work: Path) -> tuple[str, list[str]]:
    """A ``.nemo`` archive to import."""
    config = (home / "nemo.yaml").read_bytes()
    (work / "model_config.yaml").write_bytes(
        wrong_yaml(random_, config) if random_.random() < 0.5 else config
    )
    with tarfile.open(work / "m.nemo", "w:") as tar:
        tar.add(work / "model_config.yaml", "model_config.yaml")
        tar.add(home / "model" / "checkpoint", "model_weights")
    if random_.random() < 0.7:
        _rewrite(work / "m.nemo", wrong_bytes, random_)
    return "nemo", ["import", f"source={work / 'm.nemo'}", f"output_dir={work / 'out'}"]


def of_result(random_: random.Random, home: Path, work: Path) -> tuple[str, list[str]]:
    """A result whose manifest fits the wrong file, as somebody else could write it."""
    name = random_.choice(sorted(RESULT))
    edited(home / "model", work / "model", lambda f: _rewrite(f / name, RESULT[name], random_))
    stage = random_.choice(["prune", "evaluate", "export", "generate", "finetune"])
    return name, line(stage, home, work / "out", checkpoint=work / "model")


def of_manifest(random_: random.Random, home: Path, work: Path) -> tuple[str, list[str]]:
    """A wrong manifest."""
    shutil.copytree(home / "model", work / "model")
    _rewrite(work / "model" / "manifest.json", wrong_json, random_)
    stage = random_.choice(["prune", "evaluate", "export"])
    return "manifest.json", line(stage, home, work / "out", checkpoint=work / "model")


def of_scores(random_: random.Random, home: Path, work: Path) -> tuple[str, list[str]]:
    """Wrong scores with a fitting manifest."""
    from nemo_minitron.checkpoint.artifact import output_folder
    from nemo_minitron.config.stages import ImportConfig

    files = sorted(path for path in (home / "scores").iterdir() if path.suffix)
    chosen = random_.choice([path for path in files if path.name.startswith("scores")])
    cfg = ImportConfig(output_dir=str(work / "scores"), source="-")
    with output_folder(cfg, "import", {}) as folder:
        for path in files:
            if path.name.startswith("scores"):
                shutil.copyfile(path, folder / path.name)
        change = wrong_json if chosen.suffix == ".json" else wrong_bytes
        _rewrite(folder / chosen.name, change, random_)
    return chosen.name, line("prune", home, work / "out", importance=work / "scores")


def of_data(random_: random.Random, home: Path, work: Path) -> tuple[str, list[str]]:
    """Wrong token ids, index or text."""
    name = random_.choice(["ids.npy", "pair.idx", "text.jsonl"])
    for file in ("ids.npy", "pair.idx", "pair.bin", "text.jsonl"):
        shutil.copyfile(home / file, work / file)
    _rewrite(work / name, wrong_bytes, random_)
    path = work / name.removesuffix(".idx")
    return name, line("evaluate", home, work / "out", **{"data.path": path})


FILES = (of_hf, of_hf, of_gguf, of_nemo, of_result, of_result, of_manifest, of_scores, of_data)


# ---------------------------------------------------------------- one case


@dataclass(frozen=True)
class Ended:
    """How a case ended."""

    kind: str
    words: list[str]
    code: int
    said: str
    seconds: float
    memory: int

    @property
    def wrong(self) -> str:
        """What is wrong with it; nothing when nothing is."""
        if self.code < 0:
            late = self.code in (-signal.SIGALRM, -signal.SIGPROF)
            return f"no end within {SECONDS} s" if late else "killed"
        if "Traceback" in self.said:
            return "traceback"
        if self.memory > MEMORY:
            return f"{self.memory >> 20} MB"
        if self.code == 2 and not self.said.strip():
            return "no message"
        return "" if self.code in (0, 2) else f"exit code {self.code}"


def _child(make: Callable[[], tuple[str, list[str]]], report: Path) -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    kind, words = make()
    report.write_text(json.dumps([kind, words]))
    # Of the processor, since the machine may be busy with other things.
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(6 * SECONDS)
    faulthandler.dump_traceback_later(6 * SECONDS - 1)
    ending = run_line(words)
    report.write_text(json.dumps([kind, words, ending.code, ending.err[-4000:]]))


def run_case(make: Callable[[Path], tuple[str, list[str]]], work: Path) -> Ended:
    """Run a case in a process of its own."""
    report = work / "report"
    start = time.monotonic()
    child = os.fork()
    if not child:
        code = 70
        try:
            os.setpgid(0, 0)
            null = os.open(os.devnull, os.O_RDWR)
            err = os.open(work / "stderr", os.O_WRONLY | os.O_CREAT)
            for number, target in ((0, null), (1, null), (2, err)):
                os.dup2(target, number)
            _child(lambda: make(work), report)
            code = 0
        except BaseException:
            import traceback

            (work / "raised").write_text(traceback.format_exc())
        finally:
            os._exit(code)
    _, status, used = os.wait4(child, 0)
    found: list[Any] = json.loads(report.read_text()) if report.exists() else ["?", []]
    kind, words, *rest = found
    kept = [work / name for name in ("raised", "stderr") if (work / name).exists()]
    said = "".join(path.read_text(errors="replace") for path in kept)
    code, said = (rest[0], rest[1]) if rest else (os.waitstatus_to_exitcode(status), said)
    return Ended(kind, words, code, said, time.monotonic() - start, used.ru_maxrss << 10)


def prepare(home: Path) -> None:
    """Good inputs of every kind."""
    import numpy as np
    import yaml

    from nemo_minitron.config.model import ModelConfig
    from tests.helpers.gguf_fixtures import llama, write_gguf

    build(home)
    (home / "hf" / "generation_config.json").write_text('{"eos_token_id": 0}')
    (home / "prompts.txt").write_text("one two\n")
    tokenizer = home / "model" / "checkpoint" / "tokenizer" / "tokenizer_config.json"
    words = json.loads(tokenizer.read_text())
    shutil.move(home / "model", home / "before")
    if isinstance(words["eos_token"], dict):
        words["eos_token"] = words["eos_token"]["content"]
    fixed = json.dumps(words)

    def fix(checkpoint: Path) -> None:
        (checkpoint / "tokenizer" / "tokenizer_config.json").write_text(fixed)

    edited(home / "before", home / "model", fix)
    write_gguf(home / "m.gguf", llama())
    write_pair(home / "pair", [17] * 40)
    texts = [{"text": f"Some words, {np.base_repr(n, 36)}."} for n in range(200)]
    (home / "text.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    gpt = vars(ModelConfig.load(home / "model" / "checkpoint"))
    (home / "nemo.yaml").write_text(yaml.safe_dump({"gpt": dict(gpt), "tokenizer": {}}))


def main() -> None:
    """Run all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, help="of each; 300 command lines and 500 files")
    parser.add_argument("--only", choices=["lines", "files"])
    given = parser.parse_args()
    # The threads of the tokenizers library are not copied by a fork, and would be waited for.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    ended: list[Ended] = []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        home = Path(folder) / "home"
        home.mkdir()
        prepare(home)
        for stage in sorted(KEYS):  # imported once; what runs in this process would not fork well
            cli.stage_module(stage)
        importlib.import_module("nemo_minitron.models.training")
        for what, count in (("lines", 300), ("files", 500)):
            if given.only in (None, what):
                for number in range(given.cases or count):
                    ended.append(_one(what, given.seed, number, home, Path(folder)))
    _print(ended)


def _one(what: str, seed: int, number: int, home: Path, folder: Path) -> Ended:
    random_ = random.Random(f"{what} {seed} {number}")
    work = folder / f"{what}-{number}"
    work.mkdir()
    if what == "lines":
        found = run_case(lambda w: command_line(random_, home, w / "out"), work)
    else:
        make = random_.choice(FILES)
        found = run_case(lambda w: make(random_, home, w), work)
    shutil.rmtree(work, ignore_errors=True)
    if found.wrong:
        shown = " ".join(word[:200] for word in found.words)
        print(
            f"{what} {number}: {found.wrong}: {found.kind}: {shown}\n{found.said[-1500:]}\n",
            flush=True,
        )
    return found


def _print(ended: list[Ended]) -> None:
    rows: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for case in ended:
        rows[case.kind]["wrong" if case.wrong else f"exit {case.code}"] += 1
    print(f"{'kind':34}{'exit 0':>8}{'exit 2':>8}{'wrong':>8}{'slowest':>9}{'memory':>9}")
    for kind, counts in [*sorted(rows.items()), ("all", sum(rows.values(), collections.Counter()))]:
        mine = [case for case in ended if kind in ("all", case.kind)]
        figures = "".join(f"{counts[name]:8}" for name in ("exit 0", "exit 2", "wrong"))
        slowest, most = max(c.seconds for c in mine), max(c.memory for c in mine) >> 20
        print(f"{kind:34}{figures}{slowest:7.1f} s{most:6} MB")


if __name__ == "__main__":
    main()
