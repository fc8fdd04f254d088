"""Command lines as people type them, for reports."""

import re
import shlex
from collections.abc import Sequence

from nemo_minitron.config import load


def shell_line(words: Sequence[str]) -> str:
    """A command line for people: as few quotes as Hydra and the shell need."""
    return " ".join(_quote(_bare(word)) for word in words)


def _bare(word: str) -> str:
    """``key='value'`` without the quotes where Hydra reads a plain word as a string anyway."""
    match = re.fullmatch(r"([\w.]+)='([A-Za-z/._][\w./@+-]*)'", word)
    return word if match is None else load.override(match[1], match[2])


def _quote(word: str) -> str:
    if "'" in word and not set(word) & set('"$`\\!'):
        return f'"{word}"'
    return shlex.quote(word)
