"""Hydra -> dataclass: every shipped file composes, keys are strict, values survive quoting."""

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_minitron.config import load, schema
from nemo_minitron.config.sources import SourcesStageConfig
from nemo_minitron.config.stages import (
    STAGE_CONFIGS,
    DistillConfig,
    EvaluateConfig,
    ImportanceConfig,
    ImportConfig,
    PipelineConfig,
    PruneConfig,
)
from nemo_minitron.usage import shown, stage_help

CONF = schema.conf_dir()
REQUIRED = {
    "output_dir": "out",
    "source": "m.gguf",
    "checkpoint": "m",
    "student": "s",
    "teacher": "t",
    "data.path": "text",
    "prompts": "p.txt",
    "total_tokens": 1,
}
ENTRIES = sorted(
    path.relative_to(CONF).as_posix() for path in CONF.glob("*/*.yaml") if path.parts[-2] != "hydra"
)


def complete(stage: str, overrides: list[str]) -> list[str]:
    """Add the keys that have no default."""
    given = {override.split("=")[0] for override in overrides}
    known = {key.name for key in schema.keys(STAGE_CONFIGS[stage])}
    if stage == "pipeline":
        return overrides
    missing = [f"{k}={v}" for k, v in REQUIRED.items() if k in known and k not in given]
    missing += ["data.blend=[1,a]"] if stage == "data" else []
    return [*overrides, *missing]


@pytest.mark.parametrize("stage", STAGE_CONFIGS)
def test_every_stage_composes_to_the_defaults_of_its_dataclass(stage):
    composed = load.compose(stage, complete(stage, ["output_dir=out"]))
    cls = STAGE_CONFIGS[stage]
    assert type(composed) is cls
    values: dict[str, Any] = {
        k: v for k, v in REQUIRED.items() if "." not in k and k in cls.__dataclass_fields__
    }
    expected = cls(**values)
    if isinstance(expected, SourcesStageConfig):
        expected.data.blend = [{"weight": 1.0, "path": "a"}]
    elif hasattr(expected, "data"):
        expected.data.path = "text"
    assert composed == expected


def with_words(stage: str) -> list[schema.Key]:
    """Keys whose value is one of a few words."""
    return [key for key in schema.keys(STAGE_CONFIGS[stage]) if key.words]


@pytest.mark.parametrize("stage", STAGE_CONFIGS)
def test_help_names_the_words_that_a_value_can_be(stage):
    text = " ".join(stage_help(stage).split())
    for key in with_words(stage):
        assert f"{key.name}={shown(key.default)} {key.words}: " in text
        assert shown(key.default) in key.words.split(" | ")


@pytest.mark.parametrize("stage", ["importance", "prune", "distill", "teacher_logits", "generate"])
def test_other_words_are_refused_with_those_there_are(stage):
    for key in with_words(stage):
        *others, last = key.words.split(" | ")
        listed = f"(one of )?{', '.join(others)}( or|,) {last}"
        with pytest.raises(ValueError, match=rf"{re.escape(key.name)}=wrong must be {listed}"):
            load.compose(stage, complete(stage, ["output_dir=out", f"{key.name}=wrong"]))


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_shipped_entry_composes_as_its_first_lines_say(entry):
    text = (CONF / entry).read_text()
    usage = re.search(r"^# minitron (.*)$", text, re.MULTILINE)
    assert usage, f"conf/{entry} needs a line '# minitron <stage> {Path(entry).parent}=...'"
    stage, *overrides = shlex.split(usage.group(1))
    group, name = Path(entry).parent.as_posix(), Path(entry).stem
    assert f"{group}={name}" in overrides
    config = load.compose(stage, complete(stage, overrides))
    by_default = f"- {group}: {name}\n" in (CONF / f"{stage}.yaml").read_text()
    if group != "experiment" and not by_default:
        assert config != load.compose(stage, complete(stage, overrides[1:])), "it changes nothing"


def test_stage_files_add_no_defaults_of_their_own():
    for stage in STAGE_CONFIGS:
        lines = (CONF / f"{stage}.yaml").read_text().splitlines()
        keys = [line for line in lines if re.match(r"\w+:", line)]
        assert keys == ["defaults:", "hydra:"]


def test_pruning_entries_are_the_published_ones():
    width = load.compose("prune", complete("prune", ["pruning=llama31_minitron_4b_width"]))
    assert isinstance(width, PruneConfig)
    assert (width.pruning.target["hidden_size"], width.pruning.target["ffn_hidden_size"]) == (
        3072,
        9216,
    )
    depth = load.compose("prune", complete("prune", ["pruning=llama31_minitron_4b_depth"]))
    assert isinstance(depth, PruneConfig)
    assert depth.pruning.drop_layers == list(range(16, 32))


def test_defaults_that_differ_between_stages():
    importance = load.compose("importance", complete("importance", []))
    evaluate = load.compose("evaluate", complete("evaluate", []))
    assert isinstance(importance, ImportanceConfig)
    assert isinstance(evaluate, EvaluateConfig)
    assert importance.data.num_samples == 1024
    assert evaluate.data.split_name == "test"


