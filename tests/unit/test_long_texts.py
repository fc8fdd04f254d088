"""A document that is cut into pieces has the ids of the whole, whatever the tokenizer does."""

import random

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from nemo_minitron.data import long_texts
from nemo_minitron.data.long_texts import encode_long

WORDS = [
    "hello",
    "world",
    "the",
    "cat",
    "don't",
    "12345",
    "café",
    "日本",
    "<|call",
    "me|>",
    "aaaa",
    "x,",
    "y;",
    "end.",
]


def _text(blanks, seed=0):
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice(blanks) for _ in range(6000))


def _trained(tokenizer, trainer):
    tokenizer.train_from_iterator([_text([" ", "\n"], seed) for seed in range(3)], trainer)
    return tokenizer


def _byte_level(**keys):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**keys)
    return _trained(tokenizer, trainers.BpeTrainer(vocab_size=400, show_progress=False))


def _llama_2():
    """No cutting into words: merges may reach across blanks."""
    tokenizer = Tokenizer(models.BPE())
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False, max_token_length=12)
    return _trained(tokenizer, trainer)


def _unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(vocab_size=200, show_progress=False, unk_token="<unk>")
    return _trained(tokenizer, trainer)


def _added():
    """A token with a blank inside, and one that takes the blanks around it."""
    tokenizer = _byte_level(add_prefix_space=True)
    tokenizer.add_tokens(["<|call me|>", "x, y"])
    return tokenizer


TOKENIZERS = [
    lambda: _byte_level(add_prefix_space=False),
    lambda: _byte_level(add_prefix_space=True, use_regex=False),
    _llama_2,
    _unigram,
    _added,
]


@pytest.mark.parametrize("make", TOKENIZERS)
@pytest.mark.parametrize("blanks", [[" "], [" ", "\n", "  ", "\n\n", "\t"], [""]])
def test_pieces_have_the_ids_of_the_whole(monkeypatch, make, blanks):
    for name, value in {"PIECE": 1000, "_CONTEXT": 64, "_TOGETHER": 5}.items():
        monkeypatch.setattr(long_texts, name, value)
    tokenizer, longest, text = make(), [], _text(blanks)

    def encode(texts):
        longest.append(max(map(len, texts)))
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    found = encode_long(text, encode)
    assert found.tolist() == tokenizer.encode(text, add_special_tokens=False).ids
    if blanks == [" "] and make is not _llama_2:
        assert max(longest) < 10_000  # it was cut


def test_ids_that_disagree_are_those_of_the_whole(monkeypatch):
    """A tokenizer whose ids depend on all of the text before is never cut."""
    monkeypatch.setattr(long_texts, "PIECE", 1000)
    text = _text([" "])

    def encode(texts):
        return [[len(one) - n for n in range(len(one))] for one in texts]

    assert encode_long(text, encode).tolist() == encode([text])[0]
