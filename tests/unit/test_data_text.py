"""Documents out of every text form, and what is refused."""

import json
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from nemo_minitron.checkpoint.manifest import fingerprint
from nemo_minitron.checkpoint.watched import files_read
from nemo_minitron.data.checks import check_batch_sizes, check_data
from nemo_minitron.data.repeats import Digests
from nemo_minitron.data.splits import parse_split, split_bounds, split_numbers
from nemo_minitron.data.text import find_source, read_documents, unique_documents
from tests.helpers.data_fixtures import data_config, make_texts, write_jsonl


def _read(path, **keys):
    return list(read_documents(find_source(path), data_config(path, **keys)))


def test_text_file_is_split_at_the_separator_and_stripped(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbf one\r\ntwo \r\n\r\n\r\n\r\n three\n\n  \n\nfour\n")
    assert _read(file) == ["one\ntwo", "three", "four"]
    assert _read(file, document_separator="three") == ["one\ntwo", "four"]


def test_separator_across_read_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("nemo_minitron.data.formats.CHUNK", 3)
    file = tmp_path / "a.txt"
    file.write_text("ab==cdef==g==h")
    assert _read(file, document_separator="==") == ["ab", "cdef", "g", "h"]


def test_folder_is_read_in_sorted_order(tmp_path):
    (tmp_path / "b.txt").write_text("second\n\nstill second\n")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "d.txt").write_text("  \n")
    (tmp_path / "readme.md").write_text("not data")
    write_jsonl(tmp_path / "c.jsonl", ["third", "", "fourth"])
    assert _read(tmp_path) == ["first", "second\n\nstill second", "third", "fourth"]


def test_exact_repeats_are_left_out():
    dropped: Counter[str] = Counter()
    assert list(unique_documents(["a", "b", "a", "a"], dropped)) == ["a", "b"]
    assert dropped["duplicates"] == 2


def test_repeats_are_told_at_less_than_thirty_bytes_each():
    texts, seen = list(map(str, range(20_000))), Digests()
    tracemalloc.start()
    assert all(map(seen.add, texts))
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 30 * len(texts)
    assert most < 45 * len(texts)
    assert not any(map(seen.add, texts))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "does not exist; set data.path to"),
        ("empty.txt", b"", "holds no documents"),
        ("blank.txt", b" \n\n \n", "holds no documents"),
        ("empty.jsonl", b"\n", "holds no documents"),
        ("table.csv", b"a,b", "unknown form; it must be a file of one of the forms .txt"),
        ("latin.txt", b"caf\xe9", "latin.txt, line 1 is not UTF-8"),
        ("json.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3: not valid JSON"),
        ("list.jsonl", b"[1]\n", "line 1: the record must be a JSON object, not list"),
        (
            "key.jsonl",
            b'{"text": "a"}\n{"content": "b"}\n',
            "line 2: no key 'text'; set data.text_key",
        ),
        ("type.jsonl", b'{"text": 3}\n', "line 1: 'text' holds int, not text"),
        ("pair.bin", b"", "pair.bin is there but .*pair.idx is missing"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        check_data(data_config(tmp_path / name))


def test_bad_folders_and_keys_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"folder without a file of the forms .txt .*it holds nothing"
    ):
        check_data(data_config(tmp_path))
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"document_separator must not be empty"):
        check_data(data_config(tmp_path, document_separator=""))


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "-1,1", "0,0,0", "1e3,1", "nan,1"])
def test_bad_splits_are_refused(tmp_path, split):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"data.split='.*such as data.split=90/5/5"):
        check_data(data_config(tmp_path / "a.txt", split=split))


def test_a_split_without_documents_names_how_many_it_needs(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(9))
    data = data_config(path, split="90,5,5", split_name="test")
    with pytest.raises(ValueError, match=r"holds 9 and it needs at least 11 documents"):
        check_data(data)
    assert all(b < e for n in range(11, 200) for b, e in split_bounds("90,5,5", n)[2:])
    with pytest.raises(ValueError, match=r"gives the test split no share"):
        check_data(data_config(path, split="9,1", split_name="test"))


def test_repeats_do_not_count_as_documents(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["same text"] * 100)
    with pytest.raises(ValueError, match=r"holds 1 and it needs"):
        check_data(data_config(path), splits=("train", "validation"))


def test_num_samples_does_not_apply_to_training(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(9))
    with pytest.raises(ValueError, match=r"data.num_samples=4 does not apply to training"):
        check_data(data_config(path, num_samples=4), splits=("train",))


def test_batch_sizes():
    data = data_config("x", micro_batch_size=2, global_batch_size=8)
    check_batch_sizes(data, 4)
    with pytest.raises(ValueError, match=r"global_batch_size=8 must be a multiple of .* 6"):
        check_batch_sizes(data, 3)


