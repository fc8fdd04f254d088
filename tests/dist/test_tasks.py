"""Tasks of lm-eval: a Megatron model on several layouts against lm-eval's own HF backend."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.cases.task import scores_at
from tests.helpers.bad_input import Ending, done, line, run_line, write_scores
from tests.helpers.data_fixtures import make_texts
from tests.helpers.task_fixtures import build_model, write_tasks

PROMPT = "some words of a text"
TASKS = "tasks=[mini_choice,mini_cloze,mini_text,mini_answer]"
TP, PP = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    build_model(folder)
    write_tasks(folder / "tasks", answered=written_by(folder / "exported"))
    return folder


def written_by(folder: Path, until: str = "w") -> Callable[[str], str]:
    """Return what transformers' greedy generation writes up to a letter."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def written(question: str) -> str:
        ids = tokenizer(question, return_tensors="pt")["input_ids"]
        found = model.generate(ids, max_new_tokens=12, do_sample=False)
        text = tokenizer.decode(found[0, ids.size(1) :], skip_special_tokens=True)
        return str(text).split(until)[0]

    return written


def evaluate(home: Path, out: Path, checkpoint: str, *more: str) -> list[str]:
    keys: dict[str, object] = {
        "data.path": None,
        "data.num_samples": None,
        "tasks_path": home / "tasks",
    }
    keys |= {"data.seq_length": None, "data.global_batch_size": None, "lm_eval.batch_size": 3}
    return [*line("evaluate", home, out, **keys, checkpoint=home / checkpoint), *more]


def tasks_of(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())["tasks"]


@pytest.fixture(scope="module")
def by_hf(home, tmp_path_factory) -> dict:
    """By lm-eval's HF backend, of the exported folder."""
    out = tmp_path_factory.mktemp("hf") / "out"
    done(run_line(evaluate(home, out, "exported", TASKS)))
    return tasks_of(out)


@pytest.fixture(scope="module")
def completion(home) -> str:
    """Return what transformers writes after the prompt."""
    return written_by(home / "exported", until="\0")(PROMPT)


@pytest.mark.parametrize(
    "layout", [(), (f"{TP}=2",), (f"{PP}=2",), ("parallel.data_parallel_size=2",)]
)
def test_both_adapters_agree(ranks, home, tmp_path, by_hf, completion, layout):
    keys = (TASKS, f"sample_prompts=[{PROMPT}]", "sample_tokens=12", *layout)
    endings: list[Ending] = ranks.run(
        2 if layout else 1, run_line, evaluate(home, tmp_path / "out", "model", *keys)
    )
    for ending in endings:
        done(ending)
    found = tasks_of(tmp_path / "out")
    assert found.keys() == by_hf.keys() == {"mini_choice", "mini_cloze", "mini_text", "mini_answer"}
    for task, metrics in by_hf.items():
        assert found[task].keys() == metrics.keys()
        for metric, score in metrics.items():  # fp32, sums of a few dozen terms
            assert found[task][metric]["value"] == pytest.approx(score["value"], rel=1e-4), task
            if score["stderr"] is None:
                assert found[task][metric]["stderr"] is None
            else:
                assert found[task][metric]["stderr"] == pytest.approx(score["stderr"], rel=1e-3)
    assert found["mini_answer"]["exact_match"]["value"] == 0.5
    assert 0 < found["mini_choice"]["acc"]["value"] < 1
    assert found["mini_choice"]["acc"]["stderr"] > 0
    assert "mini_choice acc" in endings[0].out
    [text] = json.loads((tmp_path / "out" / "metrics.json").read_text())["texts"]
    assert text == {"prompt": PROMPT, "completion": completion}


def test_settings_are_those_of_lm_eval(ranks, home, tmp_path, by_hf):
    """Fewer documents, examples before each question, requests that are cut, no errors."""
    keys = ("lm_eval.limit=5", "lm_eval.num_fewshot=2", "lm_eval.max_length=24")
    some = "tasks=[mini_choice,mini_text]"
    more = (some, *keys, "lm_eval.bootstrap_iters=0")
    done(run_line(evaluate(home, tmp_path / "hf", "exported", *more)))
    done(ranks.run(1, run_line, evaluate(home, tmp_path / "out", "model", *more))[0])
    want, found = tasks_of(tmp_path / "hf"), tasks_of(tmp_path / "out")
    bits = found["mini_text"]["bits_per_byte"]
    assert bits["value"] == pytest.approx(want["mini_text"]["bits_per_byte"]["value"], rel=1e-4)
    assert bits["value"] != pytest.approx(by_hf["mini_text"]["bits_per_byte"]["value"], rel=1e-3)
    assert found["mini_choice"] == want["mini_choice"]
    assert found["mini_choice"]["acc"]["value"] * 5 == pytest.approx(
        round(found["mini_choice"]["acc"]["value"] * 5)
    )
    assert found["mini_choice"]["acc"]["stderr"] is None


