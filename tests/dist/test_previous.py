"""Results and unfinished work of the version before: opened, skipped, resumed, re-run as due."""

import dataclasses
import importlib
import json
import os
import shutil
import tarfile
from dataclasses import field
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.checkpoint.manifest import open_result
from nemo_minitron.config import load, schema
from nemo_minitron.config import stages as config_stages
from nemo_minitron.config.base import ADDED, NEUTRAL
from nemo_minitron.config.identity import changes, input_paths
from nemo_minitron.config.pipeline import PipelineConfig
from nemo_minitron.config.stages import STAGE_CONFIGS
from nemo_minitron.pipeline import plan
from nemo_minitron.pipeline.plan import read_items
from tests.data.previous.make import UNFINISHED
from tests.helpers.pool import WorkerPool

ARCHIVE = Path(__file__).parents[1] / "data/previous/previous.tar.xz"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("previous")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def tree(unpacked, tmp_path, monkeypatch):
    """A copy of everything, and the working folder in it: its paths are relative."""
    shutil.copytree(unpacked, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def items(*overrides: str):
    with load.hydra_for("conf"):
        cfg = load.compose("pipeline", ["experiment=previous", *overrides], "conf")
        assert isinstance(cfg, PipelineConfig)
        return read_items(cfg)


def stale(*overrides: str) -> dict[str, str]:
    reasons = {item.name: plan.stale(item) for item in items(*overrides)}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def with_key(stage: str, monkeypatch, **metadata) -> type:
    """The config of a stage with one more key, in a section and at its top."""
    before = STAGE_CONFIGS[stage]
    made_up = ("made_up", int, field(default=3, metadata=metadata))
    fields: list[tuple[str, type, Any]] = [made_up]
    if "data" in before.__dataclass_fields__:
        old = before.__dataclass_fields__["data"]
        assert callable(old.default_factory)
        default = old.default_factory()
        data = dataclasses.make_dataclass("Data", [made_up], bases=(type(default),), kw_only=True)
        new = field(default_factory=lambda: data(**vars(default)), metadata=old.metadata)
        fields.append(("data", data, new))
    cls = dataclasses.make_dataclass("Config", fields, bases=(before,), kw_only=True)
    for table in (STAGE_CONFIGS, config_stages.STAGE_CONFIGS, schema.COMMANDS):
        monkeypatch.setitem(table, stage, cls)
    return cls


def test_everything_opens(tree):
    for name in ("run", "run/teacher", "run/scores", "run/pruned"):
        open_result(name)


def test_everything_is_skipped(tree):
    assert stale() == {}
    assert stale("workers=3", "verify_inputs=size") == {}


@pytest.mark.parametrize("metadata", [{}, ADDED, NEUTRAL])
def test_a_new_key_at_its_default_makes_nothing_stale(tree, monkeypatch, metadata):
    for stage in ("import", "importance", "prune"):
        with_key(stage, monkeypatch, **metadata)
    assert stale() == {}
    changed = stale("+stages.1.config.made_up=4")
    assert changed == (
        {} if metadata == NEUTRAL else {"scores": "its config changed (made_up 3 -> 4)"}
    )


def test_what_changed_is_run_again(tree):
    assert stale("inputs.ffn=20") == {
        "pruned": "its config changed (pruning.target.ffn_hidden_size 16 -> 20)"
    }
    assert list(stale("stages.1.config.data.num_samples=5")) == ["scores"]
    Path("tokens.npy").write_bytes(Path("tokens.npy").read_bytes()[:-8] + bytes(8))
    assert stale() == {"scores": "its input data.path changed"}
    shutil.rmtree("run/teacher")
    assert plan.stale(items()[0]) == "no result yet"


def test_an_input_that_is_named_no_more_is_a_change(tree):
    assert stale("stages.2.config.importance=null") == {"pruned": "its input importance changed"}


def test_made_again_it_is_the_same_model(tree, ranks: WorkerPool):
    """Weights and tokenizer are equal byte for byte; model.yaml now keeps the source's config."""
    before = open_result("run/teacher").files
    item = items()[0]
    item.config.overwrite = True
    ranks.run(1, run_stage, "import_", item.config, str(tree))
    after = open_result("run/teacher").files
    told = (".hydra/", "metrics.json", "checkpoint/lineage.json")
    other = {name for name in before if after.get(name) != before[name]}
    assert {name for name in other if not name.startswith(told)} == {"checkpoint/model.yaml"}
    added = after.keys() - before.keys()
    assert all(name.startswith("checkpoint/tokenizer/as_read/") for name in added)


def unfinished(stage: str, *more: str):
    with load.hydra_for(None):
        arguments = [*UNFINISHED[stage], f"output_dir=unfinished/{stage}", *more]
        return load.compose(stage, arguments)


def run_stage(module: str, cfg, folder: str) -> None:
    """On a rank: the working folder is the tree, and is given back."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        importlib.import_module(f"nemo_minitron.stages.{module}").run(cfg)
    finally:
        os.chdir(before)


@pytest.mark.parametrize("stage", UNFINISHED)
def test_unfinished_work_goes_on(tree, ranks: WorkerPool, stage):
    """Unfinished work that cannot be resumed is an error without overwrite=true."""
    ranks.run(1, run_stage, stage, unfinished(stage), str(tree))
    open_result(f"unfinished/{stage}")
    metrics = json.loads(Path(f"unfinished/{stage}/metrics.json").read_text())
    if stage == "finetune":
        assert [record["step"] for record in metrics["history"]] == [1, 2, 3, 4]
    if stage == "importance":
        assert (metrics["num_samples"], metrics["forward_tokens"]) == (6, 2 * 8)


@pytest.mark.parametrize("stage", UNFINISHED)
def test_unfinished_work_knows_what_changed(tree, monkeypatch, stage):
    owner = json.loads(Path(f"unfinished/{stage}.partial/partial.json").read_text())
    cfg = unfinished(stage)
    assert changes(cfg, owner["config"], resuming=True) == {}
    assert owner["inputs"].keys() == input_paths(cfg).keys()
    with_key(stage, monkeypatch)
    assert changes(unfinished(stage), owner["config"], resuming=True) == {}
    more = unfinished(stage, "made_up=5", "workers=7")
    assert changes(more, owner["config"], resuming=True) == {"made_up": (3, 5)}
    if stage != "generate":
        other = unfinished(stage, "data.seed=7", "data.micro_batch_size=2")
        assert changes(other, owner["config"], resuming=True) == {"data.seed": (1234, 7)}
