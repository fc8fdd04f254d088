"""SFT records: which tokens are learnt, which records share a sample, and what is refused."""

import json
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from nemo_minitron.config.inference import GenerateConfig
from nemo_minitron.config.training import DataConfig, TrainerConfig
from nemo_minitron.data import sft
from nemo_minitron.data.blend import BlendedSamples
from nemo_minitron.data.chat import check_record, encode
from nemo_minitron.data.checks import check_data
from nemo_minitron.data.datasets import (
    build_datasets,
    build_split,
    prepare_tokens,
    training_datasets,
)
from nemo_minitron.data.packing import best_fit
from nemo_minitron.data.prompts import read_prompts
from nemo_minitron.data.sft import check_packing
from nemo_minitron.data.text import find_source
from tests.helpers.data_fixtures import EOS
from tests.helpers.sft_fixtures import (
    MARKED,
    PLAIN,
    chat_tokenizer,
    conversations,
    loaded,
    write_records,
)
from tests.helpers.tiny import LLAMA, NEMOTRON_H

SEQ = 128


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tokenizers: without marks in the template, with marks, without a template."""
    root = tmp_path_factory.mktemp("tokenizers")
    for name, template in (("plain", PLAIN), ("marked", MARKED), ("bare", None)):
        chat_tokenizer(root / name, template)
    return root


def _samples(folders, path, **keys):
    """Train samples of all records, split none."""
    data = DataConfig(path=str(path), seq_length=SEQ, split="1", **keys)
    vocab = len(loaded(folders / "plain"))
    tokens = prepare_tokens(
        data, vocab_size=vocab, cache=path.parent / "cache", tokenizer_dir=folders / "plain"
    )
    return data, tokens


@pytest.mark.parametrize("number", range(6))
def test_the_answer_is_what_transformers_marks(folders, number):
    """Also where the template has no marks, and prefixes are rendered."""
    record = conversations(6)[number]
    marked = loaded(folders / "marked")
    wanted = marked.apply_chat_template(
        record["messages"], return_dict=True, return_assistant_tokens_mask=True
    )
    assert 0 < sum(wanted["assistant_masks"]) < len(wanted["input_ids"])
    for name in ("plain", "marked"):
        got = encode(record, loaded(folders / name), "here")
        assert got.ids.tolist() == wanted["input_ids"]
        assert got.answer.tolist() == list(map(bool, wanted["assistant_masks"]))


def test_prompt_and_completion(folders):
    """The prompt as the model is asked it, and the end of the text is learnt."""
    tokenizer = loaded(folders / "bare")
    got = encode({"prompt": "d1w2 d1w3", "completion": " d2w7"}, tokenizer, "here")
    prompt = tokenizer.encode("d1w2 d1w3")
    assert got.ids.tolist() == [*tokenizer.encode("d1w2 d1w3 d2w7"), tokenizer.eos_token_id]
    assert got.answer.tolist() == [False] * len(prompt) + [True] * (len(got.ids) - len(prompt))
    assert tokenizer.decode(got.ids[got.answer].tolist()) == " d2w7" + EOS


def test_best_fit():
    lengths = [5, 6, 3, 4, 2, 10, 1]
    rows = best_fit(lengths, 10)
    assert rows == [[0, 3, 6], [1, 2], [4], [5]]
    draw = np.random.default_rng(0).integers(1, 60, 500).tolist()
    rows = best_fit(draw, 100)
    assert sorted(index for row in rows for index in row) == list(range(500))
    assert max(sum(draw[index] for index in row) for row in rows) <= 100
    assert len(rows) <= 1.03 * sum(draw) / 100


def test_every_answer_counts_once(folders, tmp_path):
    """Packed or not, filled or not: the same tokens are learnt, each of them once."""
    records = conversations(40)
    path = write_records(tmp_path / "a.jsonl", records)
    tokenizer = loaded(folders / "plain")
    encoded = [encode(record, tokenizer, "here") for record in records]
    wanted = sorted(token for one in encoded for token in one.ids[one.answer].tolist())
    found = {}
    for name, pack in (("packed", True), ("alone", False)):
        data, tokens = _samples(folders, path, pack=pack)
        found[name] = build_split(data, tokens)
        assert ("documents" in found[name][0]) == pack
    assert len(found["packed"]) < len(found["alone"]) == 40
    for samples in found.values():
        learnt = []
        for index in range(len(samples)):
            sample = samples[index]
            learnt += sample["labels"][sample["loss_mask"].bool()].tolist()
        assert sorted(learnt) == wanted


def test_documents_have_their_own_positions(folders, tmp_path):
    """Each part of a packed sample is what the record is alone, and numbers are in turn."""
    path = write_records(tmp_path / "a.jsonl", conversations(40))
    packed: Any
    packed, alone = (build_split(*_samples(folders, path, pack=pack)) for pack in (True, False))
    of_record = {}
    for index in range(len(alone)):
        sample = alone[index]
        assert torch.equal(sample["position_ids"], torch.arange(SEQ))
        of_record[tuple(sample["tokens"].tolist())] = sample
    seen = 0
    for index in range(len(packed)):
        sample, pad = packed[index], packed.pad
        documents = sample["documents"]
        assert torch.isin(documents.diff(), torch.tensor([0, 1])).all()
        for number in documents.unique():
            here = documents == number
            count = int(here.sum())
            assert torch.equal(sample["position_ids"][here], torch.arange(count))
            if not sample["loss_mask"][here].any():
                assert (sample["tokens"][here] == pad).all()
                continue
            row = torch.full((SEQ,), pad)
            row[:count] = sample["tokens"][here]
            record = of_record[tuple(row.tolist())]
            for key in ("labels", "loss_mask"):
                assert torch.equal(sample[key][here], record[key][:count])
            seen += 1
    assert seen == len(alone)
    filler = packed[None]
    assert not filler["loss_mask"].any()


def test_filled_samples_have_no_padding(folders, tmp_path):
    records = conversations(40)
    path = write_records(tmp_path / "a.jsonl", records)
    data, tokens = _samples(folders, path)
    filled, whole = build_split(data, tokens, filled=True), build_split(data, tokens)
    tokenizer = loaded(folders / "plain")
    encoded = [encode(record, tokenizer, "here") for record in records]
    total = sum(len(one.ids) - 1 for one in encoded)
    assert len(filled) == total // SEQ <= len(whole)
    order = np.random.default_rng(data.seed).permutation(40)
    stream = np.concatenate([encoded[i].ids[:-1] for i in order])
    labels = np.concatenate([encoded[i].ids[1:] for i in order])
    for index in range(len(filled)):
        sample, part = filled[index], slice(index * SEQ, (index + 1) * SEQ)
        assert sample["tokens"].tolist() == stream[part].tolist()
        assert sample["labels"].tolist() == labels[part].tolist()


def test_passes_have_orders_of_their_own(folders, tmp_path):
    path = write_records(tmp_path / "a.jsonl", conversations(40))
    data, tokens = _samples(folders, path)
    count = len(build_split(data, tokens))
    train: Any
    train, validation, _ = build_datasets(data, tokens, (3 * count, 0, 0))
    assert validation is None
    passes = [
        [tuple(train[i]["tokens"].tolist()) for i in range(n * count, (n + 1) * count)]
        for n in range(3)
    ]
    assert len({tuple(one) for one in passes}) == 3
    assert len({tuple(sorted(one)) for one in passes}) == 1


@pytest.mark.parametrize("form", ["parquet", "json", "arrow"])
def test_forms(folders, tmp_path, form):
    """Tables fill the keys that a message lacks with null."""
    datasets = pytest.importorskip("datasets")
    records = conversations(12)
    lines = write_records(tmp_path / "a.jsonl", records)
    path = tmp_path / f"b.{form}"
    if form == "parquet":
        datasets.Dataset.from_list(records).to_parquet(str(path))
    elif form == "arrow":
        path = tmp_path / "saved"
        datasets.Dataset.from_list(records).save_to_disk(str(path))
    else:
        path.write_text(json.dumps(records))
    wanted, got = (build_split(*_samples(folders, one)) for one in (lines, path))
    assert len(wanted) == len(got)
    for index in range(len(got)):
        assert all(torch.equal(got[index][key], wanted[index][key]) for key in got[index])


def test_tables_add_no_names_to_what_a_tool_is_called_with(tmp_path):
    """Arrow gives every structure the names of all; a template must not write them as null."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    calls = "(m.tool_calls | default([], true) | tojson) + (tools | tojson)"
    chat_tokenizer(tmp_path / "tokenizer", PLAIN.replace("m['content']", f"m['content'] + {calls}"))
    records = []
    for arguments in ({"city": "d1w1"}, {"a": 1, "b": 2}):
        call = {"function": {"name": "d2w2", "arguments": arguments}}
        properties = {name: {"type": "string"} for name in arguments}
        tool = {"function": {"name": "d2w2", "parameters": {"properties": properties}}}
        answer = {"role": "assistant", "content": "d3w3", "tool_calls": [call]}
        records.append({"messages": [QUESTION, answer], "tools": [tool]})
    lines = write_records(tmp_path / "a.jsonl", records)
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "b.parquet")
    tokenizer = loaded(tmp_path / "tokenizer")
    texts = []
    for path in (lines, tmp_path / "b.parquet"):
        found = [one for _, one in sft._encoded(find_source(str(path)), tokenizer)]
        texts.append([tokenizer.decode(one.ids.tolist()) for one in found])
    assert texts[0] == texts[1]
    assert "city" in texts[0][0]
    assert "null" not in texts[0][0]