@pytest.mark.parametrize(("given", "length"), [([], 24), (["data.seq_length=16"], 16)])
def test_rows_of_ids_say_how_long_they_are(tmp_path, given, length):
    path = tmp_path / "ids.npy"
    np.save(path, np.zeros((2, 24), dtype=np.int64))
    config = load.compose("importance", complete("importance", [f"data.path={path}", *given]))
    assert isinstance(config, ImportanceConfig)
    assert config.data.seq_length == length


@pytest.mark.parametrize("stage", STAGE_CONFIGS)
def test_keys_are_documented(stage):
    """The names in TargetConfig and Adam's are Megatron's own and need no words."""
    bare = [k.name for k in schema.keys(STAGE_CONFIGS[stage]) if not k.doc]
    assert all(name.startswith(("pruning.target.", "optim.adam_")) for name in bare) or not bare


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        -1,
        1e-5,
        "plain",
        "",
        "null",
        "3",
        "a b",
        "a,b",
        "a=b",
        "it's",
        'say "x"',
        "back\\slash",
        "ends with \\",
        "nan",
        "True",
        ".5",
        "./x",
        "1e5",
        "\\'",
        "[x]",
        "{a:b}",
        "/data/x-1_2.bin",
        [1, 2],
        ["a,b", "c"],
        [],
        {"a": 1, "b": [None, "d'e"]},
    ],
)
def test_values_survive_quoting(value):
    overrides = [load.override("+inputs.x", value), "output_dir=out"]
    config = load.compose("pipeline", overrides)
    assert isinstance(config, PipelineConfig)
    assert config.inputs["x"] == value
    assert type(config.inputs["x"]) is type(value)


def test_every_part_of_a_nested_value_is_checked():
    with pytest.raises(ValueError, match=r"optim.min_lr=0.5 must lie between 0 and optim.lr"):
        load.compose("distill", complete("distill", ["optim.min_lr=0.5"]))
    steps = ["optim.lr_warmup_steps=9", "trainer.max_steps=9"]
    with pytest.raises(ValueError, match=r"lr_warmup_steps=9 must be below trainer.max_steps=9"):
        load.compose("distill", complete("distill", steps))
    config = load.compose("distill", complete("distill", ["optim.lr=1", "optim.min_lr=0.5"]))
    assert isinstance(config, DistillConfig)
    assert config.optim.min_lr == 0.5


def test_stage_reference_is_the_folder_of_the_item():
    config = load.compose("pipeline", ["output_dir=out", "+inputs.x=${stage:a}/b"])
    assert isinstance(config, PipelineConfig)
    assert config.inputs["x"] == "out/a/b"


@pytest.mark.parametrize(
    ("stage", "override", "says"),
    [
        ("import", "source=", "source= is empty"),
        ("import", "output_dir=", "output_dir= is empty"),
        ("importance", "checkpoint=", "checkpoint= is empty"),
        ("prune", "importance=", "importance= is empty"),
        ("distill", "teacher=", "teacher= is empty"),
        ("import", "output_dir=/", "output_dir=/ is the root of the file system"),
        ("pipeline", "output_dir=/tmp/..", "output_dir=/tmp/.. is the root of the file system"),
        ("import", "source=null", "source=null: source needs a value; set it"),
        ("importance", "data.seq_length=null", "data.seq_length=null: data.seq_length needs a"),
        (
            "importance",
            "scores.layer_criteria=lm_loss",
            r"must be a list; write scores.layer_criteria=\[lm_loss\]",
        ),
        ("prune", "pruning.drop_layers=1", r"must be a list; write pruning.drop_layers=\[1\]"),
        ("importance", "data.path=[a,b]", r"data.path=\['a', 'b'\] must be one value, not a list"),
        ("distill", "~optim.min_lr", "~optim.min_lr: a key cannot be removed; leave it out"),
        ("distill", "parallel=null", "leave parallel out to take none of them"),
        ("distill", "optim.lr=-1", "optim.lr=-1.0 must not be negative"),
        ("distill", "optim.lr=1e-6", "lower optim.min_lr, or raise optim.lr"),
    ],
)
def test_a_refusal_names_the_key_and_what_to_write(stage, override, says):
    given = complete(stage, [override]) if not override.startswith("~") else [override]
    with pytest.raises(ValueError, match=says):
        load.compose(stage, given)


@pytest.mark.parametrize(
    "value", ["home/modèle", "a, b", "a b (1)", "x'y", 'x"y', "a=b", "x#y", "[x"]
)
def test_a_text_that_hydra_cannot_read_is_shown_in_quotes(value):
    """Which the shell takes as they stand."""
    with pytest.raises(ValueError, match="is not a key=value that Hydra can read") as refused:
        load.compose("import", complete("import", [f"source=./{value},"]))
    [written] = shlex.split(str(refused.value).rpartition("quote it: ")[2])
    config = load.compose("import", complete("import", [written]))
    assert isinstance(config, ImportConfig)
    assert config.source == f"./{value},"


@pytest.mark.parametrize("columns", [60, 80, 100, 200])
@pytest.mark.parametrize("stage", STAGE_CONFIGS)
def test_help_fits_the_terminal(monkeypatch, stage, columns):
    """All but keys whose default is longer than it is, which can be copied as they stand."""
    monkeypatch.setenv("COLUMNS", str(columns))
    wide = [line for line in stage_help(stage).splitlines() if len(line) > columns]
    assert all(re.fullmatch(r"  [a-z_.]+=\S+", line) for line in wide), wide
