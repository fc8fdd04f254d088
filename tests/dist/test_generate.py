"""``minitron generate``: transformers' greedy text, seeds and layouts, resuming, refusals."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_minitron.families.letters import in_letters
from tests.cases.generate import continuations_at, read_by_step
from tests.helpers.bad_input import done, edited, line, run_line
from tests.helpers.damage import flip_bit
from tests.helpers.task_fixtures import build_model
from tests.helpers.tiny import (
    DEEPSEEK_V3,
    DENSE_HYBRID,
    GEMMA2,
    GEMMA3,
    GPT2,
    GPT_OSS,
    GRANITE,
    LLAMA,
    MINISTRAL3,
    MIXTRAL,
    NEMOTRON,
    NEMOTRON_H,
    PHI3_LONG,
    QWEN3,
    write_result,
)

TP, PP = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
NEW = 10
WINDOWS = replace(QWEN3, window_size=[0, 3, 3, 0])


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    build_model(folder)
    texts = [f"d{n}w{n} d{n}w{n + 1} " * (1 + n % 4) for n in range(9)]
    (folder / "prompts.txt").write_text("\n".join(texts[:5]) + "\n\n" + "\n".join(texts[5:]) + "\n")
    records = [{"prompt": text, "id": n} for n, text in enumerate(texts)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def command(home: Path, out: Path, **keys: object) -> list[str]:
    """``keys`` with two underscores for a point."""
    given = {key.replace("__", "."): value for key, value in keys.items()}
    return line("generate", home, out, **given)


def records(out: Path) -> list[dict]:
    return [json.loads(text) for text in (out / "data.jsonl").read_text().splitlines()]


LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "tp2 pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_tokens_are_those_of_transformers(ranks, home, layout):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(home / "hf", dtype=torch.float32)
    draw = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, 300, (n,), generator=draw).tolist() for n in (7, 1, 4, 12)]
    keys = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    want = [model.generate(torch.tensor([p]), **keys)[0, len(p) :].tolist() for p in prompts]
    world, degrees = LAYOUTS[layout]
    folder = str(home / "model" / "checkpoint")
    for found in ranks.run(world, continuations_at, folder, degrees, prompts, NEW):
        assert found == want


@pytest.mark.parametrize(
    "config",
    [
        *(GPT2, NEMOTRON, QWEN3, MIXTRAL, WINDOWS, GRANITE, NEMOTRON_H, GEMMA2, GEMMA3),
        *(DEEPSEEK_V3, GPT_OSS, MINISTRAL3, PHI3_LONG, in_letters(LLAMA)),
    ],
    ids=lambda config: config.family,
)
def test_the_cache_changes_nothing(ranks, tmp_path, config):
    """Every family: continuing word by word, and reading the whole text again each time."""
    folder = str(write_result(tmp_path / "model", config, seed=0) / "checkpoint")
    prompts = [[5, 7, 11], [3, 2, 1, 9, 4]]
    [found] = ranks.run(1, continuations_at, folder, {}, prompts, 4)
    for prompt, new in zip(prompts, found, strict=True):
        for count in range(4):
            [[again]] = ranks.run(1, continuations_at, folder, {}, [[*prompt, *new[:count]]], 1)
            assert again == [new[count]]


def test_states_of_mamba_layers_are_kept_in_full(ranks, tmp_path):
    """In bf16 token by token is as near to fp32 as all tokens at once, however long they are."""
    folder = str(write_result(tmp_path / "model", DENSE_HYBRID, seed=0) / "checkpoint")
    prompt = torch.randint(0, 50, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    [(exact, _)] = ranks.run(1, read_by_step, folder, prompt, torch.float32)
    [(steps, whole)] = ranks.run(1, read_by_step, folder, prompt, torch.bfloat16)
    assert (steps - exact).norm() < 1.3 * (whole - exact).norm()


@pytest.fixture(scope="module")
def written(ranks, home, tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("written") / "out"
    [ending] = ranks.run(1, run_line, command(home, out))
    done(ending)
    return records(out)


@pytest.mark.parametrize(
    ("world", "keys"),
    [
        (1, {"batch_size": 1}),
        (2, {TP: 2}),
        (2, {PP: 2, "batch_size": 9}),
        (2, {"parallel.data_parallel_size": 2, "save_every_n_samples": 2}),
    ],
)
def test_text_depends_on_the_seed_alone(ranks, home, tmp_path, written, world, keys):
    for ending in ranks.run(world, run_line, command(home, tmp_path / "out", **keys)):
        done(ending)
    assert records(tmp_path / "out") == written


def test_what_is_written(ranks, home, tmp_path, written):
    metrics = {}
    for name, keys in {
        "more": {
            "prompts": home / "prompts.jsonl",
            "samples_per_prompt": 3,
            "keep_prompt": "false",
        },
        "seed": {"sampling__seed": 2},
        "bf16": {"precision": "bf16-mixed", "sampling__temperature": 0},
    }.items():
        done(ranks.run(1, run_line, command(home, tmp_path / name, **keys))[0])
        metrics[name] = json.loads((tmp_path / name / "metrics.json").read_text())
    prompts = [text for text in (home / "prompts.txt").read_text().splitlines() if text]
    assert [r["prompt"] for r in written] == [text.strip() for text in prompts]
    assert all(r["text"] == r["prompt"] + r["completion"] for r in written)
    more = records(tmp_path / "more")
    assert all(r["text"] == r["completion"] for r in more)
    assert metrics["more"]["samples"] == 27
    assert len({r["completion"] for r in more}) == len(more) > 20
    assert records(tmp_path / "seed") != written
    assert metrics["bf16"]["prompts"] == 9


def test_finetune_reads_it(ranks, home, tmp_path):
    keys = {"samples_per_prompt": 12, "prompts": home / "prompts.jsonl"}
    done(ranks.run(1, run_line, command(home, tmp_path / "out", **keys))[0])
    for number, path in enumerate((tmp_path / "out" / "data.jsonl", tmp_path / "out")):
        data = {"data.path": path, "data.split": "'90,10,0'", "trainer.limit_val_batches": 0}
        done(ranks.run(1, run_line, line("finetune", home, tmp_path / str(number), **data))[0])


def test_a_killed_run_goes_on(ranks, home, tmp_path, written):
    """After one file; then with other filters, which changes only what is kept."""
    out = tmp_path / "out"
    arguments = command(home, out, save_every_n_samples=2)
    ending = ranks.run(1, stopped_after_first_file, arguments)[0]
    assert ending.code == 75, ending.err
    file = tmp_path / "out.partial" / "samples" / "0.jsonl"
    assert list(file.parent.iterdir()) == [file]
    flip_bit(file)
    ending = ranks.run(1, run_line, arguments)[0]
    assert ending.code == 2
    assert "samples/0.jsonl is damaged" in ending.err
    flip_bit(file)
    ending = ranks.run(1, run_line, [*arguments, "filters.min_tokens=1000"])[0]
    assert ending.code == 2
    assert "none of the 9 samples is kept (9 by min_tokens); loosen filters.*" in ending.err
    done(ranks.run(1, run_line, arguments)[0])
    assert records(out) == written


def stopped_after_first_file(arguments: list[str]):
    """A signal that comes while the first file is written."""
    import os

    from nemo_minitron.models import generate

    save = generate.SampleWriter._save

    def stop(self, found):
        save(self, found)
        os.kill(os.getpid(), signal.SIGTERM)

    generate.SampleWriter._save = stop
    try:
        return run_line(arguments)
    finally:
        generate.SampleWriter._save = save


# ------------------------------------------------------------------------------------ refusals


def refused(home: Path, tmp_path: Path, says: str, **keys: object) -> None:
    ending = run_line(command(home, tmp_path / "out", **keys))
    assert ending.code == 2, ending.err
    assert len(ending.err.splitlines()) == 1
    assert says in ending.err
    assert not (tmp_path / "out").exists()


def test_prompts_that_exceed_the_context(home, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("short\n\n" + "d1w1 " * 60 + "\n")
    keys = {"prompts": path, "sampling__max_new_tokens": 8}
    refused(home, tmp_path, f"prompts={path}, line 3: ", **keys)
    refused(home, tmp_path, "tokens and sampling.max_new_tokens=8 exceed the 64 positions", **keys)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("p.txt", " \n\n", "holds no prompt: every line is empty"),
        ("p.txt", "ok\n\xff", "p.txt, line 2 is not UTF-8 text"),
        ("p.jsonl", '{"prompt": "a \\ud83d"}', "line 1: the text holds \\ud83d at character 3"),
        ("p.jsonl", '{"prompt": ' + "[" * 100_000 + "}", "line 1: the record is nested too deeply"),
        ("p.csv", "a", "must be a .txt file (one prompt per line) or a .jsonl file; it is not one"),
        ("p.jsonl", "{", "line 1: not valid JSON"),
        ("p.jsonl", '{"text": "a"}', "no key 'prompt'; set prompt_key to the key that holds"),
        ("p.jsonl", '{"prompt": 3}', "'prompt' holds int, not text"),
        (
            "p.jsonl",
            '{"prompt": [{"role": "user", "content": "a"}]}',
            "holds list, not text (or set chat_template=true for messages)",
        ),
    ],
)
def test_prompts_that_are_none(home, tmp_path, name, text, says):
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    refused(home, tmp_path, says, prompts=tmp_path / name)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"prompts": "nowhere.txt"}, "it does not exist"),
        ({"sampling__top_p": 0}, "sampling.top_p=0.0 must be above 0 and at most 1"),
        ({"sampling__top_p": 1.5}, "sampling.top_p=1.5 must be above 0 and at most 1"),
        ({"sampling__temperature": -1}, "sampling.temperature=-1.0 must be"),
        ({"sampling__max_new_tokens": 0}, "sampling.max_new_tokens=0 must be at least 1"),
        ({"samples_per_prompt": 0}, "samples_per_prompt=0 must be at least 1"),
        ({"precision": "16"}, "precision=16 must be 32 or bf16-mixed"),
        ({"filters__max_repetition": 2}, "filters.max_repetition=2.0 must be between 0 and 1"),
        ({"filters__near_duplicates": 0}, "filters.near_duplicates=0.0 must be above 0"),
        ({"chat_template": "true"}, "the tokenizer of checkpoint="),
        (
            {TP: 2, "parallel.sequence_parallel": "true"},
            "parallel.sequence_parallel=true: generate writes text token by token",
        ),
    ],
)
def test_keys_that_cannot_be(home, tmp_path, keys, says):
    refused(home, tmp_path, says, **keys)


def test_a_chat_template(ranks, home, tmp_path):
    def add(folder: Path) -> None:
        template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[answer] "
        for place in (folder / "tokenizer", folder / "tokenizer" / "as_read"):
            (place / "chat_template.jinja").write_text(template)

    model = edited(home / "model", tmp_path / "chat", add)
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "d1w1"}]
    asked = [{"prompt": "d2w2"}, {"prompt": messages}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in asked))
    keys = {"checkpoint": model, "prompts": tmp_path / "p.jsonl", "chat_template": "true"}
    done(ranks.run(1, run_line, command(home, tmp_path / "out", **keys))[0])
    assert [r["prompt"] for r in records(tmp_path / "out")] == [
        "[user] d2w2\n[answer] ",
        "[system] be\n[user] d1w1\n[answer] ",
    ]
