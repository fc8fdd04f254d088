"""``minitron data``: the tokens that a budget takes of weighted texts, and what is refused."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import psutil
import pytest
import yaml

from nemo_minitron.checkpoint.artifact import output_folder
from nemo_minitron.checkpoint.tokenizer import AS_READ
from nemo_minitron.config.sources import SourcesConfig, SourcesStageConfig
from nemo_minitron.config.stages import ImportConfig
from nemo_minitron.config.training import DataConfig
from nemo_minitron.data import budget
from nemo_minitron.data.budget import sources_of, tokenise, write_pair
from nemo_minitron.data.datasets import prepare_tokens
from nemo_minitron.data.indexed import TextTokenizer
from nemo_minitron.data.pair import read_index
from nemo_minitron.data.parts import Documents
from nemo_minitron.data.text import find_source
from nemo_minitron.stages.data import check
from tests.helpers.bad_input import done, run_line
from tests.helpers.data_fixtures import make_texts, save_tokenizer, write_jsonl
from tests.helpers.tiny import LLAMA

TEXTS = make_texts(60)
SEED = 1234


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Checkpoints without weights, a folder of four files with repeats, and one file."""
    folder = tmp_path_factory.mktemp("corpus")
    vocab = save_tokenizer(folder / "tokenizer" / AS_READ, TEXTS)
    _model(folder / "bare", vocab)
    _model(folder / "model", vocab, folder / "tokenizer")
    (folder / "web").mkdir()
    for number in range(4):
        texts = [*TEXTS[10 * number : 10 * number + 10], TEXTS[3], TEXTS[number]]
        write_jsonl(folder / "web" / f"{number}.jsonl", texts)
    (folder / "book.txt").write_text("\n\n".join(TEXTS[40:]))
    return folder


def _model(folder: Path, vocab: int, tokenizer: Path | None = None) -> None:
    with output_folder(ImportConfig(output_dir=str(folder), source="-"), "import", {}) as work:
        (work / "checkpoint").mkdir()
        replace(LLAMA, vocab_size=vocab).save(work / "checkpoint")
        if tokenizer is not None:
            shutil.copytree(tokenizer, work / "checkpoint" / "tokenizer")


def expected(corpus: Path, path: Path, share: int) -> list[list[int]]:
    """The documents of a pair, by the rules alone."""
    tokenizer, files = TextTokenizer(corpus / "tokenizer"), find_source(path).files
    taken: list[list[int]] = []
    for number in np.random.default_rng(SEED).permutation(len(files)):
        text = files[number].read_text()
        lines = text.split("\n\n") if files[number].suffix == ".txt" else text.splitlines()
        for line in lines:
            text = json.loads(line)["text"] if line.startswith("{") else line
            ids = tokenizer.encode([text])[0].tolist()
            if ids not in taken and sum(map(len, taken)) < share:
                taken.append(ids)
    return [taken[n] for n in np.random.default_rng(SEED).permutation(len(taken))]


def documents(prefix: Path) -> list[list[int]]:
    index = read_index(prefix)
    ids = np.fromfile(f"{prefix}.bin", index.dtype)
    return [part.tolist() for part in np.split(ids, np.cumsum(index.lengths)[:-1])]


def command(corpus: Path, out: Path, *more: str) -> list[str]:
    blend = f"data.blend=[3,{corpus}/web,1,{corpus}/book.txt]"
    return ["data", f"checkpoint={corpus}/model", blend, f"output_dir={out}", *more]


