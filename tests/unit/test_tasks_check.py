"""What ``evaluate tasks=`` refuses before a model is loaded."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from nemo_minitron.evaluation.tasks import task_metrics
from tests.helpers.bad_input import done, line, run_line, write_scores
from tests.helpers.task_fixtures import build_model, write_tasks

_SAMPLING = """\
task: mini_sampled
dataset_path: json
dataset_kwargs:
  data_files: {{test: {docs}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer_text}}}}"
generation_kwargs: {{{kwargs}}}
metric_list:
  - metric: exact_match
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    build_model(folder)
    write_tasks(folder / "tasks", documents=3)
    return folder


def task(home: Path, folder: Path, kwargs: str) -> Path:
    folder.mkdir()
    docs = home / "tasks" / "docs.jsonl"
    (folder / "sampled.yaml").write_text(_SAMPLING.format(docs=docs, kwargs=kwargs))
    return folder


def refused(home: Path, out: Path, says: str, **keys: object) -> None:
    """``keys`` with two underscores for a point."""
    none = dict.fromkeys(("data.path", "data.seq_length", "data.global_batch_size"))
    none |= {"data.num_samples": None, "tasks": "[mini_choice]"}
    given = {key.replace("__", "."): value for key, value in keys.items()}
    ending = run_line(line("evaluate", home, out, **{**none, **given}))
    assert ending.code == 2, ending.err
    assert says in ending.err.splitlines()[-1]  # data sets show bars before
    assert not out.exists()


def test_unknown_tasks(home, tmp_path):
    refused(
        home,
        tmp_path / "out",
        "tasks holds mini_choise, which neither lm-eval nor tasks_path="
        f"{home}/tasks knows; near names: mini_choice",
        tasks="[mini_choise]",
        tasks_path=home / "tasks",
    )


def test_folders_without_tasks(home, tmp_path):
    out, path = tmp_path / "out", tmp_path / "none"
    refused(home, out, f"tasks_path={path} is not a folder", tasks_path=path)
    path.mkdir()
    refused(home, out, f"tasks_path={path} holds no task", tasks_path=path)
    says = f"tasks_path={path} is for tasks, but tasks is empty"
    refused(home, out, says, tasks_path=path, tasks=None, data__path=home / "hf")


def test_nothing_to_evaluate(home, tmp_path):
    refused(home, tmp_path / "out", "evaluate needs data.path, tasks or sample_prompts", tasks=None)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"sample_tokens": 0}, "sample_tokens=0 must be at least 1"),
        ({"sample_prompts": "['']"}, "sample_prompts=[''] holds an empty text"),
        ({"sample_tokens": 5000}, "sample_tokens=5000 it exceeds the"),
        ({"parallel.sequence_parallel": "true", "parallel.tensor_model_parallel_size": 2}, "write"),
        ({"checkpoint": "exported"}, "is an export, which does not continue prompts here"),
    ],
)
def test_prompts_that_cannot_be_continued(home, tmp_path, keys, says):
    keys = {key.replace(".", "__"): value for key, value in keys.items()}
    if "checkpoint" in keys:
        keys["checkpoint"] = home / keys["checkpoint"]
    refused(home, tmp_path / "out", says, **{"tasks": None, "sample_prompts": "[a word]", **keys})


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["task_metric=f1"], "task_metric=f1 is for tasks, but tasks is empty"),
        (["lm_eval.limit=3"], "is for tasks, but tasks is empty"),
        (
            ["tasks=[mini_choice]", "task_metric=f1"],
            "task_metric=f1 is not a metric of tasks=mini_choice",
        ),
    ],
)
def test_tasks_of_a_search(home, tmp_path, keys, says):
    keys += [f"tasks_path={home}/tasks"] if keys[0].startswith("tasks=") else []
    where = f"output_dir={tmp_path}/out"
    line = [
        "search",
        where,
        f"checkpoint={home}/model",
        f"data.path={tmp_path}/t.txt",
        "data.seq_length=16",
        "data.split=1/1/1",
    ]
    (tmp_path / "t.txt").write_text("some words of a text " * 500)
    write_scores(tmp_path / "scores", home / "model")
    line += [f"importance={tmp_path}/scores", "search.ffn_hidden_size=[64]", *keys]
    ending = run_line(line)
    assert ending.code == 2
    assert says in ending.err.splitlines()[-1]


def test_data_that_is_not_here(home, tmp_path):
    folder = write_tasks(tmp_path / "tasks", documents=1)
    (folder / "docs.jsonl").unlink()
    says = "tasks=mini_choice: its data cannot be read"
    refused(home, tmp_path / "out", says, tasks_path=folder)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ("do_sample: true, temperature: 0.7, max_gen_toks: 4", "do_sample with temperature 0.7"),
        ("do_sample: false, num_beams: 4, max_gen_toks: 4", "asks for num_beams"),
        ("do_sample: false, max_gen_toks: 64", "leaves no room for a question in lm_eval.max_len"),
    ],
)
def test_generation_that_cannot_be_had(home, tmp_path, kwargs, says):
    keys = {"tasks": "[mini_sampled]", "tasks_path": task(home, tmp_path / "tasks", kwargs)}
    refused(home, tmp_path / "out", says, **keys)


def test_layouts_that_cannot_generate(home, tmp_path):
    refused(
        home,
        tmp_path / "out",
        "parallel.context_parallel_size=2: tasks=mini_answer lets the model write text token by",
        tasks="[mini_text,mini_answer]",
        tasks_path=home / "tasks",
        parallel__context_parallel_size=2,
    )


def test_exports_have_no_layout_and_no_loss(home, tmp_path):
    export = {"checkpoint": home / "exported", "tasks_path": home / "tasks"}
    out = tmp_path / "out"
    refused(home, out, "whose loss evaluate does not measure", **export, data__path=home)
    says = "is an export, which lm-eval runs in one process"
    refused(home, out, says, **export, parallel__tensor_model_parallel_size=2)


def test_models_without_a_tokenizer(home, tmp_path):
    (tmp_path / "hf").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(home / "hf" / name, tmp_path / "hf" / name)
    done(run_line(line("import", home, tmp_path / "bare", source=tmp_path / "hf")))
    says = "tasks=mini_choice are text, and checkpoint="
    refused(home, tmp_path / "out", says, checkpoint=tmp_path / "bare")


def test_lm_eval_that_is_not_installed(home, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(home, tmp_path / "out", "pip install 'nemo_minitron[eval]'", tasks_path=home / "tasks")


def test_metrics_of_lm_eval():
    values = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,strict": 1}
    values |= {"f1_stderr,strict": "N/A", "sample_len": 4}
    assert task_metrics({"x": values}) == {
        "x": {"acc": {"value": 0.5, "stderr": 0.1}, "f1,strict": {"value": 1.0, "stderr": None}}
    }
