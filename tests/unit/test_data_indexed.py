"""Text -> .bin/.idx -> GPTDataset: exact, leak-free, cached, checked."""

import json
import struct
import threading
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from tokenizers import Tokenizer

from nemo_minitron.config.training import CALIBRATION_SAMPLES
from nemo_minitron.data.cache import build_once, cache_folder
from nemo_minitron.data.checks import check_data
from nemo_minitron.data.datasets import build_datasets, build_split, prepare_tokens
from nemo_minitron.data.pair import read_index, write_index
from nemo_minitron.data.shuffle import document_order
from tests.helpers.data_fixtures import EOS, data_config, make_texts, save_tokenizer, write_jsonl

TEXTS = make_texts(40)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(JSONL path, tokenizer folder, vocab size)."""
    folder = tmp_path_factory.mktemp("corpus")
    vocab_size = save_tokenizer(folder / "tokenizer", TEXTS)
    return write_jsonl(folder / "a.jsonl", TEXTS), folder / "tokenizer", vocab_size


def _prepare(data, corpus, cache, **keys):
    _, tokenizer_dir, vocab_size = corpus
    return prepare_tokens(
        data, vocab_size=vocab_size, cache=cache, tokenizer_dir=tokenizer_dir, **keys
    )


# To mypy a dataset of torch has no length.
def _split(*args, **keys) -> Any:
    return build_split(*args, **keys)


def _datasets(*args, **keys) -> Any:
    return build_datasets(*args, **keys)


def _all_tokens(dataset):
    """Every token a dataset shows, as input or as label."""
    samples = [dataset[i] for i in range(len(dataset))]
    return torch.cat([torch.cat([s["tokens"], s["labels"]]) for s in samples])


def test_documents_decode_to_the_texts_in_seeded_order(tmp_path, corpus):
    data = data_config(corpus[0])
    tokens = _prepare(data, corpus, tmp_path)
    tokenizer = Tokenizer.from_file(str(corpus[1] / "tokenizer.json"))
    stored = IndexedDataset(str(tokens.path))
    eod = tokenizer.token_to_id(EOS)
    assert all(ids[-1] == eod and eod not in ids[:-1] for ids in stored)
    order = document_order(len(TEXTS), data.seed)
    assert sorted(order) == list(range(len(TEXTS)))
    assert list(order) != sorted(order)
    assert [tokenizer.decode(ids[:-1]) for ids in stored] == [TEXTS[i] for i in order]
    index = read_index(tokens.path)
    assert np.array_equal(index.lengths, stored.sequence_lengths)
    assert np.array_equal(index.documents, stored.document_indices)


def test_samples_are_the_documents_end_to_end(tmp_path, corpus):
    data = data_config(corpus[0], split="1")
    dataset = _split(data, _prepare(data, corpus, tmp_path))
    gpt = dataset.dataset
    stored = IndexedDataset(str(gpt.dataset_path))
    stream = np.concatenate([stored[int(i)] for i in gpt.document_index])
    assert len(dataset) == (len(stream) - 1) // data.seq_length
    for i in range(len(dataset)):
        begin = int(gpt.shuffle_index[i]) * data.seq_length
        sample = dataset[i]
        window = torch.from_numpy(stream[begin : begin + data.seq_length + 1].astype(np.int64))
        assert torch.equal(sample["tokens"], window[:-1])
        assert torch.equal(sample["labels"], window[1:])
        assert torch.equal(sample["loss_mask"], torch.ones(data.seq_length))
        assert torch.equal(sample["position_ids"], torch.arange(data.seq_length))
    assert dataset[None]["loss_mask"].sum() == 0


@pytest.mark.parametrize("form", ["jsonl", "txt", "folder"])
@pytest.mark.parametrize("seed", [1234, 7])
def test_no_token_of_a_document_is_in_two_splits(tmp_path, form, seed):
    """Each document is spelled in a letter of its own, so a token tells its document."""
    texts = [" ".join(chr(0x4E00 + d) * n for n in (1, 2, 3) * 20) for d in range(30)]
    vocab_size = save_tokenizer(tmp_path / "tokenizer", texts, vocab_size=2000)
    texts = [text for text in texts for _ in range(2)]  # repeats must not leak either
    if form == "folder":
        path = tmp_path / "texts"
        path.mkdir()
        for number, text in enumerate(texts):
            (path / f"{number}.txt").write_text(text)
    elif form == "txt":
        path = tmp_path / "a.txt"
        path.write_text("\n\n".join(texts))
    else:
        path = write_jsonl(tmp_path / "a.jsonl", texts)
    data = data_config(path, seed=seed)
    tokens = prepare_tokens(
        data, vocab_size=vocab_size, cache=tmp_path / "c", tokenizer_dir=tmp_path / "tokenizer"
    )
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    letters = []
    for dataset in _datasets(data, tokens, (1000, 1000, 1000)):
        letters.append(set(tokenizer.decode(_all_tokens(dataset).tolist())) - {" "})
    letters = [{c for c in split if 0x4E00 <= ord(c) < 0x4E00 + 30} for split in letters]
    assert not letters[0] & letters[1]
    assert not letters[0] & letters[2]
    assert not letters[1] & letters[2]
    assert [len(split) for split in letters] == [18, 6, 6]


def test_second_run_reuses_the_cache_and_inputs_decide_its_name(tmp_path, corpus):
    path, tokenizer_dir, _vocab_size = corpus
    cache = tmp_path / "cache"
    first = _prepare(data_config(path), corpus, cache)
    times = {f: f.stat().st_mtime_ns for f in cache.rglob("*")}
    copied = tmp_path / "copy.jsonl"
    copied.write_bytes(path.read_bytes())
    assert _prepare(data_config(copied, seq_length=16), corpus, cache) == first
    assert {f: f.stat().st_mtime_ns for f in cache.rglob("*")} == times
    others = [
        _prepare(data_config(path, seed=1), corpus, cache),
        _prepare(data_config(path, document_separator="w"), corpus, cache),
        prepare_tokens(
            data_config(path), vocab_size=70000, cache=cache, tokenizer_dir=tokenizer_dir
        ),
    ]
    copied.write_text(copied.read_text().replace("d1w", "d1v", 1))
    others.append(_prepare(data_config(copied), corpus, cache))
    assert len({first.path, *(other.path for other in others)}) == 5
    assert read_index(others[2].path).dtype == np.int32
    assert not list(cache.rglob("*.partial"))


def test_failed_build_leaves_nothing(tmp_path, corpus, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nemo_minitron.data.indexed.copy_documents", full)
    with pytest.raises(OSError, match=r"No space left"):
        _prepare(data_config(corpus[0]), corpus, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_one_rank_builds_and_the_others_wait(tmp_path):
    gate, calls, seen = threading.Barrier(3, timeout=20), [], []

    def fill(folder):
        calls.append(folder)
        (folder / "x").write_text("done")

    def barrier() -> None:
        gate.wait()

    def rank(number):
        build_once(tmp_path / "made", fill, number, barrier)
        seen.append((tmp_path / "made" / "x").read_text())

    threads = [threading.Thread(target=rank, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert seen == ["done"] * 3
    with pytest.raises(RuntimeError, match=r"rank 1 finds no"):
        build_once(tmp_path / "unseen", fill, 1)
    assert cache_folder(data_config("x"), tmp_path / "run" / "out") == tmp_path / "run/.data-cache"


def test_training_repeats_epochs_and_the_others_never_do(tmp_path, corpus):
    data = data_config(corpus[0])
    tokens = _prepare(data, corpus, tmp_path)
    train, validation, test = _datasets(data, tokens, (500, 4, 10**6))
    assert len(train) == 500
    assert len(validation) == 4
    once = _split(data_config(corpus[0], split_name="test"), tokens)
    assert len(test) == len(once) < 100
    assert all(torch.equal(test[i]["tokens"], once[i]["tokens"]) for i in range(len(test)))
    train, validation, test = _datasets(data, tokens, (3, 0, 0))
    assert len(train) == 3
    assert validation is None
    assert test is None


def test_num_samples_takes_the_first_and_is_repeatable(tmp_path, corpus, caplog, monkeypatch):
    data = data_config(corpus[0])
    tokens = _prepare(data, corpus, tmp_path / "a")
    whole = _split(data, tokens)
    few = data_config(corpus[0], num_samples=5)
    again = _split(few, _prepare(few, corpus, tmp_path / "b"))
    assert len(again) == 5
    assert all(torch.equal(whole[i]["tokens"], again[i]["tokens"]) for i in range(5))
    default = data_config(corpus[0], num_samples=CALIBRATION_SAMPLES)
    assert len(_split(default, tokens)) == len(whole) < CALIBRATION_SAMPLES
    assert f"all of them are read, not {CALIBRATION_SAMPLES}" in caplog.text
    caplog.clear()
    monkeypatch.setenv("RANK", "1")  # one rank says it for all
    assert len(_split(default, tokens)) == len(whole)
    assert not caplog.text
    monkeypatch.delenv("RANK")
    many = data_config(corpus[0], num_samples=10**4)
    message = f"set data.num_samples to at most {len(whole)}"
    with pytest.raises(ValueError, match=message):
        check_data(many, tokenizer_dir=corpus[1])
    with pytest.raises(ValueError, match=message):
        _prepare(many, corpus, tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        _split(many, tokens)


def test_too_short_and_wrong_tokenizers_are_refused(tmp_path, corpus):
    path, tokenizer_dir, _vocab_size = corpus
    long = data_config(path, seq_length=10**5)
    with pytest.raises(ValueError, match=r"less than one sequence of data.seq_length=100000"):
        check_data(long, tokenizer_dir=tokenizer_dir)
    with pytest.raises(ValueError, match=r"less than one sequence"):
        _prepare(long, corpus, tmp_path)
    with pytest.raises(ValueError, match=r"but the model's vocab_size is 300"):
        prepare_tokens(
            data_config(path), vocab_size=300, cache=tmp_path, tokenizer_dir=tokenizer_dir
        )
    with pytest.raises(ValueError, match=r"the checkpoint has no tokenizer"):
        prepare_tokens(data_config(path), vocab_size=300, cache=tmp_path)
    with pytest.raises(ValueError, match=r"holds no tokenizer.json"):
        check_data(data_config(path), tokenizer_dir=tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    plain = {"tokenizer_class": "PreTrainedTokenizerFast"}  # others have an end token by default
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=r"names no end-of-sequence token"):
        check_data(data_config(path), tokenizer_dir=tmp_path)


def _write_pair(prefix, documents, dtype=np.int32, sequences=1):
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        parts = [len(part) for part in np.array_split(ids, sequences)]
        builder.add_document(torch.tensor(ids), parts)
    builder.finalize(f"{prefix}.idx")


def test_existing_pair(tmp_path):
    documents = [list(range(i, i + 50)) for i in range(10)]
    prefix = tmp_path / "my.data"
    _write_pair(prefix, documents)
    for path in (prefix, f"{prefix}.bin", f"{prefix}.idx"):
        data = data_config(path)
        check_data(data, splits=("train", "validation"))
        tokens = prepare_tokens(data, vocab_size=100, cache=tmp_path / "c")
        train = _datasets(data, tokens, (8, 0, 0))[0]
        assert set(_all_tokens(train).tolist()) <= set(range(55))
    with pytest.raises(ValueError, match=r"holds token id 58 but the model's vocab_size is 58"):
        prepare_tokens(data_config(prefix), vocab_size=58, cache=tmp_path / "c")
    assert not list(tmp_path.glob("my.data*/"))


def test_damaged_pairs_and_cut_documents_are_refused(tmp_path):
    documents = [list(range(60))] * 10
    prefix = tmp_path / "p"
    _write_pair(prefix, documents, sequences=3)
    with pytest.raises(ValueError, match=r"at sequence 10, inside a document"):
        check_data(data_config(prefix, split="1/1/1"))
    check_data(data_config(prefix, split="3/3/4"))
    index = (tmp_path / "p.idx").read_bytes()
    (tmp_path / "p.idx").write_bytes(index[:-9])
    with pytest.raises(ValueError, match=r"cut short"):
        check_data(data_config(prefix))
    (tmp_path / "p.idx").write_bytes(b"x" + index)
    with pytest.raises(ValueError, match=r"not a Megatron index"):
        check_data(data_config(prefix))
    (tmp_path / "p.idx").write_bytes(index)
    (tmp_path / "p.bin").write_bytes(b"1234")
    with pytest.raises(ValueError, match=r"has 4 bytes but its index names 600 tokens of 4 bytes"):
        check_data(data_config(prefix))
    _write_pair(prefix, [])
    with pytest.raises(ValueError, match=r"holds no documents"):
        check_data(data_config(prefix))


def test_npy_rows_are_taken_as_they_are(tmp_path):
    ids = np.arange(5 * 32, dtype=np.uint16).reshape(5, 32)
    path = tmp_path / "a.npy"
    np.save(path, ids)
    data = data_config(path, num_samples=4)
    check_data(data, vocab_size=160)
    tokens = prepare_tokens(data, vocab_size=160, cache=tmp_path)
    dataset = _split(data, tokens)
    assert len(dataset) == 4
    sample = dataset[2]
    row = torch.from_numpy(ids[2].astype(np.int64))
    assert torch.equal(sample["tokens"], row)
    assert torch.equal(sample["labels"], torch.cat([row[1:], torch.zeros(1, dtype=torch.int64)]))
    assert sample["loss_mask"].tolist() == [1.0] * 31 + [0.0]
    assert dataset[None]["loss_mask"].sum() == 0
    data.num_samples = None
    assert len(_split(data, tokens)) == 5
    train, validation, _ = _datasets(data, tokens, (12, 0, 0))
    assert len(train) == 12
    assert validation is None
    assert torch.equal(train[7]["tokens"], row)


def test_npy_gives_no_validation_and_says_so(tmp_path, caplog):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((5, 32), dtype=np.int64))
    data = data_config(path)
    tokens = prepare_tokens(data, vocab_size=1, cache=tmp_path, splits=("train", "validation"))
    assert _datasets(data, tokens, (12, 4, 0))[1] is None
    assert "no validation" in caplog.text


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros((2, 31), np.int64), "set data.seq_length=31"),
        (np.zeros(32, np.int64), r"has shape \[32\]; it must be \[samples, data.seq_length\]"),
        (np.zeros((0, 32), np.int64), "at least one sample"),
        (np.zeros((2, 32), np.float32), "holds float32, not integer token ids"),
        (np.array([{}]), "not a readable .npy"),
        (np.full((2, 32), 9), "holds token id 9 but the model's vocab_size is 9"),
        (np.full((2, 32), -1), "holds token id -1"),
        (np.zeros((2, 32), np.int64), "num_samples=3 is more than the 2"),
    ],
)
def test_bad_npy_is_refused(tmp_path, ids, message):
    np.save(tmp_path / "a.npy", ids)
    data = data_config(tmp_path / "a.npy", num_samples=3 if "num_samples" in message else None)
    with pytest.raises(ValueError, match=message):
        check_data(data, vocab_size=9)


# ---- hostile and damaged indices


@pytest.mark.parametrize(
    ("at", "form", "value", "says"),
    [
        (18, "<Q", 1 << 60, r"cut short: it declares 1152921504606846976 sequences"),
        (26, "<Q", (1 << 64) - 1, r"cut short: it declares 10 sequences and 18446744073709551615"),
        (34, "<i", -50, r"a sequence of negative length"),
        (34, "<i", 51, r"its index names 501 tokens"),
        (34 + 40, "<q", -4, r"names tokens outside of"),
        (34 + 40 + 72, "<q", 1 << 40, r"names tokens outside of"),
        (34 + 120, "<q", 3, r"does not share its 10 sequences among documents"),
        (34 + 120 + 16, "<q", 9, r"does not share its 10 sequences among documents"),
        (26, "<Q", 0, r"does not share its 10 sequences among documents"),
    ],
)
def test_what_an_index_declares_is_checked(tmp_path, at, form, value, says):
    _write_pair(tmp_path / "a", [list(range(50)) for _ in range(10)])
    path = tmp_path / "a.idx"
    raw = bytearray(path.read_bytes())
    struct.pack_into(form, raw, at, value)
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=says):
        read_index(tmp_path / "a")


def test_the_pair_is_the_one_that_megatron_writes(tmp_path):
    documents = [np.arange(n, dtype=np.int32) for n in (5, 1, 7)]
    _write_pair(tmp_path / "theirs", documents)
    (tmp_path / "ours.bin").write_bytes(b"".join(ids.tobytes() for ids in documents))
    write_index(tmp_path / "ours", np.int32, np.array([5, 1, 7]))
    for suffix in (".bin", ".idx"):
        ours, theirs = (tmp_path / f"{name}{suffix}" for name in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()
