"""Which generated texts are kept."""

from collections import Counter
from typing import Any

import pytest

from nemo_minitron.config.inference import FilterConfig
from nemo_minitron.data.filters import Generated, kept_texts, repetition

WORDS = [f"word{n}" for n in range(200)]


def sample(index: int, completion: str, *, ended: bool = True, prompt: str = "p") -> Generated:
    return Generated(index, prompt, completion, len(completion.split()), ended)


def kept(samples: list[Generated], **keys: Any) -> tuple[list[int], dict[str, int]]:
    dropped: Counter[str] = Counter()
    cfg = FilterConfig(**{"min_tokens": 0, **keys})
    found = kept_texts(samples, lambda s: s.prompt + s.completion, cfg, dropped)
    return [s.index for s in found], dict(dropped)


def test_repetition_is_the_share_of_ngrams_seen_before():
    assert repetition("a b c d", 2) == 0
    assert repetition("a b a b a b", 2) == pytest.approx(3 / 5)
    assert repetition("a", 4) == 0


@pytest.mark.parametrize(
    ("keys", "want"),
    [
        ({"min_tokens": 3}, {"min_tokens": 2}),  # the empty one too
        ({"ended": True}, {"min_tokens": 1, "ended": 1}),
        ({"max_repetition": 0.5, "ngram": 1}, {"min_tokens": 1, "max_repetition": 1}),
    ],
)
def test_filters(keys, want):
    samples = [
        sample(0, " ".join(WORDS[:9])),
        sample(1, "short one"),
        sample(2, "again again again again"),
        sample(3, "this one was cut", ended=False),
        sample(4, " "),
    ]
    indices, dropped = kept(samples, **keys)
    assert dropped == want
    assert len(indices) == len(samples) - sum(want.values())
    assert 0 in indices


def test_duplicates_whatever_their_white_space():
    samples = [sample(0, "one two three"), sample(1, "one  two\nthree "), sample(2, "one two four")]
    assert kept(samples, near_duplicates=1) == ([0, 2], {"duplicates": 1})
    other = [samples[0], sample(1, "one two three", prompt="q")]
    assert kept(other, near_duplicates=1)[0] == [0, 1]


def test_near_duplicates_by_the_ngrams_they_share():
    base = WORDS[:100]
    close = [*base[:50], "else", *base[51:]]
    far = [*base[:50], *WORDS[100:150]]
    samples = [sample(n, " ".join(words)) for n, words in enumerate((base, close, far))]
    # Of 97 4-grams each, one changed word changes four: 93 / 101 = 0.92.
    assert kept(samples, near_duplicates=0.9) == ([0, 2], {"near_duplicates": 1})
    assert kept(samples, near_duplicates=0.95)[0] == [0, 1, 2]
    assert kept(samples, near_duplicates=0.9, ngram=30)[0] == [0, 1, 2]
    # Of 997 4-grams each, a word more at the end adds one: 997 / 998.
    assert kept(samples, near_duplicates=0.99)[0] == [0, 1, 2]
    text = " ".join(f"w{n}" for n in range(1000))
    nearly = [sample(0, text), sample(1, f"{text} more")]
    assert kept(nearly, near_duplicates=0.99) == ([0], {"near_duplicates": 1})