def test_split_arithmetic_is_megatrons():
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    draw = np.random.default_rng(0)
    splits = ["90,5,5", "1/1/1", "99:1", "0 1 1", "0.5,.25,0.25", "7"]
    splits += [",".join(map(str, draw.integers(1, 50, 3))) for _ in range(40)]
    for split in splits:
        shares = parse_and_normalize_split(",".join(split_numbers(split)))
        assert parse_split(split) == tuple(shares)
        matrix = convert_split_vector_to_split_matrix(shares)
        for count in (1, 2, 3, 10, 11, 101, 4999):
            bounds = split_bounds(split, count)
            assert bounds[0][0] == 0
            assert bounds[-1][1] == count
            for part, (begin, end) in zip(matrix, bounds, strict=True):
                if part is None:
                    assert begin == end
                else:
                    assert (begin, end) == tuple(round(x * float(count)) for x in part)


def test_check_is_light(tmp_path):
    import subprocess
    import sys

    path = write_jsonl(tmp_path / "a.jsonl", make_texts(20))
    code = (
        "import sys; from nemo_minitron.config.training import DataConfig;"
        "from nemo_minitron.data.checks import check_data;"
        f"check_data(DataConfig(path={json.dumps(str(path))}));"
        "assert not {'torch', 'megatron', 'nemo', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ---- forms of files


def _lines(name):
    return "".join(json.dumps({"text": f"{name} {n} é"}) + "\n" for n in range(3))


def _shards(folder):
    """One shard in every form and compression; returns the texts in reading order."""
    import bz2
    import gzip
    import lzma

    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    (folder / "a.jsonl").write_text(_lines("a"))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(_lines("b").encode()))
    (folder / "c.json").write_text(_lines("c"))
    (folder / "d.JSONL").write_text("\ufeff" + _lines("d"))
    pyarrow.parquet.write_table(
        pyarrow.table({"text": [f"e {n} é" for n in range(3)], "n": [1, 2, 3]}),
        folder / "e.parquet",
        row_group_size=2,
    )
    records = [{"text": f"f {n} é"} for n in range(3)]
    (folder / "f.json").write_text(json.dumps(records, indent=2))
    (folder / "g.ndjson.bz2").write_bytes(bz2.compress(_lines("g").encode()))
    (folder / "h.json.xz").write_bytes(lzma.compress(json.dumps(records).encode()))
    texts = [f"{name} {n} é" for name in "abcdefg" for n in range(3)]
    return texts + [record["text"] for record in records]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_a_folder_of_mixed_forms_is_read_whole(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("nemo_minitron.data.formats.CHUNK", chunk)
    texts = _shards(tmp_path / "data")
    assert _read(tmp_path / "data") == texts


def test_what_a_folder_holds_besides_is_named(tmp_path, caplog):
    _shards(tmp_path / "data")
    (tmp_path / "data" / "more").mkdir()
    (tmp_path / "data" / "x.csv").write_text("a,b")
    (tmp_path / "data" / "empty.txt").touch()
    (tmp_path / "data" / ".DS_Store").touch()
    check_data(data_config(tmp_path / "data"))
    assert "2 of 11 entries of the folder are not read: more/, x.csv;" in caplog.text
    assert "1 files are empty: empty.txt" in caplog.text
    assert "DS_Store" not in caplog.text
    (tmp_path / "outside" / "inside").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"are not searched\); it holds inside/; set data.path"):
        check_data(data_config(tmp_path / "outside"))
    (tmp_path / "data" / "b.txt").symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"b.txt is not an ordinary file, or a link to one"):
        check_data(data_config(tmp_path / "data"))


def _gzip(text):
    import gzip

    return gzip.compress(text, mtime=0)  # the time would make every worker collect another test


