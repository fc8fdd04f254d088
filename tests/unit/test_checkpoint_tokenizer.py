import json

import pytest
from gguf import GGUFWriter
from transformers import AutoTokenizer

from nemo_minitron.checkpoint.source import open_source
from nemo_minitron.checkpoint.tokenizer import (
    check_same_tokens,
    save_tokenizer,
    special_ids,
    tokenizer_files,
    vocabulary_size,
)
from nemo_minitron.checkpoint.tokenizer_read import load_tokenizer
from tests.helpers.gguf_fixtures import SPECIAL, TEXT, llama, tokenizer, write_gguf

TRICKY = [
    TEXT,
    "  spaces  ",
    "<|start|>hi<|end|> 007\r\n\ttab",
    "a\u0301e\u0301 \u65e5\u672c \U0001f389",
    "12 345",
    "",
]


@pytest.fixture
def built(tmp_path):
    write_gguf(tmp_path / "model.gguf", llama())
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    assert save_tokenizer(tmp_path / "model.gguf", folder) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    return folder


@pytest.mark.parametrize("load", [load_tokenizer, AutoTokenizer.from_pretrained])
def test_gguf_tokenizer_is_rebuilt_exactly(built, load):
    source, rebuilt = tokenizer(), load(built)
    for text in TRICKY:
        ids = rebuilt(text)["input_ids"]
        assert ids == source.encode(text).ids
        assert rebuilt.decode(ids) == text
    assert rebuilt("12")["input_ids"] == [source.token_to_id("1"), source.token_to_id("2")]
    assert (rebuilt.eos_token_id, rebuilt.bos_token_id, rebuilt.pad_token_id) == (0, 1, 2)
    assert set(rebuilt("hi")) == {"input_ids", "attention_mask"}


def test_special_tokens_and_chat_template(built):
    rebuilt = load_tokenizer(built)
    assert rebuilt("<|start|>")["input_ids"] == [1]
    assert set(SPECIAL) <= set(rebuilt.all_special_tokens)
    assert rebuilt.decode(rebuilt("a<|end|>")["input_ids"], skip_special_tokens=True) == "a"
    chat = [{"role": "user", "content": "hi"}]
    assert rebuilt.apply_chat_template(chat, tokenize=False) == "<|start|>hi"


def test_bos_is_added_only_when_the_file_says_so(built, tmp_path):
    assert load_tokenizer(built)("hi")["input_ids"][0] != 1
    write_gguf(tmp_path / "with_bos.gguf", llama(), add_bos=True)
    save_tokenizer(tmp_path / "with_bos.gguf", tmp_path)
    with_bos = load_tokenizer(tmp_path)
    assert with_bos("hi")["input_ids"] == [1, *load_tokenizer(built)("hi")["input_ids"]]
    assert with_bos("hi", add_special_tokens=False)["input_ids"][0] != 1


@pytest.mark.parametrize(
    ("pre", "says", "begins"),
    [("llama-bpe", None, True), ("llama-bpe", False, False), ("smollm", None, False)],
)
def test_llama_3_begins_texts_unless_the_file_says_otherwise(tmp_path, pre, says, begins):
    """As llama.cpp reads a file without ``add_bos_token``."""
    write_gguf(tmp_path / "model.gguf", llama(), add_bos=says, pre=pre)
    save_tokenizer(tmp_path / "model.gguf", tmp_path)
    assert (load_tokenizer(tmp_path)("hi")["input_ids"][0] == 1) == begins


@pytest.mark.parametrize(
    ("model", "pre", "message"),
    [
        ("llama", "default", "tokenizer.ggml.model=llama is not supported; supported: gpt2"),
        ("gpt2", "qwen2", "tokenizer.ggml.pre=qwen2 is not supported; supported: .*smollm"),
    ],
)
def test_other_kinds_are_refused(tmp_path, model, pre, message):
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match=message):
        save_tokenizer(tmp_path / "model.gguf", tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("token_type", [1, 1], "is shorter"),
        ("merges", ["a"], "Merges"),
        ("tokens", ["a"] * 288, "out of vocabulary"),
        ("pre", [1], r"tokenizer.ggml.pre=\[1\] is not supported"),
    ],
)
def test_damaged_ones_are_refused_before_a_weight_is_written(tmp_path, field, value, message):
    write_gguf(tmp_path / "m.gguf", llama(), changed={f"tokenizer.ggml.{field}": value})
    with pytest.raises(
        ValueError, match=f"(?s)source: .*m.gguf: .*{message}.*; set tokenizer to a"
    ):
        open_source(str(tmp_path / "m.gguf"))
    with pytest.raises(ValueError, match=message):
        save_tokenizer(tmp_path / "m.gguf", tmp_path)


