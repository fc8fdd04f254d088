"""The forms of a text file: plain text, JSON lines, JSON, Parquet and Arrow, compressed or not.

Files are streamed: one record, or one part of a text file, is in memory at a time. Whatever is
wrong with a file is a ``ValueError`` that names the file and the line, record or row.
"""

import bz2
import contextlib
import gzip
import importlib
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any

from nemo_minitron.data.records import parse_record, text_of, values_of

if TYPE_CHECKING:
    import pyarrow

JSON_LINES = (".jsonl", ".ndjson")
TABLES = (".parquet", ".arrow")
FORMS = (".txt", *JSON_LINES, ".json", *TABLES)
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
CHUNK = 1 << 20
"""Characters that are read at a time."""


def form_of(path: Path) -> str | None:
    """Form of a file by its name: one of ``FORMS``, or None for a file that is not read.

    Capital letters in a suffix mean the same as small ones.
    """
    form, _ = _suffixes(path)
    return form


def _suffixes(path: Path) -> tuple[str | None, str]:
    """Form and compression of a file; both are empty or None where the name has none."""
    suffix, name, compression = path.suffix.lower(), path, ""
    if suffix in COMPRESSIONS:
        name, compression = path.with_suffix(""), suffix
        suffix = name.suffix.lower()
    if suffix not in FORMS or (suffix in TABLES and compression):
        return None, compression
    return suffix, compression


def suffix_of(path: Path) -> str:
    """Form and compression as the end of a name: what decides how bytes become documents."""
    form, compression = _suffixes(path)
    return f"{form or ''}{compression}"


def texts_of(file: Path, key: str, separator: str | None) -> Iterator[str]:
    """Texts of one file, in order.

    Args:
        file: of a form that :func:`form_of` knows.
        key: holds the text in a JSON record, and names the column of a Parquet or Arrow file.
        separator: what stands between two documents of a text file, or None for one document.

    Raises:
        ValueError: the file cannot be read, is damaged, or a record has no text.
    """
    if form_of(file) == ".txt":
        with _named_errors(file):
            yield from _plain(file, separator)
        return
    for where, record in records_of(file, (key,)):
        yield text_of(record, key, where)


def records_of(file: Path, keys: Sequence[str]) -> Iterator[tuple[str, object]]:
    """Where each record of a file is, for messages, and the record.

    Args:
        file: of a form that holds records, none of plain text.
        keys: what is read of a table; having the first one twice in JSON is an error.

    Raises:
        ValueError: the file cannot be read, or is damaged.
    """
    form = form_of(file)
    with _named_errors(file):
        if form in TABLES:
            yield from _table(file, keys)
        elif form == ".json":
            yield from _json(file, keys[0])
        else:
            yield from _json_lines(file, keys[0])


def keys_of(file: Path) -> set[str]:
    """Return the columns of a table, or the keys of the first record of another file.

    Raises:
        ValueError: the file cannot be read, or is damaged.
    """
    if form_of(file) == ".txt":
        return set()
    if form_of(file) in TABLES:
        with _named_errors(file), _table_errors(file):
            return set(_columns(file))
    _, first = next(records_of(file, ("",)), ("", None))
    return set(first) if isinstance(first, dict) else set()


@contextlib.contextmanager
def _named_errors(file: Path) -> Iterator[None]:
    """Whatever the libraries raise about a file, as a ``ValueError`` that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        where = line_that_is_no_text(file)
        raise ValueError(
            f"data.path: {file}{where} is not UTF-8 text ({error.reason}); save the file as UTF-8, "
            "or leave the line out"
        ) from error
    except _damages() as error:
        raise ValueError(
            f"data.path: file {file} cannot be read ({error}); it is damaged or cut short: write "
            "it again, or take it out of data.path"
        ) from error


def _damages() -> tuple[type[Exception], ...]:
    """Return the exceptions that the libraries raise for bytes that they cannot read."""
    zstandard = sys.modules.get("zstandard")  # imported where a file needs it
    more = () if zstandard is None else (zstandard.ZstdError,)
    return (EOFError, OSError, zlib.error, lzma.LZMAError, *more)


def line_that_is_no_text(file: Path) -> str:
    """``, line N`` for the first line that is not UTF-8, or an empty text."""
    if form_of(file) in TABLES:
        return ""
    with _open_bytes(file) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return f", line {number}"
    return ""


def _open_bytes(file: Path) -> IO[bytes]:
    """Return the bytes of a file, decompressed."""
    _, compression = _suffixes(file)
    if compression == ".zst":
        zstandard = _package("zstandard", file, "compressed with Zstandard", "decompress the file")
        unpacked: IO[bytes] = zstandard.open(file, "rb")
        return unpacked
    if not compression:
        return file.open("rb")
    opened: dict[str, Callable[[Path], Any]] = {
        ".gz": gzip.open,
        ".bz2": bz2.open,
        ".xz": lzma.open,
    }
    stream: IO[bytes] = opened[compression](file)
    return stream


def _package(name: str, file: Path, what: str, instead: str) -> ModuleType:
    """Import an optional package that reads files of a kind.

    Raises:
        ValueError: it is not installed; the message says what the file is and what else to do.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"data.path: file {file} is {what}, and the package {name} is not installed; install "
            f"it, or {instead}"
        ) from error


