"""Console output: logs and progress on stderr, tables on stdout, from rank 0 alone."""

import contextlib
import functools
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.runtime.ranks import launched_world_size, rank
from nemo_minitron.runtime.streams import beside_the_work

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

log = logging.getLogger(__name__)

Advance = Callable[..., None]
"""``advance(n=1, loss=...)``: n more are done; the figures are shown beside the bar."""

_SECONDS_BETWEEN_LINES = 15.0


@functools.cache
def console() -> "Console":
    """The one stderr console, shared by logs and bars so that they do not overwrite each other."""
    from rich.console import Console

    return Console(stderr=True)


def log_handler() -> logging.Handler:
    """Log handler of the console: pretty on a terminal, plain lines elsewhere (never wrapped)."""
    if console().is_terminal:
        from rich.logging import RichHandler

        handler: logging.Handler = RichHandler(
            console=console(), show_path=False, log_time_format="%H:%M:%S", markup=False
        )
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    if rank() > 0:
        handler.setLevel(logging.WARNING)
    return handler


@contextlib.contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Append log records to ``path`` too, and the traceback of what ends the body."""
    path.parent.mkdir(parents=True, exist_ok=True)
    who = f" rank {rank()}" if (launched_world_size() or 1) > 1 else ""
    handler = logging.FileHandler(path)
    # On a full disk the error that ends the body says it all; the log must not hide or repeat it.
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # as logging suggests
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s{who} %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    except BaseException:
        trace = sys.exc_info()
        handler.handle(log.makeRecord(log.name, logging.ERROR, "", 0, "failed", (), trace))
        raise
    finally:
        logging.getLogger().removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()


@contextlib.contextmanager
def progress(description: str, total: int, done: int = 0) -> Iterator[Advance]:
    """Show how far a loop is and how long it will take: a bar on a terminal, else log lines.

    Args:
        description: what is being done.
        total: how many there are to do.
        done: how many of them an earlier job did.

    Yields:
        ``advance``; a function that does nothing on ranks other than 0.
    """
    if rank() > 0:
        yield lambda n=1, **figures: None
    elif console().is_terminal:
        yield from _bar(description, total, done)
    else:
        yield from _lines(description, total, done)


def _bar(description: str, total: int, done: int) -> Iterator[Advance]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    with Progress(*columns, TextColumn("{task.fields[figures]}"), console=console()) as bar:
        task = bar.add_task(description, total=total, completed=done, figures="")

        def advance(n: int = 1, **figures: float) -> None:
            bar.update(task, advance=n)
            if figures:
                bar.update(task, figures=_shown(figures))

        yield advance


def _lines(description: str, total: int, done: int) -> Iterator[Advance]:
    began = last = time.monotonic()
    here, latest = 0, ""

    def advance(n: int = 1, **figures: float) -> None:
        nonlocal here, last, latest
        here += n
        latest = _shown(figures) or latest
        now = time.monotonic()
        if done + here == total or now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            left = (total - done - here) * (now - began) / max(here, 1)
            text = [f"{description} {done + here}/{total}", latest, f"left={_duration(left)}"]
            log.info("%s", " ".join(filter(None, text if done + here < total else text[:2])))

    yield advance


def _duration(seconds: float) -> str:
    """Return hours, minutes and seconds, as progress bars write them."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _shown(figures: dict[str, float]) -> str:
    return " ".join(f"{name}={value:.4g}" for name, value in figures.items())


def _cell(words: str) -> "Text":
    """Words as they stand: names of others may hold rich's markup or codes for the terminal."""
    from rich.text import Text

    return Text("".join(letter for letter in words if letter.isprintable() or letter == "\n"))


def show_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout; the first column is text, the others are figures.

    Where it is wider than the terminal it is turned over or printed in parts (``fitted``).
    """
    if rank() > 0:
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = Console()
    if not out.is_terminal:  # a pipe has no width to fit into
        out = Console(width=200)
    for part, (names, cells) in enumerate(fitted(header, rows, out.width)):
        table = Table(title=None if part else Text(title))
        for index, name in enumerate(names):
            table.add_column(_cell(name), justify="right" if index else "left", no_wrap=True)
        for row in cells:
            table.add_row(*map(_cell, row))
        with beside_the_work():
            out.print(table)


def fitted(
    header: Sequence[str], rows: Sequence[Sequence[str]], width: int
) -> list[tuple[Sequence[str], Sequence[Sequence[str]]]]:
    """Return a table as one or more that fit a width.

    A table that is too wide is turned over, a row for each of its columns. If that is too wide as
    well, its columns are spread over several tables, each with the first column again.

    Args:
        header: names of the columns; a name may have several lines.
        rows: cells.
        width: columns of the terminal.

    Returns:
        Header and rows of each table.
    """
    columns = [list(column) for column in zip(header, *rows, strict=True)]
    for names, *cells in ([header, *rows], columns):
        if 1 + sum(map(_column_width, zip(names, *cells, strict=True))) <= width:
            return [(names, cells)]
    first, *others = columns
    parts: list[list[list[str]]] = [[first]]
    for column in others:
        if len(parts[-1]) > 1 and 1 + sum(map(_column_width, [*parts[-1], column])) > width:
            parts.append([first])
        parts[-1].append(column)
    tables = [[list(row) for row in zip(*part, strict=True)] for part in parts]
    return [(names, cells) for names, *cells in tables]


def _column_width(cells: Sequence[str]) -> int:
    """Return characters that a column takes with its padding and the line beside it."""
    from rich.cells import cell_len

    return 3 + max(cell_len(line) for cell in cells for line in cell.split("\n"))


def show_texts(written: Sequence[tuple[str, Mapping[str, str]]]) -> None:
    """Print what models wrote on stdout, wrapped at the width of the terminal.

    Args:
        written: name of a model, and the ``prompt`` that it was given with its ``completion``.
    """
    if rank() > 0 or not written:
        return
    from rich.console import Console

    out = Console()
    for name, text in written:
        prompt, completion = _cell(text["prompt"]), _cell(text["completion"])
        prompt.stylize("dim")
        with beside_the_work():
            out.print(_cell(f"{name}: ").append_text(prompt).append_text(completion))
