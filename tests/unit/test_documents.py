"""JSON and YAML of anybody: read as it stands, or one ``ValueError`` in no time."""

import re
import time

import pytest
import yaml

from nemo_minitron.documents import (
    json_value,
    read_json_object,
    read_yaml,
    read_yaml_mapping,
    yaml_value,
)


def bomb(seed: str, repeat: str) -> str:
    """Nine aliases of nine aliases of ...: a few hundred bytes that stand for 9 ** 9 values."""
    lines = [f"a: &a {seed}"]
    for one, before in zip("bcdefghi", "abcdefgh", strict=True):
        lines.append(f"{one}: &{one} {repeat.format(','.join([f'*{before}'] * 9))}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (bomb("[x,x,x,x,x,x,x,x,x]", "[{}]"), "more than 50000 values"),
        (bomb("{x: 1}", "{{<<: [{}]}}"), "more than 50000 values"),
        ("a: " + "[" * 100_000 + "]" * 100_000, "nested more than 100 deep"),
        ("\n".join(" " * depth + "a:" for depth in range(1400)), "nested more than 100 deep"),
        ("&a [*a]", "an alias stands inside the part that it repeats"),
        ("a: &a {b: [*a]}", "an alias stands inside the part that it repeats"),
        ("!!python/object/apply:os.system [ls]", "not plain YAML"),
        ("!!timestamp yesterday", "not plain YAML"),
        ("!!bool perhaps", "not plain YAML"),
        ('!!int ""', "not plain YAML"),
        ("2024-13-45", "not plain YAML"),
        ("{[1]: 2}", "not plain YAML"),
        ("1" * 5000, "not plain YAML"),
        ("a\0b", "not plain YAML"),
        ("x" * (1 << 21), "larger than 1 MiB"),
    ],
    ids=lambda text: text[:12],
)
def test_yaml_that_is_refused(text, says):
    start = time.monotonic()
    with pytest.raises(ValueError, match=says):
        yaml_value(text)
    assert time.monotonic() - start < 10


def test_plain_yaml_is_what_pyyaml_says():
    text = "a: &x [1, 2.5, null, yes, '3']\nb: *x\nc: {d: &y {e: 1}, f: {<<: *y, g: 2}}\n"
    assert yaml_value(text) == yaml.safe_load(text)
    assert yaml_value("[" * 100 + "]" * 100) == yaml.safe_load("[" * 100 + "]" * 100)
    assert yaml_value("") is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "nested more than 100 deep"),
        ("[" * 500 + "]" * 500, "nested more than 100 deep"),
        (b"[" * 102 + b"]" * 102, "nested more than 100 deep"),
        ("1" * 5000, "4300 digits"),
        (b"\xff\xff", ""),
        ('{"a": ', ""),
    ],
    ids=["object", "text", "bytes", "digits", "encoding", "cut"],
)
def test_json_that_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        json_value(text)


def test_json_is_read_as_it_stands():
    assert json_value('{"a": [1, {"b": "[[["}]}') == {"a": [1, {"b": "[[["}]}
    assert json_value("\ufeff[1]".encode()) == [1]
    many = [[index] for index in range(1000)]
    assert json_value(str(many)) == many


def test_files_are_named(tmp_path):
    path = tmp_path / "x.json"
    for text in (b"", b"[" * 100_000, b"\xff\xfe"):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=rf"{re.escape(str(path))} cannot be read"):
            read_json_object(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"x\.json must hold a JSON object"):
        read_json_object(path)
    with pytest.raises(ValueError, match="must hold a mapping"):
        read_yaml_mapping(path)
    path.write_text("{1: 2}")
    with pytest.raises(ValueError, match="must hold a mapping"):
        read_yaml_mapping(path)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"x\.json cannot be read: .*nested"):
        read_yaml(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_json_object(tmp_path)


def test_experiment_files(tmp_path, capsys):
    """Hydra reads them by itself, so they are looked at before it does."""
    from nemo_minitron.cli import main

    (tmp_path / "experiment").mkdir()
    path = tmp_path / "experiment" / "mine.yaml"
    for text in (bomb("[x,x,x,x,x,x,x,x,x]", "[{}]"), "a: " + "[" * 100_000):
        path.write_text(text)
        command = ["pipeline", "--config-dir", str(tmp_path), "experiment=mine"]
        assert main([*command, f"output_dir={tmp_path / 'out'}"]) == 2
        assert f"{path} cannot be read: it " in capsys.readouterr().err


def test_overrides(capsys):
    from nemo_minitron.cli import main

    assert main(["import", "source=" + "[" * 100_000]) == 2
    assert "has more than 1000 brackets" in capsys.readouterr().err
