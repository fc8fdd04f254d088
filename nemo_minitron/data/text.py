"""Documents out of text and JSONL files, and the check of ``data.path`` that needs no tokens.

A *document* is the unit that is shuffled and split: one ``.txt`` file of a folder, one part of a
single ``.txt`` file between two ``data.document_separator``, or one JSONL record.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nemo_minitron.config.training import DataConfig
from nemo_minitron.documents import json_value

TEXT = "text"
INDEXED = "indexed"
NPY = "npy"
_FORMS = (
    "a .txt file, a folder of .txt/.jsonl files, a .jsonl file, the prefix of a Megatron .bin/.idx "
    "pair, or a .npy of token ids"
)
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Source:
    """What ``data.path`` turned out to be."""

    kind: str
    """``text``, ``indexed`` or ``npy``."""
    path: Path
    """The path as given; for ``indexed`` the prefix without ``.bin``/``.idx``."""
    files: tuple[Path, ...]
    """Every file that is read, in reading order."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.files)


def find_source(path: str | Path) -> Source:
    """Tell what ``data.path`` is, without reading it.

    Raises:
        ValueError: nothing is there, or it is none of the forms that can be read.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    if path.is_file() and path.suffix in (".txt", ".jsonl"):
        return Source(TEXT, path, (path,))
    if path.is_file() and path.suffix == ".npy":
        return Source(NPY, path, (path,))
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    pair = (Path(f"{prefix}.bin"), Path(f"{prefix}.idx"))
    found = [file for file in pair if file.is_file()]
    if len(found) == 2:
        return Source(INDEXED, prefix, pair)
    if len(found) == 1:
        missing = next(file for file in pair if file not in found)
        raise ValueError(f"data.path={path}: {found[0]} is there but {missing} is missing")
    if path.is_file():
        raise ValueError(f"data.path={path} has an unknown form; it must be {_FORMS}")
    raise ValueError(f"data.path={path} does not exist; set data.path to {_FORMS}")


def _folder(path: Path) -> Source:
    files = sorted(f for f in path.iterdir() if f.is_file() and f.suffix in (".txt", ".jsonl"))
    if not files:
        raise ValueError(
            f"data.path={path} is a folder without .txt or .jsonl files (subfolders are not "
            "searched); set data.path to a folder that holds some"
        )
    return Source(TEXT, path, tuple(files))


def read_documents(source: Source, data: DataConfig) -> Iterator[str]:
    """Documents in file order, stripped, empty ones left out.

    Files are streamed: one file of a folder, one document or one record is in memory at a time.

    Raises:
        ValueError: a file is not UTF-8 or a JSONL record has no text; the line is named.
    """
    if not data.document_separator:
        raise ValueError("data.document_separator must not be empty; the default is two line ends")
    for file in source.files:
        try:
            if file.suffix == ".jsonl":
                parts = _records(file, data.text_key)
            elif source.path == file:
                parts = _split_file(file, data.document_separator)
            else:
                parts = iter((file.read_text(encoding="utf-8-sig"),))
            for part in parts:
                if text := part.strip():
                    yield text
        except UnicodeDecodeError as error:
            raise ValueError(f"data.path: {file} is not UTF-8 text ({error.reason})") from error


def _split_file(file: Path, separator: str) -> Iterator[str]:
    """Parts of one text file; universal newlines, so CRLF files are split too."""
    rest = ""
    with file.open(encoding="utf-8-sig") as stream:
        while chunk := stream.read(_CHUNK):
            *parts, rest = (rest + chunk).split(separator)
            yield from parts
    yield rest


def _records(file: Path, key: str) -> Iterator[str]:
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield _record_text(line, key, f"{file}, line {number}")


def _record_text(line: str, key: str, where: str) -> str:
    try:
        record = json_value(line)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: the record must be a JSON object, not {type(record).__name__}")
    if key not in record:
        raise ValueError(
            f"{where}: no key '{key}'; set data.text_key to the key that holds the text, one of "
            f"{sorted(record)}"
        )
    if not isinstance(record[key], str):
        raise ValueError(
            f"{where}: '{key}' holds {type(record[key]).__name__}, not text; set data.text_key to "
            "the key that holds the text"
        )
    return str(record[key])


def unique_documents(documents: Iterable[str], dropped: Counter[str]) -> Iterator[str]:
    """Documents without exact repeats, which could otherwise land in two splits.

    Args:
        documents: texts in reading order; the first of equal ones stays.
        dropped: ``dropped["duplicates"]`` counts those left out.
    """
    seen: set[bytes] = set()
    for text in documents:
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if digest in seen:
            dropped["duplicates"] += 1
            continue
        seen.add(digest)
        yield text


def no_documents(source: Source) -> ValueError:
    """The error for a source in which every document is empty."""
    return ValueError(f"data.path={source.path} holds no documents: every text in it is empty")
