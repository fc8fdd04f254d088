"""Pipelines: checked as a whole before anything runs, re-run only as far as needed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.checkpoint.manifest import open_result
from nemo_minitron.config import load
from nemo_minitron.config.stages import PipelineConfig
from nemo_minitron.pipeline.plan import read_items
from tests.helpers import fake_stages

PIPELINE = """
# @package _global_
output_dir: run
inputs: {model: model.gguf, text: text.txt, ffn: 1024}
stages:
  - {name: teacher, stage: import, config: {source: "${inputs.model}"}}
  - name: scores
    stage: importance
    config: {checkpoint: "${stage:teacher}", data.path: "${inputs.text}", data: {num_samples: 4}}
  - name: pruned
    stage: prune
    config:
      checkpoint: ${stage:teacher}
      importance: ${stage:scores}
      pruning: {target: {ffn_hidden_size: "${inputs.ffn}"}}
  - {name: exported, stage: export, config: {checkpoint: "${stage:pruned}"}}
  - {name: plain, stage: export, config: {checkpoint: "${stage:teacher}"}}
"""
ALL = ["import", "importance", "prune", "export", "export"]


@pytest.fixture
def pipeline(tmp_path):
    """Run the pipeline in ``tmp_path``; gives exit code, stderr and the stages that ran."""
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/mine.yaml").write_text(PIPELINE)
    (tmp_path / "model.gguf").write_text("weights")
    (tmp_path / "text.txt").write_text("text")
    notes = tmp_path / "notes"

    def run(*overrides, **env):
        notes.unlink(missing_ok=True)
        line = ["pipeline", "--config-dir", "conf", "experiment=mine", *overrides]
        done = subprocess.run(
            [sys.executable, "-m", "nemo_minitron", *line],
            env=fake_stages.environment(tmp_path, FAKE_NOTES=str(notes), **env),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=100,
        )
        lines = notes.read_text().splitlines() if notes.exists() else []
        return done.returncode, done.stderr, [json.loads(text)["stage"] for text in lines]

    return run


def test_runs_skips_and_reruns_what_depends_on_a_change(pipeline, tmp_path):
    code, err, ran = pipeline()
    assert (code, ran) == (0, ALL), err
    manifest = open_result(tmp_path / "run")
    assert {"report.html", ".hydra/config.yaml"} <= set(manifest.files)
    teacher = open_result(tmp_path / "run/teacher")
    assert manifest.inputs["teacher"] == f"import:{teacher.id}"

    assert pipeline("workers=3", "verify_inputs=size")[2] == []  # nothing that matters changed
    changed = ["inputs.ffn=512", "stages.1.config.data.num_samples=5"]
    assert pipeline(changed[0])[2] == ["prune", "export"]
    (tmp_path / "text.txt").write_text("other text")
    assert pipeline(*changed)[2] == ALL[1:4]
    (tmp_path / "run/pruned/weights").write_text("damaged")
    # Made again from the same inputs it is the same result: what depends on it stays.
    assert pipeline(*changed)[2] == ["prune"]
    assert pipeline(*changed, "overwrite=true")[2] == ALL


def test_stops_at_the_first_failure_and_goes_on_from_there(pipeline):
    code, err, ran = pipeline(FAKE_RUN="prune:bug")
    assert (code, ran) == (1, ALL[:3])
    last = err.splitlines()[-1]
    assert "pruned (prune): failed with RuntimeError: a bug" in last
    assert "log: run/pruned.log" in last
    code, err, ran = pipeline(FAKE_RUN="prune:preempted")
    assert (code, ran) == (75, ["prune"])
    assert "run the same command again" in err.splitlines()[-1]
    code, err, ran = pipeline(FAKE_CHECK="prune:value_error")
    assert (code, ran) == (2, [])
    assert "pruned (prune): data.path=/nowhere does not exist; set it" in err.splitlines()[-1]
    assert pipeline()[2] == ALL[2:]


def test_overwriting_goes_on_where_it_was_stopped(pipeline):
    """A requeued job is the same command: what it made anew already stays."""
    job = {"SLURM_JOB_ID": "17"}
    code, err, ran = pipeline("overwrite=true", FAKE_RUN="prune:preempted", **job)
    assert (code, ran) == (75, ALL[:3]), err
    code, err, ran = pipeline("overwrite=true", FAKE_RUN="export:preempted", **job)
    assert (code, ran) == (75, ALL[2:4]), err
    assert pipeline("overwrite=true", SLURM_JOB_ID="18")[2] == ALL


def test_each_job_of_a_sweep_reads_its_own_results(pipeline, tmp_path):
    code, err, ran = pipeline("-m", "inputs.ffn=512,768")
    assert (code, ran) == (0, 2 * ALL), err
    jobs = ["ffn=512", "ffn=768"]
    for job in jobs:
        teacher = open_result(tmp_path / "run" / job / "teacher")
        pruned = open_result(tmp_path / "run" / job / "pruned")
        assert pruned.inputs["checkpoint"] == f"import:{teacher.id}"
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir()) == jobs


def test_sigterm_reaches_the_running_stage(pipeline, tmp_path):
    notes = tmp_path / "notes"
    line = ["pipeline", "--config-dir", "conf", "experiment=mine"]
    env = fake_stages.environment(tmp_path, FAKE_NOTES=str(notes), FAKE_RUN="importance:sleep")
    child = subprocess.Popen([sys.executable, "-m", "nemo_minitron", *line], env=env, cwd=tmp_path)
    while not notes.exists() or len(notes.read_text().splitlines()) < 2:
        assert child.poll() is None
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=20) == 75
    assert sorted(os.listdir(tmp_path / "run")) == ["scores.log", "teacher", "teacher.log"]


EXPORT = {"name": "b", "stage": "export", "config": {"checkpoint": "out/a"}}


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "stages is empty"),
        ([{"name": "a"}], r"stages.0 \(a\): stage is missing"),
        ([{"stage": "import"}], "name='' must be a folder name"),
        ([{"name": "../a", "stage": "import"}], "must be a folder name"),
        ([{"name": "a", "stage": "imprt"}], "imprt is not a stage; did you mean import?"),
        ([{"name": "a", "stage": "pipeline"}], "a pipeline cannot hold another one"),
        ([{"name": "a", "stage": "import", "confg": {}}], "confg is not a key .* mean config?"),
        ([{"name": "a", "stage": "import", "config": {}}], "import needs source"),
        ([{"name": "a", "stage": "import", "config": 3}], "config=3 must be a dictionary"),
        ([EXPORT], "checkpoint=out/a names 'a', which is not an earlier item"),
        (["a", EXPORT, EXPORT], r"stages.2 \(b\): name=b is taken by an earlier item"),
        (["a", {**EXPORT, "name": "A"}], "name=A is taken"),
        (["a", {**EXPORT, "config": {"chekpoint": "out/a"}}], "did you mean checkpoint?"),
        (["a", {**EXPORT, "config": {"checkpoint": "/none"}}], "checkpoint=/none does not exist"),
        (["a", {**EXPORT, "config": {"checkpoint": "out/b"}}], "'b', which is not an earlier"),
        (["a", {**EXPORT, "config": {"output_dir": "x"}}], "output_dir is set by the pipeline"),
        (
            ["a", {**EXPORT, "config": {"checkpoint": "out/a", "workers": 0}}],
            r"stages.1 \(b\): workers=0 must be",
        ),
    ],
)
def test_every_item_is_checked_up_front(tmp_path, monkeypatch, items, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.gguf").write_text("x")
    first = {"name": "a", "stage": "import", "config": {"source": "m.gguf"}}
    stages = [first if item == "a" else item for item in items]
    with pytest.raises(ValueError, match=message):
        read_items(PipelineConfig(output_dir="out", stages=stages))


def test_the_cache_of_data_is_in_no_result(pipeline, tmp_path):
    place = "stages.1.config.data.cache_dir=run/teacher/cache"
    for ran in (ALL, []):  # before the result is there, and after
        code, err, _ = pipeline(f"+{place}")
        assert code == 2
        assert "scores (importance): data.cache_dir=run/teacher/cache lies in" in err
        assert pipeline("+stages.1.config.data.cache_dir=run/cache")[2] == ran


def test_items_know_what_they_need_and_inherit_shared_keys(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.gguf").write_text("x")
    stages = [{"name": "a", "stage": "import", "config": {"source": "m.gguf"}}, EXPORT]
    cfg = PipelineConfig(output_dir="out", stages=stages, workers=5, verify_inputs="size")
    first, second = read_items(cfg)
    assert (first.needs, second.needs) == ((), ("a",))
    assert second.config.output_dir == str(Path("out/b"))
    assert (second.config.workers, second.config.verify_inputs) == (5, "size")


def test_an_experiment_extends_another_one(tmp_path, monkeypatch):
    """Keys by the names of items, in a file that takes the items over and on the command line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.gguf").write_text("x")
    (tmp_path / "text").mkdir()
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\n"
        "defaults: [quickstart, _self_]\n"
        "inputs: {model: m.gguf, text: text}\n"
        "change:\n"
        "  pruned: {pruning: {target: {ffn_hidden_size: 640}}, workers: 3}\n"
        "  importance: {data.num_samples: 5}\n"
    )
    path = [f"hydra.searchpath=[{tmp_path}]", "experiment=mine", "change.pruned.workers=2"]
    inputs = ["experiment=quickstart", "inputs.model=m.gguf", "inputs.text=text"]
    composed: list[Any] = [load.compose("pipeline", line) for line in (inputs, path)]
    items: list[dict[str, Any]] = [
        {item.name: item.config for item in read_items(config)} for config in composed
    ]
    before, after = items
    assert list(before) == list(after)
    assert after["pruned"].pruning.target["ffn_hidden_size"] == 640
    assert after["pruned"].workers == 2
    assert after["importance"].data.num_samples == 5
    assert after["distilled"] == before["distilled"]


