"""Whatever decides the ids of a tokenizer folder: data and prompts get those of AutoTokenizer."""

import json
import re

import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import AutoTokenizer

from nemo_minitron.checkpoint.tokenizer import save_tokenizer
from nemo_minitron.checkpoint.tokenizer_read import (
    AS_READ,
    keep_as_read,
    load_tokenizer,
    stop_ids,
)
from nemo_minitron.data.indexed import TextTokenizer

TEXTS = [
    "hi",
    " Hello  world\n\n\tagain ",
    "x<|call|>y <s>z</s> <|new|>",
    "caf\u00e9 cafe\u0301 \u65e5\u672c\u8a9e \U0001f389 12345 don't",
    "I saw the ca<|call|>t",
]
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def _write(path, value):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False))


def _byte_tokenizer():
    vocab = {char: n for n, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**vocab, "<s>": 256, "</s>": 257}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _plain(folder, **settings):
    """tokenizer.json of bytes, and a tokenizer_config.json."""
    folder.mkdir()
    _byte_tokenizer().save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    _write(folder / "config.json", LLAMA)
    named = {"tokenizer_class": "PreTrainedTokenizerFast", **special, **settings}
    _write(folder / "tokenizer_config.json", named)


def _prefix_space(folder):
    _plain(folder, tokenizer_class="GPT2Tokenizer", add_prefix_space=True)


def _added_in_config(folder):
    token = {"content": "<|call|>", "special": True, "lstrip": True, "rstrip": False}
    added = {"258": {**token, "normalized": False, "single_word": False}}
    _plain(folder, added_tokens_decoder=added)


def _added_tokens_file(folder):
    _plain(folder)
    _write(folder / "added_tokens.json", {"<|call|>": 258, "<|new|>": 259})


def _special_tokens_map(folder):
    _plain(folder)
    _write(folder / "special_tokens_map.json", {"additional_special_tokens": ["<|call|>"]})


def _split_special(folder):
    _plain(folder, split_special_tokens=True)


def _added_bos(folder):
    _plain(folder, tokenizer_class="LlamaTokenizer", add_bos_token=True, add_eos_token=True)


