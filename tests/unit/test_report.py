"""The final table and report.html from result folders in the stages' own formats."""

import base64
import json
import math
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
import yaml

from nemo_minitron.config import load
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.stages import ImportConfig, PipelineConfig, PruningConfig, TargetConfig
from nemo_minitron.families.registry import family_of
from nemo_minitron.families.table import parameter_count
from nemo_minitron.pruning.plan import make_plan, pruned_config
from nemo_minitron.pruning.scores import Scores, model_meta
from nemo_minitron.reporting.report import REPORT, millions, render, write_report
from nemo_minitron.reporting.results import read_results
from nemo_minitron.reporting.rows import check_report

MODEL = ModelConfig(
    family="llama",
    num_layers=4,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=6,
    num_query_groups=3,
    kv_channels=4,
    vocab_size=50,
    max_position_embeddings=64,
)
DATA = {"path": "speeches", "seed": 1, "split": "90,5,5", "split_name": "test"}
LOSSES = {"teacher": 3.0, "pruned": 5.0, "distilled": 3.5}


def _write(folder, config, metrics=None, model=None):
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "manifest.json").write_text(
        json.dumps({"versions": {"torch": "9.9.9"}, "created": "2030-01-02T03:04:05+00:00"})
    )
    if metrics is not None:
        (folder / "metrics.json").write_text(json.dumps(metrics))
    if model is not None:
        (folder / "checkpoint").mkdir()
        model.save(folder / "checkpoint")


def _make_pipeline(out):
    """Result folders of import, importance, prune, distill, three evaluations and export."""
    draw = torch.Generator().manual_seed(0)
    scores = Scores(
        hidden=torch.rand(16, generator=draw),
        ffn=torch.rand(4, 24, generator=draw),
        head=torch.rand(4, 6, generator=draw),
        layer=torch.rand(4, generator=draw),
        meta={"model": model_meta(MODEL)},
    )
    target = TargetConfig(num_layers=3, ffn_hidden_size=12, num_attention_heads=3)
    plan = make_plan(MODEL, PruningConfig(target=target), scores)
    small = pruned_config(MODEL, plan)
    _write(out / "import", {"source": "x.gguf"}, model=MODEL)
    _write(out / "score", {"checkpoint": str(out / "import")})
    scores.save(out / "score")
    config = {"checkpoint": str(out / "import"), "importance": str(out / "score")}
    _write(out / "prune", config, model=small)
    plan.save(out / "prune")
    history = [
        {"step": n, "loss": 2 / n, "lr": 1e-4, "grad_norm": 1.0, "tokens_per_second": 100.0 + n}
        for n in range(1, 9)
    ]
    history[3]["val_loss"], history[7]["val_loss"] = 4.0, 3.6
    history[7]["val_kd_loss"] = 0.5
    _write(out / "distill", {"data": {**DATA, "split_name": "train"}}, {"history": history}, small)
    for label, loss in LOSSES.items():
        model = MODEL if label == "teacher" else small
        metrics = {
            "lm_loss": loss,
            "perplexity": math.exp(loss),
            "tokens": 4096,
            "texts": [{"prompt": "We", "completion": f" are <{label}>."}],
            "parameters": parameter_count(family_of(model), model),
        }
        folder = out / {"teacher": "import", "pruned": "prune", "distilled": "distill"}[label]
        _write(out / f"eval_{label}", {"data": DATA, "checkpoint": str(folder)}, metrics)
    _write(out / "export", {"checkpoint": str(out / "distill")})
    (out / "export" / ".hydra" / "overrides.yaml").write_text(
        "[checkpoint=a b, max_shard_size=1GB]"
    )
    return _config(out)


def _config(out):
    stages = [
        {"name": "import", "stage": "import", "config": {"source": "my <model>.gguf"}},
        {"name": "score", "stage": "importance", "config": {"data": {"num_samples": 8}}},
        {"name": "prune", "stage": "prune", "config": {"pruning": {"target": {"num_layers": 3}}}},
        {"name": "distill", "stage": "distill", "config": {"data.split": "90,5,5"}},
        *({"name": f"eval_{label}", "stage": "evaluate", "config": {}} for label in LOSSES),
        {"name": "export", "stage": "export", "config": {}},
    ]
    rows = [{"label": label, "evaluate": f"eval_{label}"} for label in LOSSES]
    report = {"title": "A small model", "rows": rows}
    return PipelineConfig(output_dir=str(out), stages=stages, report=report)


