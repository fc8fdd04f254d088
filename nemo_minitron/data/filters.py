"""Which generated texts are kept: length, repetition, exact and near duplicates.

Words are what lies between white space; an n-gram is a tuple of n words.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from datasketch import MinHash, MinHashLSH

from nemo_minitron.config.inference import FilterConfig

_PERMUTATIONS = 128
_HIGHEST = 0.95  # threshold of the index


@dataclass(frozen=True)
class Generated:
    """One continuation.

    Attributes:
        index: number of the sample; samples of a prompt are consecutive.
        prompt: what the model read.
        completion: what it wrote.
        tokens: how many tokens it wrote, the end of text included.
        ended: whether it came to an end of text.
    """

    index: int
    prompt: str
    completion: str
    tokens: int
    ended: bool


def kept_texts(
    samples: Iterable[Generated],
    text_of: Callable[[Generated], str],
    cfg: FilterConfig,
    dropped: Counter[str],
) -> Iterator[Generated]:
    """The samples that pass every filter, in their order.

    Args:
        samples: in the order of their index; of duplicates the first one stays.
        text_of: the text that is to be trained on; duplicates are those of it.
        cfg: the filters.
        dropped: counts those left out, by the key that did it.
    """
    duplicates = _Duplicates(cfg)
    for sample in samples:
        reason = _flaw(sample, cfg) or duplicates.found(sample.index, text_of(sample))
        if reason is None:
            yield sample
        else:
            dropped[reason] += 1


def _flaw(sample: Generated, cfg: FilterConfig) -> str | None:
    if not sample.completion.strip() or sample.tokens < cfg.min_tokens:
        return "min_tokens"
    if cfg.ended and not sample.ended:
        return "ended"
    if repetition(sample.completion, cfg.ngram) > cfg.max_repetition:
        return "max_repetition"
    return None


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """Return all n-grams of a text in order; a shorter text is one n-gram."""
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(max(len(words) - n + 1, 1))]


def repetition(text: str, n: int) -> float:
    """Share of the n-grams of a text that occurred in it before."""
    found = ngrams(text, n)
    return 1 - len(set(found)) / len(found)


class _Duplicates:
    """Finds near duplicates of the texts that were kept."""

    def __init__(self, cfg: FilterConfig) -> None:
        self.cfg = cfg
        self._seen: set[bytes] = set()
        self._grams: dict[int, set[tuple[str, ...]]] = {}
        self._index: MinHashLSH | None = None
        if cfg.near_duplicates < 1:
            # It only finds texts to compare, and has no index for a threshold close to 1.
            threshold = min(cfg.near_duplicates, _HIGHEST)
            self._index = MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS)

    def found(self, index: int, text: str) -> str | None:
        """Return why a text is rejected as a duplicate, or None after recording it."""
        digest = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()
        if digest in self._seen:
            return "duplicates"
        if self._index is not None and self._near(index, text):
            return "near_duplicates"
        self._seen.add(digest)
        return None

    def _near(self, index: int, text: str) -> bool:
        """The index finds candidates; n-grams decide, so that chance drops nothing."""
        assert self._index is not None
        grams = set(ngrams(text, self.cfg.ngram))
        sketch = MinHash(num_perm=_PERMUTATIONS)
        sketch.update_batch([" ".join(gram).encode() for gram in sorted(grams)])
        for other in self._index.query(sketch):
            known = self._grams[other]
            if len(grams & known) >= self.cfg.near_duplicates * len(grams | known):
                return True
        self._grams[index] = grams
        self._index.insert(index, sketch)
        return False