def test_too_long(folders, tmp_path):
    """Kept, cut or dropped as the key says, and refused without it."""
    records = conversations(20)
    long = {"role": "user", "content": " ".join(f"d1w{n}" for n in range(90))}
    records[3]["messages"].insert(0, long)  # the answer lies behind the end
    records[5]["messages"][-1]["content"] = long["content"]
    path = write_records(tmp_path / "a.jsonl", records)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 4: the record has \d+ tokens"):
        _samples(folders, path)
    counts = {}
    for kind in ("keep", "cut", "drop"):
        samples = build_split(*_samples(folders, path, pack=False, record_too_long=kind))
        counts[kind] = len(samples)
        assert all(samples[i]["loss_mask"].any() for i in range(len(samples)))
    assert counts == {"keep": 20, "cut": 19, "drop": 18}


def test_repeats_are_left_out(folders, tmp_path):
    path = write_records(tmp_path / "a.jsonl", conversations(10) * 2)
    assert len(build_split(*_samples(folders, path, pack=False))) == 10


ANSWER = {"role": "assistant", "content": "yes"}
QUESTION = {"role": "user", "content": "is it?"}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no answer": ({"prompt": "a", "completion": " "}, "'completion' is empty"),
    "no completion": ({"prompt": "a"}, "this one has ['prompt']"),
    "a number": ({"prompt": "a", "completion": 3}, "'completion' holds int, not text"),
    "asked last": ({"messages": [QUESTION]}, "the last message is of role 'user'"),
    "no messages": ({"messages": []}, "must be a list of messages"),
    "empty answer": ({"messages": [QUESTION, {**ANSWER, "content": ""}]}, "message 2: the answer"),
    "role": ({"messages": [{**QUESTION, "role": "human"}, ANSWER]}, "role 'human' is unknown"),
    "content": ({"messages": [{**QUESTION, "content": [1]}, ANSWER]}, "'content' holds list"),
    "half": ({"messages": [{**QUESTION, "content": "\ud800"}, ANSWER]}, "half of a surrogate"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_records_are_named_by_file_and_line(folders, tmp_path, case):
    record, message = BAD[case]
    path = write_records(tmp_path / "a.jsonl", [*conversations(8), record])
    data = DataConfig(path=str(path), seq_length=SEQ, split="1")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 9") as error:
        check_data(data, splits=("train",), tokenizer_dir=folders / "plain")
    assert message in str(error.value)


def test_the_date_is_not_that_of_today(tmp_path):
    """The same records give the same tokens tomorrow."""
    asks = """{{ strftime_now('%d %b %Y') }}{{ strftime_now( "%Y-%m-%d" ) }}"""
    chat_tokenizer(tmp_path, asks + PLAIN)
    tokenizer = loaded(tmp_path)
    text = tokenizer.decode(
        encode({"messages": [QUESTION, ANSWER]}, tokenizer, "here").ids.tolist()
    )
    assert text.replace(" ", "").startswith("26Jul20242024-07-26")


def test_prompts_have_the_same_date_and_name_the_line_that_a_template_refuses(tmp_path):
    """A run of ``generate`` that goes on tomorrow must ask what it asked today."""
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    chat_tokenizer(tmp_path, refuses + "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}")
    system = [{"role": "system", "content": "s"}, QUESTION]
    path = write_records(tmp_path / "p.jsonl", [{"prompt": "d1w1"}, {"prompt": system}])
    cfg = GenerateConfig(checkpoint="c", prompts=str(path), output_dir="o", chat_template=True)
    says = r"p\.jsonl, line 2: the chat template refuses the messages \(no system\)"
    with pytest.raises(ValueError, match=says):
        read_prompts(cfg, loaded(tmp_path), context=4096)
    write_records(path, [{"prompt": "d1w1"}])
    (prompt,) = read_prompts(cfg, loaded(tmp_path), context=4096)
    assert prompt.text == "26 Jul 2024 d1w1"


def test_what_a_tool_gave_may_be_written_as_json(tmp_path):
    """As Llama 3 writes it."""
    escaped = "(m['content'] | tojson if m['role'] == 'tool' else m['content'])"
    chat_tokenizer(tmp_path, PLAIN.replace("m['content']", escaped))
    tool = {"role": "tool", "content": '{"temp": 20,\n "at": "é"}'}
    record = {"messages": [QUESTION, {**ANSWER, "content": "d1w1"}, tool, ANSWER]}
    assert encode(record, loaded(tmp_path), "here").answer.any()


def test_what_the_template_does_not_write_is_refused(folders, tmp_path):
    only = (
        "{% for m in messages if m['role'] != 'tool' %}{{ m['content'] + eos_token }}{% endfor %}"
    )
    refuses = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    turns = "{{ messages | length }}"
    record: dict[str, Any] = {"messages": [{"role": "system", "content": "s"}, QUESTION, ANSWER]}
    tool = {"messages": [QUESTION, {"role": "tool", "content": "seen"}, ANSWER]}
    cases = (
        (only, tool, "leaves out the message of role 'tool'"),
        (refuses + PLAIN, record, "refuses the messages (no system)"),
        (turns + PLAIN, {"messages": [QUESTION, ANSWER, QUESTION, ANSWER]}, "otherwise at the end"),
    )
    for number, (template, one, message) in enumerate(cases):
        chat_tokenizer(tmp_path / str(number), template)
        with pytest.raises(ValueError, match="here") as error:
            encode(check_record(one, "here"), loaded(tmp_path / str(number)), "here")
        assert message in str(error.value)
    with pytest.raises(ValueError, match="no chat template"):
        encode(record, loaded(folders / "bare"), "here")


def test_keys_and_data_that_do_not_go_together(folders, tmp_path):
    sft = write_records(tmp_path / "a.jsonl", conversations(8))
    text = write_records(tmp_path / "b.jsonl", [{"text": f"d{n}w1 " * 30} for n in range(8)])
    record = {"text": "t" * 99, **conversations(1)[0]}
    both = write_records(tmp_path / "c.jsonl", [record])
    data = DataConfig(path=str(sft), seq_length=SEQ, split="1")
    for changed, message in (
        (replace(data, path=str(text), pack=False), "are for SFT records"),
        (replace(data, path=str(text), records="sft"), "this one has ['text']"),
        (replace(data, records="text"), "no key 'text'"),
        (
            replace(data, path="", blend=[1, str(text)], num_samples=1, pack=False),
            "are for SFT records, and no source of data.blend holds any",
        ),
    ):
        with pytest.raises(ValueError, match="data") as error:
            check_data(changed, tokenizer_dir=folders / "plain")
        assert message in str(error.value)
    check_data(replace(data, path=str(both), seq_length=16), tokenizer_dir=folders / "plain")
    with pytest.raises(ValueError, match="hybrid models"):
        check_packing(data, LLAMA, NEMOTRON_H)
    check_packing(replace(data, pack=False), NEMOTRON_H)
    with pytest.raises(ValueError, match="scores would count"):
        check_packing(replace(data, pack=False), LLAMA, padded=False)


@pytest.mark.parametrize("pack", [True, False])
def test_records_blended_with_text(folders, tmp_path, pack):
    """Each source gives the samples that it gives alone, and all of them have the same keys."""
    sft = write_records(tmp_path / "a.jsonl", conversations(8))
    text = write_records(tmp_path / "b.jsonl", [{"text": f"d{n}w1 " * 60} for n in range(8)])
    data, alone = _samples(folders, sft, pack=pack)
    data = replace(data, path="", blend=[0.5, str(sft), 0.5, str(text)], split="80,20,0")
    (tmp_path / "run").mkdir()
    shutil.copytree(folders / "plain", tmp_path / "checkpoint" / "tokenizer")
    check_data(data, splits=("train", "validation"), tokenizer_dir=folders / "plain")
    vocab, size = len(loaded(folders / "plain")), 5 * data.global_batch_size
    train, held_out = training_datasets(
        data,
        TrainerConfig(max_steps=5, limit_val_batches=1),
        replace(LLAMA, vocab_size=vocab),
        tmp_path / "checkpoint",
        str(tmp_path / "run" / "out"),
        ("train", "validation"),
    )
    assert isinstance(train, BlendedSamples)
    assert (train.shared, len(train)) == (pack, size)
    assert held_out
    records, texts = train.parts
    first = replace(data, path=str(sft), blend=None)
    want = build_datasets(first, alone, (size, 0, 0))[0]
    assert want is not None
    for index in range(size):
        sample, place = train[index], int(train.order.sample[index])
        assert sample.keys() == train[0].keys()
        assert ("documents" in sample) == pack
        source = want if train.order.source[index] == 0 else texts
        assert all(torch.equal(sample[key], value) for key, value in source[place].items())
        if source is texts:
            assert sample["loss_mask"].all()
    assert not records[0]["loss_mask"].all()


def test_records_whose_weight_grows_go_on_with_the_next(folders, tmp_path):
    """Each source goes on with its next sample, however few its first weight asked for."""
    sft = write_records(tmp_path / "a.jsonl", conversations(40))
    text = write_records(tmp_path / "b.jsonl", [{"text": f"d{n}w1 " * 90} for n in range(20)])
    shutil.copytree(folders / "plain", tmp_path / "checkpoint" / "tokenizer")
    data = DataConfig(
        path="",
        blend=[0.05, str(sft), 0.95, str(text)],
        blend_changes=[{"step": 1, "weights": [1, 0]}],
        seq_length=SEQ,
        split="1",
        pack=False,
    )
    train, _ = training_datasets(
        data,
        TrainerConfig(max_steps=5, limit_val_batches=0),
        replace(LLAMA, vocab_size=len(loaded(folders / "plain"))),
        tmp_path / "checkpoint",
        str(tmp_path / "out"),
        ("train",),
    )
    assert isinstance(train, BlendedSamples)
    read = [i for i in range(len(train)) if train.order.source[i] == 0]
    assert 32 < len(read) <= 40
    assert len({tuple(train[i]["tokens"].tolist()) for i in read}) == len(read)


def test_a_source_of_records_beside_models_that_cannot_pack(folders, tmp_path):
    """The source is named, and the way out is that of records alone."""
    sft = write_records(tmp_path / "a.jsonl", conversations(8))
    data = DataConfig(path="", blend=[1, str(sft)], seq_length=SEQ, split="1")
    with pytest.raises(ValueError, match="hybrid models"):
        check_packing(data, NEMOTRON_H)
    check_packing(replace(data, pack=False), NEMOTRON_H)
    with pytest.raises(ValueError, match=r"of data.blend.0.path=.* scores would count"):
        check_packing(replace(data, pack=False), LLAMA, padded=False)