def _open_text(file: Path) -> IO[str]:
    """Return the text of a file whatever its line ends are, without a byte order mark."""
    return io.TextIOWrapper(_open_bytes(file), encoding="utf-8-sig")


def _plain(file: Path, separator: str | None) -> Iterator[str]:
    """Parts of a plain text file; every character is looked at once, however long a part is."""
    pieces: list[str] = []  # of the part that has not ended yet
    line = 1
    with _open_text(file) as stream:
        while chunk := stream.read(CHUNK):
            if "\0" in chunk:
                line += chunk.count("\n", 0, chunk.index("\0"))
                raise ValueError(
                    f"data.path: {file}, line {line} holds a NUL character: this is not a text "
                    "file, or it is damaged; take it out of data.path, or leave the line out"
                )
            line += chunk.count("\n")
            if separator is None:
                pieces.append(chunk)
                continue
            # A separator may begin in the text before.
            seam = pieces.pop() if pieces else ""
            *parts, rest = (seam + chunk).split(separator)
            if parts:
                yield "".join([*pieces, parts[0]])
                yield from parts[1:]
                pieces = []
            reach = len(rest) - (len(separator) - 1)
            pieces += [rest[:reach], rest[reach:]] if reach > 0 else [rest]
    yield "".join(pieces)


def _json_lines(file: Path, key: str) -> Iterator[tuple[str, object]]:
    with _open_bytes(file) as stream:
        for number, line in enumerate(stream, start=1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            del line
            if text.strip():
                where = f"data.path: {file}, line {number}"
                yield where, parse_record(text, key, where)


def _json(file: Path, key: str) -> Iterator[tuple[str, object]]:
    """Records of a ``.json`` file: a list of them, or one after the other as in JSON lines."""
    with _open_text(file) as stream:
        for number, record in enumerate(values_of(stream, key, file, CHUNK), start=1):
            yield f"data.path: {file}, record {number}", record


def _table(file: Path, keys: Sequence[str]) -> Iterator[tuple[str, object]]:
    """Some columns, a batch of rows at a time."""
    with _table_errors(file):
        number = 0
        for batch in _opened_table(file)(file, list(keys)):
            for row in zip(*batch.columns, strict=True):
                number += 1
                where = f"data.path: {file}, row {number}"
                yield where, {key: _cell(one, where) for key, one in zip(keys, row, strict=True)}


@contextlib.contextmanager
def _table_errors(file: Path) -> Iterator[None]:
    kind = "Parquet" if form_of(file) == ".parquet" else "Arrow"
    pyarrow = _package("pyarrow", file, f"a file of {kind}", "save the texts as .jsonl")
    try:
        yield
    except pyarrow.ArrowException as error:
        raise ValueError(
            f"data.path: file {file} is not a readable {kind} file ({error}); write it again, or "
            "take it out of data.path"
        ) from error


def _opened_table(file: Path) -> Callable[[Path, list[str]], Iterator["pyarrow.RecordBatch"]]:
    return _parquet_rows if form_of(file) == ".parquet" else _arrow_rows


def _columns(file: Path) -> list[str]:
    if form_of(file) == ".parquet":
        parquet = importlib.import_module("pyarrow.parquet")
        return list(parquet.read_schema(file).names)
    pyarrow = importlib.import_module("pyarrow")
    with pyarrow.memory_map(str(file)) as mapped, pyarrow.ipc.open_stream(mapped) as stream:
        return list(stream.schema.names)


def _parquet_rows(file: Path, keys: list[str]) -> Iterator["pyarrow.RecordBatch"]:
    parquet = importlib.import_module("pyarrow.parquet")
    with parquet.ParquetFile(file) as table:
        _check_columns(table.schema_arrow.names, keys, file)
        yield from table.iter_batches(batch_size=1000, columns=keys)


def _arrow_rows(file: Path, keys: list[str]) -> Iterator["pyarrow.RecordBatch"]:
    """Read the stream of batches that the library ``datasets`` writes."""
    pyarrow = importlib.import_module("pyarrow")
    with pyarrow.memory_map(str(file)) as mapped, pyarrow.ipc.open_stream(mapped) as stream:
        _check_columns(stream.schema.names, keys, file)
        for batch in stream:
            yield batch.select(keys)


def _check_columns(names: list[str], keys: list[str], file: Path) -> None:
    for key in keys:
        if names.count(key) != 1:
            raise ValueError(
                f"data.path: file {file} has {names.count(key)} columns '{key}'; set "
                f"data.text_key to the column that holds the text, one of {sorted(names)}"
            )


def _cell(value: "pyarrow.Scalar", where: str) -> object:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text ({error.reason})") from error