class _Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.data: list[str] = []
        self.feed(text)
        self.text = re.sub(r"\s+", " ", " ".join(self.data))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "srcset", "href", "data", "action")]

    def handle_data(self, data):
        self.data.append(data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(output folder, config) of one pipeline, read only."""
    out = tmp_path_factory.mktemp("pipeline")
    return out, _make_pipeline(out)


def test_page_and_table(finished, capsys):
    out, cfg = finished
    (out / "prune" / "checkpoint" / "weights").write_bytes(bytes(2_000_000))
    assert write_report(out, cfg) == out / REPORT
    lines = capsys.readouterr().out.splitlines()
    for cells in (("teacher", "3.0000", "20.09", "-"), ("pruned", "2 MB"), ("distilled", "75%")):
        line = next(line for line in lines if cells[0] in line)
        assert all(cell in line for cell in cells)
    assert "distilled: We are <distilled>." in lines
    text = (out / REPORT).read_text()
    page = _Page(text)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "http" not in re.sub(r"data:image/png;base64,[\w+/=]+", "", text)
    assert "url(" not in text
    assert len(page.links) == 2 * 6  # four importance pictures, kept sizes, training curve
    for link in page.links:
        kind, content = link.split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(content, validate=True).startswith(b"\x89PNG")
    assert "A small model" in page.text
    assert "75% of the loss of pruning won back" in page.text
    assert "4,096 tokens of the test split" in page.text
    assert "teacher: We are <teacher>." in page.text
    assert "tokens/s" not in page.text.split("Gap closed")[0]  # no benchmark stage measured it
    assert "8 steps, 105 tokens/s (median), validation loss 4.0000 to 3.6000" in page.text
    assert "torch 9.9.9" in page.text
    assert "Careful" not in page.text
    assert list(out.glob("*.partial")) == []


def test_sizes_before_and_after(finished):
    out, cfg = finished
    results = replace(read_results(out, cfg), scores={})
    text = _Page(render(results)).text
    small = results.prunings[0].after
    before, after = (parameter_count(family_of(m), m)["total"] for m in (MODEL, small))
    assert f"parameters {before:,} {after:,} {after / before:.0%}" in text
    assert "layers 4 3 75%" in text
    assert "FFN size 24 12 50%" in text
    assert "query groups 3 3 head dim" in text
    [gone] = {0, 1, 2, 3} - set(results.prunings[0].plan["layers"])
    assert f"Layers dropped (counted from 1): {gone + 1} Kept per layer" in text


def test_the_whole_can_be_run_again(finished):
    out, cfg = finished
    results = replace(
        read_results(out, cfg), scores={}, prunings=[], command="minitron pipeline x=1"
    )
    text = _Page(render(results)).text
    assert "All of it again, finished stages skipped: minitron pipeline x=1" in text
    assert f"output_dir: {out}" in text
    assert yaml.safe_load(results.config)["stages"] == cfg.stages


def test_commands_can_be_typed_again(finished):
    out, cfg = finished
    commands = {stage.name: stage.command for stage in read_results(out, cfg).stages}
    assert commands["export"] == "minitron export 'checkpoint=a b' max_shard_size=1GB"
    words = shlex.split(commands["import"])
    assert words[:2] == ["minitron", "import"]
    composed = load.compose("import", words[2:])
    assert isinstance(composed, ImportConfig)
    assert (composed.source, composed.output_dir) == ("my <model>.gguf", f"{out}/import")
    assert (
        commands["distill"] == f"minitron distill \"data.split='90,5,5'\" output_dir={out}/distill"
    )
    assert "data.num_samples=8" in shlex.split(commands["score"])


def test_rows_of_a_chain_name_their_gap(finished):
    out, cfg = finished
    rows = cfg.report["rows"]
    chain = {"rows": [*rows[:2], {**rows[2], "gap": ["pruned", "teacher"]}]}
    closed = [r.closed for r in read_results(out, _with(cfg, chain)).rows]
    assert closed == [None, None, 0.75]
    assert [r.label for r in read_results(out, _with(cfg, {})).rows] == [
        "eval_teacher",
        "eval_pruned",
        "eval_distilled",
    ]


def _with(cfg, report):
    return PipelineConfig(output_dir=cfg.output_dir, stages=cfg.stages, report=report)


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ({"titel": "x"}, r"unknown keys \['titel'\]"),
        ({"rows": [{"label": "a"}]}, r"a row is \{label, evaluate\}"),
        ({"rows": [{"label": "a", "evaluate": "distill"}]}, "must be one of .*eval_teacher"),
        ({"rows": [{"label": "a", "evaluate": "eval_pruned"}] * 2}, "must differ"),
        (
            {"rows": [{"label": "a", "evaluate": "eval_pruned", "gap": ["a", "b"]}]},
            "labels of earlier rows",
        ),
    ],
)
def test_bad_report_keys_are_refused(report, message):
    with pytest.raises(ValueError, match=message):
        check_report(_with(_config("x"), report))


def test_doubtful_numbers_are_said_to_be_so(tmp_path, caplog):
    cfg = _make_pipeline(tmp_path)
    (tmp_path / "distill" / "metrics.json").unlink()  # no pictures: they take a second each
    cfg.stages = [s for s in cfg.stages if s["stage"] in ("distill", "evaluate")]
    for label, change in (("pruned", {"seed": 2}), ("distilled", {"split_name": "train"})):
        config = tmp_path / f"eval_{label}" / ".hydra" / "config.yaml"
        config.write_text(yaml.safe_dump({"data": {**DATA, **change}}))
    write_report(tmp_path, cfg)
    text = _Page((tmp_path / REPORT).read_text()).text
    for warning in (
        "eval_pruned may hold text that distill trained on (same data.path; data.seed differ)",
        "eval_distilled may hold text that distill trained on (same data.path; data.split_name=",
        "measured on different data",
    ):
        assert warning in text
        assert warning in caplog.text
    assert "eval_teacher may" not in text


def test_what_read_no_text_of_its_own_is_not_doubted(tmp_path, caplog):
    """A phase takes the sources of the training, and an evaluation may ask tasks alone."""
    cfg = _make_pipeline(tmp_path)
    (tmp_path / "distill" / "metrics.json").unlink()
    cfg.stages = [s for s in cfg.stages if s["stage"] in ("distill", "evaluate")]
    phases = {"trainer": {"phases": [{"steps": 5, "data": {"path": ""}}]}}
    for name, values in (("distill", {"data": DATA, **phases}), ("eval_pruned", {"tasks": ["a"]})):
        config = tmp_path / name / ".hydra" / "config.yaml"
        config.write_text(yaml.safe_dump({"data": {"path": "", "seed": 2}, **values}))
    write_report(tmp_path, cfg)
    assert "eval_pruned may hold" not in caplog.text
    assert "measured on different data" not in caplog.text


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({}, False),
        ({"seq_length": 8}, False),
        ({"seed": 2}, True),
        ({"path": "elsewhere", "seed": 2}, False),
        ({"blend": [{"weight": 1, "path": "speeches"}], "seed": 2}, True),
    ],
)
def test_each_phase_of_a_training_may_have_read_what_others_held_out(tmp_path, caplog, own, says):
    cfg = _make_pipeline(tmp_path)
    (tmp_path / "distill" / "metrics.json").unlink()
    cfg.stages = [s for s in cfg.stages if s["stage"] in ("distill", "evaluate")]
    phases = [{"steps": 5, "data": {}}, {"steps": 5, "data": own}]
    config = tmp_path / "distill" / ".hydra" / "config.yaml"
    config.write_text(yaml.safe_dump({"data": DATA, "trainer": {"phases": phases}}))
    write_report(tmp_path, cfg)
    warning = "eval_pruned may hold text that distill trained on (same data.path; data.seed differ)"
    assert (warning in caplog.text) == says


def test_missing_figures_are_named(tmp_path):
    cfg = _make_pipeline(tmp_path)
    (tmp_path / "eval_pruned" / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds no lm_loss; run stage 'eval_pruned' again"):
        write_report(tmp_path, cfg)
    assert not (tmp_path / REPORT).exists()


def test_plan_without_scores(tmp_path):
    """Layers dropped by hand: no importance stage at all."""
    plan = make_plan(MODEL, PruningConfig(drop_layers=[2]), None)
    _write(tmp_path / "import", {}, model=MODEL)
    config = {"checkpoint": str(tmp_path / "import"), "importance": None}
    _write(tmp_path / "prune", config, model=pruned_config(MODEL, plan))
    plan.save(tmp_path / "prune")
    stages: list[Any] = [{"name": n, "stage": n, "config": {}} for n in ("import", "prune")]
    write_report(tmp_path, PipelineConfig(output_dir=str(tmp_path), stages=stages))
    assert "layers 4 3 75%" in _Page((tmp_path / REPORT).read_text()).text


def test_parameter_counts_have_four_digits():
    shown = [millions(n) for n in (134515008, 8030261248, 12345, 999, 98_000_000, 405 * 10**9)]
    assert shown == ["134.5 M", "8.030 B", "12.35 k", "999", "98.00 M", "405.0 B"]


def test_tasks_before_and_after(tmp_path, capsys, caplog):
    """One evaluation of loss and tasks, one of tasks alone, one of the loss alone."""
    cfg = _make_pipeline(tmp_path)
    cfg.stages = [s for s in cfg.stages if s["stage"] == "evaluate"]
    scores = {
        "arc": {"acc": {"value": 0.25, "stderr": 0.0125}},
        "wiki": {"bpb": {"value": 1.5, "stderr": None}},
    }
    for label, drop, limit in (("teacher", (), 10), ("pruned", ("lm_loss", "perplexity"), 20)):
        folder = tmp_path / f"eval_{label}"
        metrics = json.loads((folder / "metrics.json").read_text())
        metrics = {key: value for key, value in metrics.items() if key not in drop}
        (folder / "metrics.json").write_text(json.dumps({**metrics, "tasks": scores}))
        config = {"data": DATA, "tasks": ["arc", "wiki"], "lm_eval": {"limit": limit}}
        (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config))
    write_report(tmp_path, cfg)
    text = _Page((tmp_path / REPORT).read_text()).text
    assert "model arc acc wiki bpb teacher 0.250 +- 0.013 1.500 pruned 0.250" in text
    assert "distilled - -" in text
    assert "different lm_eval.* keys" in caplog.text
    rows = read_results(tmp_path, cfg).rows
    assert [(r.loss, r.closed) for r in rows] == [(3.0, None), (None, None), (3.5, None)]
    assert "0.250 +- 0.013" in capsys.readouterr().out


SPEED = {"prompt_length": 512, "new_tokens": 64, "precision": "32", "rounds": 5}


def _spread(median):
    return {"median": median, "low": median / 2, "high": median * 2}


def _speed(rate, batch, peak):
    return {
        "batch_size": batch,
        "memory": {"weights": 2_000_000_000, "kv_cache": 5_000_000, "peak": peak},
        "prefill_tokens_per_second": _spread(8000.0),
        "decode_tokens_per_second": _spread(rate),
        "first_token_seconds": _spread(0.25),
        "token_seconds": _spread(0.004),
    }


def test_speed_of_writing_is_that_of_the_benchmark(tmp_path, capsys):
    cfg = _make_pipeline(tmp_path)
    compared = [str(tmp_path / name) for name in ("import", "distill")]
    models = [
        {"label": "t", "equal": _speed(123.4, 1, 1)},
        {"label": "s", "equal": _speed(150, 1, 1)},
    ]
    config = {"checkpoint": compared, **SPEED}
    _write(tmp_path / "speed", config, {"device": "a CPU", "models": models})
    cfg.stages = [s for s in cfg.stages if s["stage"] == "evaluate"]
    cfg.stages.append({"name": "speed", "stage": "benchmark", "config": {}})
    write_report(tmp_path, cfg)
    rows = read_results(tmp_path, cfg).rows
    assert [row.speed for row in rows] == [123.4, None, 150.0]
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_speed_and_written_text(tmp_path):
    """What benchmark and generate measured, and beginnings of the text."""
    stages = [{"name": "speed", "stage": "benchmark"}, {"name": "text", "stage": "generate"}]
    models = [
        {"label": "teacher", "equal": _speed(100.0, 1, None), "largest": _speed(400.0, 8, None)},
        {"label": "student", "equal": _speed(150.0, 1, 3e9), "largest": _speed(900.0, 20, 3e9)},
    ]
    config: dict[str, Any] = {
        "prompt_length": 512,
        "new_tokens": 64,
        "precision": "32",
        "rounds": 5,
    }
    config["checkpoint"] = ["teacher", "student"]
    _write(tmp_path / "speed", config, {"device": "a CPU", "models": models})
    counts: dict[str, Any] = {
        "prompts": 3,
        "samples": 6,
        "ended": 4,
        "kept": 2,
        "kept_tokens": 1234,
    }
    counts |= {"dropped": {"ended": 3, "near_duplicates": 1}, "tokens_per_second": 99.6}
    _write(tmp_path / "text", {"prompts": "p.txt"}, counts)
    record = {"prompt": "Why <so>?", "completion": " Because.", "text": "-"}
    (tmp_path / "text" / "data.jsonl").write_text(f"{json.dumps(record)}\n" * 5)
    html = render(read_results(tmp_path, PipelineConfig(output_dir=str(tmp_path), stages=stages)))
    text = _Page(html).text
    for part in (
        "teacher 1 8,000 (4,000-16,000) 100 (50-200) 1.00x 250.0 ms 4.0 ms 2 0.005 -",
        "student 20 (largest) 8,000 (4,000-16,000) 900 (450-1,800) 2.25x 250.0 ms 4.0 ms 2 0.005 3",
        "Prompts of 512 tokens, 64 new ones",
        "dropped by near_duplicates 1 kept 2",
        "Why <so>? Because.",
    ):
        assert part in text, text
    assert html.count("Because.") == 2