def test_search_orders_candidates_by_tasks(ranks, home, tmp_path):
    """The score of a candidate is what ``evaluate`` finds for the same pruned model."""
    sizes = (64, 48)
    prunings = [f"pruning.target.ffn_hidden_size={size}" for size in sizes]
    search = f"search.ffn_hidden_size=[{sizes[0]},{sizes[1]}]"
    write_scores(home / "scores", home / "model")
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in make_texts(40))
    )
    scores = f"importance={home}/scores"
    asked = ("tasks=[mini_choice]", f"tasks_path={home}/tasks")
    line = ["search", f"checkpoint={home}/model", scores, *asked, search, "data.num_samples=4"]
    line += [f"data.path={tmp_path}/texts.jsonl", "data.seq_length=16"]
    line += ["data.global_batch_size=2", "search.distill.steps=1", "search.distill.top=1"]
    for ending in ranks.run(2, run_line, [*line, f"{TP}=2", f"output_dir={tmp_path}/found"]):
        done(ending)
    found = json.loads((tmp_path / "found" / "candidates.json").read_text())
    want = {}
    for size, pruning in zip(sizes, prunings, strict=True):
        out = tmp_path / str(size)
        done(run_line(["prune", f"checkpoint={home}/model", scores, pruning, f"output_dir={out}"]))
        (ending,) = ranks.run(1, run_line, evaluate(home, tmp_path / f"of{size}", str(out), *asked))
        done(ending)
        want[size] = tasks_of(tmp_path / f"of{size}")["mini_choice"]["acc"]["value"]
    records = {record["sizes"]["ffn_hidden_size"]: record for record in found["candidates"]}
    assert {size: record["score"] for size, record in records.items()} == pytest.approx(want)
    best = max(sizes, key=lambda size: (want[size], -records[size]["loss"]))
    assert records[best]["distilled_score"] is not None
    assert records[best]["rank"] == 1


LAYOUTS = {
    "tp2 sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "cp2": (2, {"context_parallel_size": 2}),
    "pp2 vpp2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "tp2 pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "tp2 dp2": (4, {"tensor_model_parallel_size": 2, "data_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def requests() -> list[tuple[list[int], list[int]]]:
    """Ids of contexts and continuations of many lengths."""
    draw = torch.Generator().manual_seed(3)
    lengths = [(1, 1), (5, 3), (20, 1), (2, 9), (7, 7), (13, 2), (30, 4)]
    ids = [torch.randint(0, 300, (a + b,), generator=draw).tolist() for a, b in lengths]
    return [(x[:a], x[a:]) for x, (a, _) in zip(ids, lengths, strict=True)]


@pytest.fixture(scope="module")
def by_transformers(home, requests) -> list[tuple[float, bool]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(home / "hf", dtype=torch.float32)
    found = []
    for context, continuation in requests:
        with torch.no_grad():
            rows = model(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
        rows, ids = rows[len(context) - 1 : -1], torch.tensor(continuation)
        greedy = bool((rows.argmax(-1) == ids).all())
        found.append((rows.gather(1, ids[:, None]).sum().item(), greedy))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_of_requests_are_those_of_transformers(
    ranks, home, requests, by_transformers, layout
):
    world, degrees = LAYOUTS[layout]
    for found in ranks.run(world, scores_at, str(home / "model" / "checkpoint"), degrees, requests):
        assert len(found) == len(requests)
        for (score, greedy), (want, greedily) in zip(found, by_transformers, strict=True):
            assert score == pytest.approx(want, rel=1e-5)
            assert greedy == greedily


def test_the_most_likely_continuation_is_greedy(ranks, home, requests, by_transformers):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(home / "hf", dtype=torch.float32)
    context = requests[-1][0]
    written = model.generate(
        torch.tensor([context]), max_new_tokens=3, do_sample=False, eos_token_id=None
    )[0, len(context) :].tolist()
    asked = [(context, written), (context, [*written[:2], (written[2] + 1) % 300])]
    degrees = {"tensor_model_parallel_size": 2}
    found = ranks.run(2, scores_at, str(home / "model" / "checkpoint"), degrees, asked)[1]
    assert [greedy for _, greedy in found] == [True, False]
    assert math.isfinite(found[0][0])
