"""Tokenise each weighted source up to its share of a budget, into one pair of files each.

Files are tokenised beside each other, a process each, until those that come first in a source hold
its share. What is taken depends on sources, shares and seed alone: files come in an order that the
seed draws, the first of equal documents stays, and the document that fills the share is the last.
"""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nemo_minitron.config.blend import naming
from nemo_minitron.config.training import DataConfig
from nemo_minitron.data.indexed import token_dtype
from nemo_minitron.data.parts import Documents, Part, begin, read_part, write_part
from nemo_minitron.data.shuffle import copy_documents, document_order
from nemo_minitron.data.text import find_source, no_documents
from nemo_minitron.runtime.console import progress

_THOUSAND = 1000


class Taken(NamedTuple):
    """Counts of what a ``.bin``/``.idx`` pair holds of its source."""

    documents: int
    tokens: int
    repeats: int
    """Documents that were left out because one before them is equal."""
    files: int
    """Files that were read for it, of ``of_files``."""
    of_files: int


@dataclass
class Source:
    """A source on the way to its share; documents are counted over the parts in their order."""

    share: int
    parts: list[Part]
    started: int = 0
    ended: set[int] = field(default_factory=set)
    documents: list[Documents] = field(default_factory=list)
    """Documents of the parts before the first part that is not read to its end."""
    read: int = 0
    """Tokens of ``documents``."""
    repeated: int = 0
    """Tokens of ``documents`` that are known to repeat a document before them."""
    tokens: int = 0
    """Tokens without those known to be repeats; once the share is there, those of ``kept``."""
    kept: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def complete(self) -> bool:
        """Whether the share is complete, or the source has no more."""
        return self.tokens >= self.share or len(self.documents) == len(self.parts)

    def end(self, number: int) -> None:
        """Count a part that is there, and take documents if there may be enough, or all there are.

        Repeats are looked for in all documents, and again only when those read since could fill
        what they left open.
        """
        self.ended.add(number)
        if (
            self.tokens >= self.share
        ):  # of a process that had begun when the share was not there yet
            return
        while len(self.documents) in self.ended:
            self.documents.append(read_part(self.parts[len(self.documents)]))
            self.read += int(self.documents[-1].lengths.sum())
        self.tokens = self.read - self.repeated
        if self.complete:
            self._take()

    def _take(self) -> None:
        """The first of equal documents each, up to the share."""
        lengths, digests = map(np.concatenate, zip(*self.documents, strict=True))
        first = np.sort(np.unique(digests, return_index=True)[1])
        totals = np.cumsum(lengths[first])
        self.kept = first[: np.searchsorted(totals, self.share) + 1]
        self.tokens = int(totals[len(self.kept) - 1]) if len(first) else 0
        self.repeated = self.read - self.tokens


def sources_of(
    data: DataConfig, shares: Sequence[int], tokenizer: Path, vocab_size: int, parts: Path
) -> list[Source]:
    """Return the sources of a blend with nothing read yet.

    Args:
        data: its keys; all sources are texts.
        shares: tokens that are wanted of each.
        tokenizer: folder of the checkpoint's.
        vocab_size: true vocabulary of the model; every id must lie below it.
        parts: gets the tokens of each file.
    """
    found = []
    for index, (one, share) in enumerate(zip(data.sources(), shares, strict=True)):
        files = find_source(one.path).files
        made = [
            Part(one, files[n], parts / f"{index}-{n}", tokenizer, vocab_size)
            for n in document_order(len(files), one.seed).tolist()
        ]
        found.append(Source(share, made))
    return found


def tokenise(sources: Sequence[Source], processes: int) -> None:
    """Read files of the sources until every share is there, or its source is at its end.

    Args:
        sources: those of ``sources_of``; parts that an earlier run wrote are not written again.
        processes: that work beside each other; with fewer files a tokenizer has several threads.

    Raises:
        ValueError: a file cannot be read, or the model has not all ids.
    """
    files = sum(len(source.parts) for source in sources)
    total = sum(source.share for source in sources) // _THOUSAND
    running: dict[Future[None], tuple[int, int]] = {}
    with (
        _pool(min(processes, files), max(processes // files, 1)) as pool,
        progress("Tokenising (thousand tokens)", total) as advance,
    ):
        shown = 0
        while not all(source.complete for source in sources):
            while len(running) < processes and (index := _next(sources)) is not None:
                source = sources[index]
                task = pool.submit(write_part, source.parts[source.started])
                running[task] = index, source.started
                source.started += 1
            for task in wait(running, return_when=FIRST_COMPLETED).done:
                index, number = running.pop(task)
                with naming(index):
                    task.result()
                    sources[index].end(number)
            there = sum(min(source.tokens, source.share) for source in sources) // _THOUSAND
            advance(there - shown)
            shown = there


def _next(sources: Sequence[Source]) -> int | None:
    """Choose the source for the next process: the waiting one with the fewest processes."""
    wanting = {
        number: source.started - len(source.ended)
        for number, source in enumerate(sources)
        if not source.complete and source.started < len(source.parts)
    }
    return min(wanting, key=wanting.__getitem__, default=None)


@contextmanager
def _pool(processes: int, threads: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with the body, at the next batch of what they read."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(processes, context, begin, (stop, threads, os.getpid()))
    try:
        yield pool
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def write_pair(source: Source, target: Path) -> Taken:
    """Copy what is taken of a source to a ``.bin``/``.idx`` pair, in an order that the seed draws.

    Args:
        source: after ``tokenise``.
        target: prefix of the pair.

    Raises:
        ValueError: the source holds no documents.
    """
    one = source.parts[0]
    if not len(source.kept):
        raise no_documents(find_source(one.data.path))
    ends = np.cumsum([len(part.lengths) for part in source.documents])
    last = int(source.kept[-1])
    files = int(np.searchsorted(ends, last, side="right")) + 1
    order = source.kept[document_order(len(source.kept), one.data.seed)]
    lengths = [part.lengths for part in source.documents[:files]]
    ids = [part.ids for part in source.parts[:files]]
    copy_documents(ids, lengths, order, target, token_dtype(one.vocab_size))
    seen = last + 1 if source.tokens >= source.share else int(ends[-1])
    return Taken(len(order), source.tokens, seen - len(order), files, len(source.parts))