def test_repeats_are_not_looked_for_after_every_file(monkeypatch):
    """A source of which a tenth is new: what is taken is what a look after each file takes."""
    rng, files, share = np.random.default_rng(0), 200, 4000
    digests = rng.integers(0, 1500, 40 * files)
    lengths = digests % 7 + 1  # equal texts are equally long
    pairs = zip(np.split(lengths, files), np.split(digests, files), strict=True)
    parts = [Documents(*pair) for pair in pairs]
    first = np.sort(np.unique(digests, return_index=True)[1])
    totals = np.cumsum(lengths[first])
    want = first[: int(np.searchsorted(totals, share)) + 1]
    look = Mock(wraps=np.unique)
    monkeypatch.setattr(budget, "read_part", lambda part: parts[part])
    monkeypatch.setattr(np, "unique", look)
    source: Any = budget.Source(share, list(range(files)))  # type: ignore[arg-type]  # numbers
    for number in range(files):
        source.end(number)
        if source.complete:
            break
    source.end(number + 1)  # another process had begun it
    assert source.kept.tolist() == want.tolist()
    assert source.tokens == totals[len(want) - 1] >= share
    assert len(source.documents) == number + 1 < files
    assert sum(len(one.lengths) for one in source.documents[:-1]) <= want[-1]
    assert look.call_count < 12 < number - share // 160


def test_the_tokens_of_a_budget_and_a_run_that_goes_on(corpus, tmp_path, monkeypatch):
    out, whole = tmp_path / "out", command(corpus, tmp_path / "out", "total_tokens=6000")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("nemo_minitron.stages.data.write_pair", full)
        assert run_line(whole).code == 1
    ids = (tmp_path / "out.partial" / "parts").glob("*-*/ids.bin")
    parts = sorted(path for path in ids if path.parent.suffix != ".draft")
    assert len(parts) >= 2
    written = [part.stat().st_ino for part in parts]

    def again(*args):
        assert [part.stat().st_ino for part in parts] == written
        return write_pair(*args)

    monkeypatch.setattr("nemo_minitron.stages.data.write_pair", again)
    said = run_line(whole)
    done(said)
    assert "data.blend=" in said.out
    assert {file.name for file in out.iterdir()} == {
        *("0_web.bin", "0_web.idx", "1_book.bin", "1_book.idx", "blend.yaml", "data_args.txt"),
        *("metrics.json", "manifest.json", ".hydra"),
    }
    for name, path, share in (("0_web", "web", 4500), ("1_book", "book.txt", 1500)):
        assert documents(out / name) == expected(corpus, corpus / path, share)
    _check_written(corpus, out)


def _check_written(corpus: Path, out: Path) -> None:
    """The figures, and both forms of the blend as their readers take them."""
    web, book = json.loads((out / "metrics.json").read_text())["sources"].values()
    assert (web["share"], book["share"]) == (4500, 1500)
    assert 4500 <= web["tokens"] < 4500 + max(map(len, documents(out / "0_web")))
    assert web["files"] < web["of_files"] == 4
    words = (out / "data_args.txt").read_text().split()
    assert DataConfig(path="", blend=words).blend == yaml.safe_load(
        (out / "blend.yaml").read_text()
    )
    data = DataConfig(path="", blend=str(out / "blend.yaml"), split="1", seq_length=16)
    assert data.weights() == [3, 1]
    vocab = TextTokenizer(corpus / "tokenizer")._tokenizer.get_vocab_size()
    for source in data.sources():
        prepare_tokens(source, vocab_size=vocab, cache=out.parent / "cache", splits=("train",))