def _rebuilt_by_class(folder):
    """Qwen2Tokenizer brings its own normalizer and cutting rule."""
    _plain(folder, tokenizer_class="Qwen2Tokenizer")
    _write(folder / "config.json", {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"})


def _class_in_config_json(folder):
    _plain(folder)
    _write(folder / "tokenizer_config.json", {"eos_token": "</s>", "add_prefix_space": True})
    _write(folder / "config.json", {**LLAMA, "tokenizer_class": "GPT2Tokenizer"})


def _llama_2(folder):
    """Metaspace and byte fallback, as converted from SentencePiece."""
    _plain(folder, tokenizer_class="LlamaTokenizer", legacy=False)
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{n:02X}>": 3 + n for n in range(256)}}
    for piece in ("\u2581", "h", "i", "hi", "\u2581h", "\u2581hi", *"abcdefgelowrd"):
        vocab.setdefault(piece, len(vocab))
    merges = [("h", "i"), ("\u2581", "h"), ("\u2581", "hi")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def _vocab_and_merges(folder):
    _plain(folder, tokenizer_class="GPT2Tokenizer")
    values = json.loads((folder / "tokenizer.json").read_text())
    _write(folder / "vocab.json", values["model"]["vocab"])
    (folder / "merges.txt").write_text("#version: 0.2\nh i\n"[:14])
    (folder / "tokenizer.json").unlink()


def _sentencepiece(folder):
    import io

    import sentencepiece

    _plain(folder, tokenizer_class="LlamaTokenizer")
    (folder / "tokenizer.json").unlink()
    model = io.BytesIO()
    words = (f"hi world again cafe number {n} hello" for n in range(200))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=words,
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def _versioned(folder):
    """Another file than tokenizer.json holds the tokenizer for this version of transformers."""
    _plain(folder, fast_tokenizer_files=["tokenizer.json", "tokenizer.4.0.0.json"])
    tokenizer = _byte_tokenizer()
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save(str(folder / "tokenizer.4.0.0.json"))


CASES = [
    _plain,
    _prefix_space,
    _added_in_config,
    _added_tokens_file,
    _special_tokens_map,
    _split_special,
    _added_bos,
    _rebuilt_by_class,
    _class_in_config_json,
    _llama_2,
    _vocab_and_merges,
    _sentencepiece,
    _versioned,
]


def _imported(source, folder):
    """``checkpoint/tokenizer`` as import makes it."""
    folder.mkdir(parents=True)
    save_tokenizer(source, folder)
    keep_as_read(folder, json.loads((source / "config.json").read_text()))
    return folder


@pytest.mark.parametrize("make", CASES)
def test_ids_are_those_of_auto_tokenizer_on_source_and_export(tmp_path, make):
    source = tmp_path / "source"
    make(source)
    ours = _imported(source, tmp_path / "checkpoint" / "tokenizer")
    assert (ours / AS_READ / "tokenizer.json").is_file()
    export = tmp_path / "export"
    export.mkdir()
    for name in save_tokenizer(ours, export):
        assert (export / name).read_bytes() == (source / name).read_bytes()
    (export / "config.json").write_bytes((source / "config.json").read_bytes())
    wanted, served = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(export)
    prompts, data = load_tokenizer(ours), TextTokenizer(ours)
    for text in TEXTS:
        assert prompts(text)["input_ids"] == wanted(text)["input_ids"] == served(text)["input_ids"]
        plain = wanted(text, add_special_tokens=False)["input_ids"]
        assert data.encode([text])[0].tolist() == [*plain, wanted.eos_token_id]
        assert prompts.decode(plain) == wanted.decode(plain)
    assert prompts.all_special_ids == wanted.all_special_ids


def test_add_prefix_space(tmp_path):
    _prefix_space(tmp_path / "source")
    ours = _imported(tmp_path / "source", tmp_path / "ours")
    assert TextTokenizer(ours).encode(["hi"])[0].tolist() == [220, 71, 72, 257]


def test_a_result_of_an_earlier_version_is_read_as_its_export_is(tmp_path):
    """It has the files and no ``as_read/``; ids that were right stay, the others become right."""
    _plain(tmp_path / "right")
    assert TextTokenizer(tmp_path / "right").encode(["hi"])[0].tolist() == [71, 72, 257]
    _prefix_space(tmp_path / "wrong")
    assert TextTokenizer(tmp_path / "wrong").encode(["hi"])[0].tolist() == [220, 71, 72, 257]
    kept = _imported(tmp_path / "wrong", tmp_path / "kept")
    digests = [TextTokenizer(tmp_path / name).digest for name in ("right", "wrong", "kept")]
    assert digests[0] != digests[1] == digests[2]
    assert load_tokenizer(kept)("hi")["input_ids"] == [220, 71, 72]


def _code(folder):
    _plain(folder, tokenizer_class="OursTokenizer", auto_map={"AutoTokenizer": ["ours.Ours", None]})
    (folder / "ours.py").write_text("raise SystemExit('a stranger's code ran')")


def _tiktoken(folder):
    _plain(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "qwen.tiktoken").write_text("IQ== 0\n")


def _outside(folder):
    _plain(folder, fast_tokenizer_files=["../tokenizer.4.0.0.json"])
    _byte_tokenizer().save(str(folder.parent / "tokenizer.4.0.0.json"))


def _nothing(folder):
    _plain(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_code, r"tokenizer.json, tokenizer_config.json of .* without code of the model"),
        (_tiktoken, r"the tokenizer files qwen.tiktoken, tokenizer_config.json of"),
        (_outside, r"fast_tokenizer_files names '../tokenizer.4.0.0.json', which is no file"),
        (_nothing, r"holds no tokenizer.json and no other tokenizer"),
    ],
)
def test_what_cannot_be_read_is_named_at_import_and_later(tmp_path, caplog, make, says):
    make(tmp_path / "source")
    ours = _imported(tmp_path / "source", tmp_path / "ours")
    assert re.search(rf"{says}.*Stages that read or write text will refuse", caplog.text, re.DOTALL)
    for read in (load_tokenizer, TextTokenizer):
        with pytest.raises(ValueError, match=says):
            read(ours)
    assert not (ours / AS_READ).exists()
    assert not (ours / "ours.py").exists()


def test_a_stale_auto_map_is_passed_over(tmp_path):
    stale = {"AutoTokenizer": [None, "old.OldTokenizerFast"]}
    _plain(tmp_path / "source", tokenizer_class="GPT2Tokenizer", auto_map=stale)
    ours = _imported(tmp_path / "source", tmp_path / "ours")
    assert load_tokenizer(ours)("hi")["input_ids"] == [71, 72]


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json", "folder"])
def test_chat_templates_wherever_they_are(tmp_path, where):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    source = tmp_path / "source"
    _plain(source, **({"chat_template": template} if where.endswith("json") else {}))
    if where == "folder":
        (source / "additional_chat_templates").mkdir()
        (source / "additional_chat_templates" / "other.jinja").write_text("other")
    if where != "tokenizer_config.json":
        (source / "chat_template.jinja").write_text(template)
    ours = _imported(source, tmp_path / "ours")
    wanted, found = AutoTokenizer.from_pretrained(source), load_tokenizer(ours)
    chat = [{"role": "user", "content": "hi"}]
    assert found.chat_template == wanted.chat_template
    assert found.apply_chat_template(chat, tokenize=False) == "<user>hi"
    export = tmp_path / "export"
    export.mkdir()
    assert [name for name in save_tokenizer(ours, export) if "template" in name] == [
        path.relative_to(source).as_posix() for path in sorted(source.rglob("*.jinja"))
    ]


@pytest.mark.parametrize(
    ("generation", "in_config", "wanted"),
    [
        (None, None, {257}),
        (None, 5, {5, 257}),
        (None, [257, 9], {9, 257}),
        ({"eos_token_id": [3, 4]}, [9], {3, 4, 257}),
        ({"eos_token_id": 3}, None, {3, 257}),
        ({}, [9], {257}),
    ],
)
def test_stop_tokens_are_those_of_transformers(tmp_path, generation, in_config, wanted):
    _plain(tmp_path / "source")
    if generation is not None:
        _write(tmp_path / "source" / "generation_config.json", generation)
    tokenizer = load_tokenizer(tmp_path / "source")
    assert stop_ids(tmp_path / "source", tokenizer, in_config) == wanted


def test_a_stop_token_that_is_none(tmp_path):
    _plain(tmp_path / "source")
    tokenizer = load_tokenizer(tmp_path / "source")
    with pytest.raises(ValueError, match=r"eos_token_id=\['x'\] of config.json must be a token id"):
        stop_ids(tmp_path / "source", tokenizer, ["x"])  # type: ignore[list-item]  # as a file may say
