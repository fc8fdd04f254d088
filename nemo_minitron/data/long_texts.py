"""Long documents are tokenised in pieces, with the ids that the whole would have.

A tokenizer takes about a hundred times the size of a text while it works on it. A document is cut
only between two words where the tokenizer itself shows that nothing reaches across: tokens of the
text before the cut are the same with and without the text after it. Each piece is read with a
little of the text before it, whose ids are taken off again, so that what a tokenizer does at the
beginning of a text happens once. Where no such place is found, or any ids disagree, the document is
one piece.
"""

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

PIECE = 1 << 18
"""Characters of a piece; documents of up to four times as many are not cut."""
_TOGETHER = 16  # pieces that go to the tokenizer at once
_CONTEXT = 256  # characters on both sides of a cut that are looked at
_SEEN = 8  # last tokens before a cut that must be the same wherever the text began
_TRIES = 8  # places that are tried before a cut is given up
_BETWEEN_WORDS = re.compile(r"(?<=\w)[ \n](?=\w)")

Encode = Callable[[Sequence[str]], list[list[int]]]


def encode_long(text: str, encode: Encode) -> np.ndarray:
    """Return ids of a text, int32.

    Args:
        text: of any length.
        encode: ids of several texts, without special tokens.
    """
    if len(text) <= 4 * PIECE:
        return np.array(encode([text])[0], np.int32)
    cuts = list(_cuts(text, encode))
    found = _joined(text, cuts, encode)
    return np.array(encode([text])[0], np.int32) if found is None else found


def _cuts(text: str, encode: Encode) -> Iterator[int]:
    """Places to cut at, ascending, each before a blank between two words."""
    at, end = PIECE, len(text) - 2 * _CONTEXT
    while at < end:
        places = [at + m.start() for m in _BETWEEN_WORDS.finditer(text[at : at + 16 * _CONTEXT])]
        cut = next((place for place in places[:_TRIES] if _is_free(text, place, encode)), None)
        if cut is not None:
            yield cut
        at = (cut or at) + PIECE


def _is_free(text: str, cut: int, encode: Encode) -> bool:
    """Whether the tokens before a place are the same with and without what follows."""
    before = text[cut - _CONTEXT : cut]
    alone, both = encode([before, before + text[cut : cut + _CONTEXT]])
    return both[: len(alone)] == alone


def _joined(text: str, cuts: list[int], encode: Encode) -> np.ndarray | None:
    """Return ids of all pieces, or None if the ids of a piece do not continue those before it."""
    bounds = list(zip([0, *cuts], [*cuts, len(text)], strict=True))
    found: list[np.ndarray] = []
    for first in range(0, len(bounds), _TOGETHER):
        group = bounds[first : first + _TOGETHER]
        before = [text[max(begin - _CONTEXT, 0) : begin] for begin, _ in group]
        known = encode(before)
        read = encode([b + text[i:j] for b, (i, j) in zip(before, group, strict=True)])
        for alone, ids in zip(known, read, strict=True):
            if ids[: len(alone)] != alone:
                return None
            if found and found[-1][-_SEEN:].tolist() != alone[-_SEEN:]:
                return None
            found.append(np.array(ids[len(alone) :], np.int32))
    return np.concatenate(found)