DEEP = b"[" * 100_000 + b"]" * 100_000
BAD_LINES = [
    ("e.parquet", b"PAR1", r"file .*e.parquet is not a readable Parquet file"),
    ("e.parquet", b"", r"file .*e.parquet is not a readable Parquet file"),
    (
        "cut.jsonl.gz",
        _gzip(b'{"text": "a"}\n' * 99)[:-9],
        r"cut.jsonl.gz cannot be read .*cut short",
    ),
    ("no.jsonl.gz", b"plain", r"no.jsonl.gz cannot be read .*damaged"),
    ("no.txt.xz", b"plain", r"no.txt.xz cannot be read"),
    (
        "half.jsonl",
        b'{"text": "ok"}\n{"text": "a \\ud83d b"}\n',
        r"half.jsonl, line 2: .*\\ud83d at",
    ),
    ("half.json", b'[{"text": "ok"}, {"text": "a \\ud83d"}]', r"half.json, record 2: .*surrogate"),
    ("raw.jsonl", b'{"text": "ok"}\n{"text": "\xed\xa0\xbd"}\n', r"raw.jsonl, line 2 is not UTF-8"),
    ("nul.txt", b"one\ntwo\n\0\n", r"nul.txt, line 3 holds a NUL character"),
    ("nul.jsonl", b'{"text": "a"}\n\0\0\0\n', r"nul.jsonl, line 2: not valid JSON"),
    ("latin.txt.gz", _gzip(b"one\ncaf\xe9"), r"latin.txt.gz, line 2 is not UTF-8 text"),
    (
        "deep.jsonl",
        b'{"text": "a"}\n{"text": ' + DEEP,
        r"line 2: .* nested too deeply",
    ),
    ("deep.json", b'{"text": ' + DEEP + b"}", r"deep.json, record 1: .* nested too deeply"),
    (
        "long.jsonl",
        b'{"text": "a", "n": ' + b"9" * 9999 + b"}",
        r"line 1: not valid JSON \(Exceeds",
    ),
    ("twice.jsonl", b'{"text": "a", "text": "b"}', r"line 1: the record has two 'text'"),
    ("open.json", b'[{"text": "a"}, {"text": "b"}', r"record 2: .*the file is cut short"),
    ("open.json", b'[{"text": "a"}, {"text": "b', r"record 2: not valid JSON"),
    ("comma.json", b'[{"text": "a"} {"text": "b"}]', r"record 1: .*'{' follows it"),
    ("after.json", b'[{"text": "a"}] {"text": "b"}', r"something follows the list"),
    ("list.json", b'[["a"]]', r"record 1: the record must be a JSON object, not list"),
    ("null.jsonl", b'{"text": null}', r"line 1: 'text' holds NoneType, not text"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_LINES)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, name, content, message):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("good")
    (tmp_path / "data" / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"data.path: .*{message}"):
        check_data(data_config(tmp_path / "data"))


def test_parquet_columns_and_rows_are_named(tmp_path):
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None], "n": [1, 2]}), file)
    with pytest.raises(ValueError, match=r"a.parquet, row 2: 'text' holds NoneType"):
        _read(file)
    with pytest.raises(ValueError, match=r"row 1: 'n' holds int, not text"):
        _read(file, text_key="n")
    with pytest.raises(ValueError, match=r"0 columns 'body'; set data.text_key .*\['n', 'text'\]"):
        _read(file, text_key="body")


def test_one_long_part_is_looked_at_once(tmp_path, monkeypatch):
    """Quadratic reading would take minutes here."""
    monkeypatch.setattr("nemo_minitron.data.formats.CHUNK", 16)
    text = "word " * 200_000
    (tmp_path / "a.txt").write_text(text + "\n\nend")
    (tmp_path / "b.json").write_text(json.dumps([{"text": text}, {"text": "end"}]))
    assert _read(tmp_path / "a.txt") == _read(tmp_path / "b.json") == [text.strip(), "end"]


def test_a_pattern_reads_subfolders_in_sorted_order(tmp_path, caplog):
    (tmp_path / "data" / "b" / "deep").mkdir(parents=True)
    write_jsonl(tmp_path / "data" / "c.jsonl", ["third"])
    write_jsonl(tmp_path / "data" / "b" / "deep" / "a.jsonl", ["second"])
    (tmp_path / "data" / "a.txt").write_text("first\n\nstill first")
    (tmp_path / "data" / "b" / "x.csv").write_text("a,b")
    pattern = tmp_path / "data" / "**" / "*.*"
    assert _read(pattern) == ["first\n\nstill first", "second", "third"]
    check_data(data_config(pattern, split="1"))
    assert "1 of 4 files of the pattern are not read: x.csv; read are files" in caplog.text
    before = fingerprint(pattern)
    write_jsonl(tmp_path / "data" / "b" / "new.jsonl", ["more"])
    assert fingerprint(pattern) != before
    assert len(files_read("data.path", pattern)) == 5
    with pytest.raises(ValueError, match=r"\*.csv names no file of the forms .*; it names x.csv"):
        find_source(tmp_path / "data" / "b" / "*.csv")
    with pytest.raises(ValueError, match=r"\*.xml does not exist; set data.path to"):
        find_source(tmp_path / "data" / "*.xml")


def test_a_folder_of_the_library_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    texts = make_texts(20)
    saved = datasets.Dataset.from_dict({"body": texts, "n": list(range(20))})
    saved.save_to_disk(tmp_path / "one", num_shards=3)
    assert _read(tmp_path / "one", text_key="body") == texts
    (first,) = (tmp_path / "one").glob("data-00000-*.arrow")
    assert _read(first, text_key="body") == texts[:7]
    with pytest.raises(ValueError, match=r"0 columns 'text'; set data.text_key .*\['body', 'n'\]"):
        _read(tmp_path / "one")
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match=r"the splits test, train of a DatasetDict; set data.path"):
        find_source(tmp_path / "two")
    first.write_bytes(first.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"data-00000-of-00003.arrow is not a readable Arrow file"):
        _read(tmp_path / "one", text_key="body")
    first.unlink()
    with pytest.raises(ValueError, match=r"state.json names .*data-00000-.*, which is no file"):
        find_source(tmp_path / "one")
