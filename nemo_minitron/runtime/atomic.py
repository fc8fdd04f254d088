"""Files and folders that appear under their name complete and on disk, or not at all."""

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


def flush_folder(folder: Path) -> None:
    """Force the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename_folder(draft: Path, path: Path) -> None:
    """Give a folder that is complete its name, with the names in it and its own on disk.

    Whether a draft is removed, or resumed by the next run, is left to whoever makes it.

    Raises:
        OSError: ``path`` is there already and is not an empty folder.
    """
    flush_folder(draft)
    draft.rename(path)
    flush_folder(path.parent)
