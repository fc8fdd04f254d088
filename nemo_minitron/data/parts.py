"""The tokens of one file of texts, made by a process of its own and kept until all are there.

Imports neither torch nor transformers: every process would hold them.
"""

import os
import shutil
import signal
from array import array
from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import lru_cache
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nemo_minitron.checkpoint.seals import check_seal, seal
from nemo_minitron.config.training import DataConfig
from nemo_minitron.data.indexed import TextTokenizer, read_ahead, write_ids
from nemo_minitron.data.repeats import digest_of
from nemo_minitron.data.text import TEXT, Source, read_documents
from nemo_minitron.runtime.atomic import rename_folder
from nemo_minitron.runtime.supervise import die_with_parent

_IDS, _LENGTHS, _DIGESTS = "ids.bin", "lengths.npy", "digests.npy"
_stop: list[Event] = []


class Part(NamedTuple):
    """A file of a source, and where its tokens go."""

    data: DataConfig
    """Settings of ``data``, with the ``path`` of the whole source."""
    file: Path
    folder: Path
    tokenizer: Path
    vocab_size: int

    @property
    def ids(self) -> Path:
        """The file that holds the documents' tokens one after another."""
        return self.folder / _IDS


class Documents(NamedTuple):
    """Facts about the documents of a part, in reading order."""

    lengths: np.ndarray
    """Tokens of each document, int64."""
    digests: np.ndarray
    """Digests of the texts, uint64."""


class StoppedError(Exception):
    """Raised in a process that was asked to stop."""


def begin(stop: Event, threads: int, parent: int) -> None:
    """Prepare a process that writes parts.

    Args:
        stop: set when no part is wanted any more.
        threads: of the tokenizer.
        parent: process that started this one.
    """
    die_with_parent()
    if os.getppid() != parent:
        os._exit(1)  # it died before, and the next run writes the same parts
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the other process says when to stop
    os.environ.update(
        RAYON_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM=str(threads > 1).lower()
    )
    _stop[:] = [stop]


def write_part(part: Part) -> None:
    """Tokenise a file, unless an earlier run did.

    Raises:
        ValueError: a file cannot be read, or the model has not all ids; see ``read_documents``.
    """
    if part.folder.is_dir():
        return
    draft = part.folder.with_name(f"{part.folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    source = Source(TEXT, Path(part.data.path), (part.file,))
    lengths, digests = array("q"), array("Q")
    texts = _noting(read_documents(source, part.data), digests)
    where = f"the tokenizer gives data.path={part.data.path}"
    tokenizer = _tokenizer(part.tokenizer)
    with (draft / _IDS).open("wb") as file, closing(read_ahead(texts)) as batches:
        for batch in batches:
            if _stop and _stop[0].is_set():
                raise StoppedError
            lengths.extend(write_ids(file, batch, tokenizer, part.vocab_size, where))
    np.save(draft / _LENGTHS, np.array(lengths, np.int64))
    np.save(draft / _DIGESTS, np.array(digests[: len(lengths)], np.uint64))
    seal(part.folder, draft)
    rename_folder(draft, part.folder)


def read_part(part: Part) -> Documents:
    """Read the counts that ``write_part`` stored.

    Raises:
        ValueError: the files are damaged.
    """
    check_seal(part.folder, f"remove {part.folder} and run the same command again")
    return Documents(*(np.load(part.folder / name) for name in (_LENGTHS, _DIGESTS)))


@lru_cache(1)
def _tokenizer(folder: Path) -> TextTokenizer:
    return TextTokenizer(folder)


def _noting(texts: Iterable[str], digests: "array[int]") -> Iterator[str]:
    for text in texts:
        digests.append(digest_of(text))
        yield text