def test_a_changed_group_wins_over_single_keys(tmp_path, monkeypatch):
    """Hydra itself would take ``parallel=tp2`` first and then the keys of the item."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "file").write_text("x")
    config = {"checkpoint": "m", "data.path": "m", "parallel": {"tensor_model_parallel_size": 4}}
    stages = [{"name": "a", "stage": "finetune", "config": config}]
    change = {"a": {"parallel": "tp2", "data.seed": 3}}
    (item,) = read_items(PipelineConfig(output_dir="out", stages=stages, change=change))
    config_of: Any = item.config
    assert config_of.parallel.tensor_model_parallel_size == 2
    assert config_of.data.seed == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": {"workers": 2}}, r"change.b names no item of stages; there are a$"),
        ({"aa": {}}, "did you mean a"),
        ({"a": 3}, r"stages.0 \(a\): change.a=3 must be a dictionary of the keys of import"),
        ({"a": {"wokers": 3}}, r"stages.0 \(a\): wokers is not a key of import; .* workers"),
    ],
)
def test_changes_are_checked(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.gguf").write_text("x")
    stages = [{"name": "a", "stage": "import", "config": {"source": "m.gguf"}}]
    with pytest.raises(ValueError, match=message):
        read_items(PipelineConfig(output_dir="out", stages=stages, change=change))


def test_quickstart_is_the_road_of_the_papers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.gguf").write_text("x")
    (tmp_path / "text").mkdir()
    inputs = ["inputs.model=m.gguf", "inputs.text=text"]
    cfg = load.compose("pipeline", ["experiment=quickstart", *inputs])
    assert isinstance(cfg, PipelineConfig)
    items = read_items(cfg)
    assert [item.stage for item in items] == [
        "import",
        "evaluate",
        "importance",
        "prune",
        "evaluate",
        "distill",
        "evaluate",
        "benchmark",
        "export",
    ]
    names = {item.name for item in items}
    assert {row["evaluate"] for row in cfg.report["rows"]} <= names


def test_pipeline_refuses_a_launcher_of_several_ranks(pipeline):
    code, err, _ = pipeline(RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1")
    assert code == 2
    assert "start it once" in err
