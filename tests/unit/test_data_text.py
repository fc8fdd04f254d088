"""Documents out of every text form, and what is refused."""

import json
from collections import Counter

import numpy as np
import pytest

from nemo_minitron.data.checks import check_batch_sizes, check_data
from nemo_minitron.data.splits import parse_split, split_bounds, split_numbers
from nemo_minitron.data.text import find_source, read_documents, unique_documents
from tests.unit.data_fixtures import data_config, make_texts, write_jsonl


def _read(path, **keys):
    return list(read_documents(find_source(path), data_config(path, **keys)))


def test_text_file_is_split_at_the_separator_and_stripped(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbf one\r\ntwo \r\n\r\n\r\n\r\n three\n\n  \n\nfour\n")
    assert _read(file) == ["one\ntwo", "three", "four"]
    assert _read(file, document_separator="three") == ["one\ntwo", "four"]


def test_separator_across_read_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("nemo_minitron.data.text._CHUNK", 3)
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
    dropped = Counter()
    assert list(unique_documents(["a", "b", "a", "a"], dropped)) == ["a", "b"]
    assert dropped["duplicates"] == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "does not exist; set data.path to"),
        ("empty.txt", b"", "holds no documents"),
        ("blank.txt", b" \n\n \n", "holds no documents"),
        ("empty.jsonl", b"\n", "holds no documents"),
        ("table.csv", b"a,b", "unknown form; it must be a .txt file"),
        ("latin.txt", b"caf\xe9", "latin.txt is not UTF-8"),
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
    with pytest.raises(ValueError, match=r"folder without .txt or .jsonl files"):
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