def test_folder_is_copied_as_it_is(built, tmp_path):
    (built / "special_tokens_map.json").write_text("{}")
    (built / "config.json").write_text("{}")
    target = tmp_path / "target"
    target.mkdir()
    names = save_tokenizer(built, target)
    assert set(names) == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    for name in names:
        assert (target / name).read_bytes() == (built / name).read_bytes()


def test_a_class_name_does_not_change_the_tokenizer(built):
    """AutoTokenizer would rebuild after the class; tokenizer.json is the truth."""
    config = json.loads((built / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "LlamaTokenizerFast"
    (built / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(built)(TEXT)["input_ids"] == tokenizer().encode(TEXT).ids


def test_no_tokenizer(tmp_path):
    assert save_tokenizer(tmp_path, tmp_path) == []
    with pytest.raises(ValueError, match=r"holds no tokenizer.json.*import again"):
        load_tokenizer(tmp_path)


def folder_of(tmp_path, **files):
    """A tokenizer's folder; ``__`` in names stands for a dot."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name.replace("__", ".")).write_text(text)
    return tokenizer_files(tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens__json": {"<pad>": 7}},
        {"tokenizer_config__json": {"added_tokens_decoder": {"7": {"content": "<pad>"}}}},
        {"added_tokens__json": {"<pad>": 7}, "tokenizer_config__json": {}},
    ],
)
@pytest.mark.parametrize(
    "core",
    [
        {"vocab__json": {"a": 0, "b": 1}, "merges__txt": ""},
        {"tokenizer__json": {"model": {"vocab": {"a": 0, "b": 1}}}},
        {"tokenizer__json": {"model": {"vocab": [["a", 0.0], ["b", -1.0]]}}},
    ],
)
def test_added_tokens_count(tmp_path, core, files):
    """A row of the embedding that only an added token has is no padding."""
    assert vocabulary_size(folder_of(tmp_path, **core)) == 2
    assert vocabulary_size(folder_of(tmp_path, **files)) == 8


@pytest.mark.parametrize(
    "content",
    ["{", [1], {}, {"model": {"vocab": {"a": "x"}}}, {"model": {}, "added_tokens": [3]}],
)
def test_files_that_are_no_tokenizer(tmp_path, content):
    files = folder_of(tmp_path, tokenizer__json=content, tokenizer_config__json={})
    for read in (vocabulary_size, special_ids):
        with pytest.raises(ValueError, match=r"tokenizer\.json is damaged, or not a tokenizer"):
            read(files)
    other = tmp_path / "other"
    other.mkdir()
    folder_of(other, tokenizer__json={"model": {"vocab": {"a": 0}}})
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged, or not a tokenizer"):
        check_same_tokens(other, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("vocab.json", "[1, 2]", r"vocab\.json is damaged"),
        ("vocab.json", '{"a": []}', r"vocab\.json is damaged"),
        ("tokenizer.model", "no model", r"tokenizer\.model is damaged"),
    ],
)
def test_damaged_vocabularies(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=says):
        vocabulary_size(tokenizer_files(tmp_path))


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("tekken.json", "tekken.json"),
        ("vocab.txt", "vocab.txt"),
        ("qwen.tiktoken", "qwen.tiktoken"),
        ("my.json", "tokenizer.json"),
        ("my.model", "tokenizer.model"),
    ],
)
def test_one_file_keeps_its_kind(tmp_path, name, kept):
    (tmp_path / name).write_text("")
    assert list(tokenizer_files(tmp_path / name)) == [kept]


def test_special_tokens_of_other_types(tmp_path):
    config = {"bos_token": ["a"], "eos_token": {"content": "a"}}
    core = {"model": {"vocab": {"a": 0}}}
    files = folder_of(tmp_path, tokenizer__json=core, tokenizer_config__json=config)
    assert special_ids(files) == {"eos_token_id": 0}