def _killed_after_a_part(arguments: list[str], parts: Path) -> None:
    """Kill the first process of a command when a part is whole and another is being written.

    The others end with it.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "nemo_minitron", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 100
    while {path.suffix for path in parts.glob("*-*")} != {"", ".draft"}:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    writers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    assert process.wait(30) == -signal.SIGKILL
    assert len(writers) >= 2
    assert not psutil.wait_procs(writers, timeout=30)[1]


def test_a_killed_run_goes_on(corpus, tmp_path):
    """It ends with the files of one that nobody killed."""
    (tmp_path / "web").mkdir()
    for number in range(4):
        # The first two are 0 and 3, of which one must not end with the other.
        texts = make_texts({1: 10, 3: 3000}.get(number, 600), seed=number)
        write_jsonl(tmp_path / "web" / f"{number}.jsonl", texts)
    keys = (f"data.blend=[1,{tmp_path}/web]", "total_tokens=10000000", "workers=2")
    commands = {
        out: ["data", f"checkpoint={corpus}/model", *keys, f"output_dir={out}"]
        for out in (tmp_path / "killed", tmp_path / "whole")
    }
    parts = tmp_path / "killed.partial" / "parts"
    _killed_after_a_part(commands[tmp_path / "killed"], parts)
    assert list(parts.glob("*.draft")), "another part was being written"
    found = []
    for out, arguments in commands.items():
        done(run_line(arguments))
        names = ("0_web.bin", "0_web.idx", "metrics.json")
        found.append([(out / name).read_bytes() for name in names])
        assert not list(tmp_path.glob("*.partial"))
    assert found[0] == found[1]


def test_a_source_at_its_end(corpus, tmp_path):
    """All of it once, repeats left out, however many processes; the stage says the epochs."""
    data = DataConfig(path="", blend=[1, str(corpus / "web")], records="text", split="1")
    (source,) = sources_of(data, [10**6], corpus / "tokenizer", 400, tmp_path)
    tokenise([source], 1)
    taken = write_pair(source, tmp_path / "pair")
    assert documents(tmp_path / "pair") == expected(corpus, corpus / "web", 10**6)
    assert (taken.documents, taken.repeats, taken.files) == (40, 8, 4)
    more = ("total_tokens=1e6", "data.blend_max_epochs=4")
    said = run_line(command(corpus, tmp_path / "out", "total_tokens=1000000", more[1]))
    assert said.code == 2
    assert f"data.blend.0.path={corpus}/web has {taken.tokens:,} tokens, and its share" in said.err
    assert "more than data.blend_max_epochs=4" in said.err
    assert "lower total_tokens or raise data.blend_max_epochs to go on" in said.err
    # What was tokenised stays, and the same command goes on with other limits.
    tokens = [tmp_path / "out.partial" / "parts" / f"0-{n}" / "ids.bin" for n in range(4)]
    for path in tokens:
        assert path.is_file()
    written = tokens[0].stat().st_mtime_ns
    again = command(corpus, tmp_path / "out", "total_tokens=1000", "data.blend_max_epochs=1e-9")
    assert run_line(again).code == 2
    assert tokens[0].stat().st_mtime_ns == written
    done(run_line(command(corpus, tmp_path / "out", "total_tokens=1000")))


@pytest.mark.parametrize(
    ("keys", "data", "message"),
    [
        ({"total_tokens": 0}, {}, "total_tokens=0 must be at least 1"),
        ({}, {"blend_max_epochs": 0.0}, "data.blend_max_epochs=0.0 must be above 0"),
        ({}, {"blend": "1 {corpus}/none"}, "data.blend.0.path={corpus}/none does not exist"),
        ({}, {"text_key": "body"}, "no key 'body'; set data.text_key"),
        ({}, {"blend": "1 {corpus}/pair"}, "{corpus}/pair holds tokens already"),
        ({"output_dir": "{corpus}/a b"}, {}, "has blanks, between which Megatron-LM would"),
        ({"checkpoint": "{corpus}/bare"}, {}, "bare has no tokenizer; import the model again"),
    ],
)
def test_what_is_refused(corpus, tmp_path, keys, data, message):
    (corpus / "pair.bin").touch()
    (corpus / "pair.idx").touch()
    known = {"checkpoint": f"{corpus}/model", "output_dir": f"{tmp_path}/out", "total_tokens": 9}
    with pytest.raises(ValueError, match=re.escape(message.replace("{corpus}", str(corpus)))):
        _check({**known, **keys}, {"blend": "1 {corpus}/web", **data}, corpus)


def _check(keys: dict[str, Any], data: dict[str, Any], corpus: Path) -> None:
    sources = SourcesConfig(**_placed(data, corpus))
    check(SourcesStageConfig(**_placed(keys, corpus), data=sources))


def _placed(values: dict[str, Any], corpus: Path) -> dict[str, Any]:
    return {
        key: value.replace("{corpus}", str(corpus)) if isinstance(value, str) else value
        for key, value in values.items()
    }
