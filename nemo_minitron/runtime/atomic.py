"""Files that appear under their name complete and on disk, or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DRAFT = ".draft"
"""Suffix of a file that is being written."""


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a draft beside ``path``, which takes that name once the body has written it.

    A body that fails leaves no draft; a process that is killed may leave one.
    """
    draft = path.with_name(path.name + DRAFT)
    try:
        yield draft
        with open(draft, "rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
