"""JSON records: read one at a time, and whatever is wrong with one named by where it is."""

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

# So near to the end of what was read, an error may only mean that more has to be read.
_CUT_SHORT = 16
_BLANK = re.compile(r"\s*")


def parse_record(line: str, key: str, where: str) -> object:
    """Parse one line of JSON.

    Args:
        line: the text.
        key: the key that is wanted of the record; having it twice is an error.
        where: begins the messages: key, file and line.

    Raises:
        ValueError: it is not JSON, or cannot be read as such.
    """
    with _json_errors(where):
        return json.loads(line, object_pairs_hook=_object_with(key))


@contextlib.contextmanager
def _json_errors(where: str) -> Iterator[None]:
    try:
        yield
    except RecursionError as error:
        raise ValueError(f"{where}: the record is nested too deeply to be read") from error
    except json.JSONDecodeError as error:
        at = f"column {error.colno}"
        raise ValueError(f"{where}: not valid JSON ({error.msg}, {at})") from error
    except _TwiceError as error:
        raise ValueError(f"{where}: the record has two '{error}'; leave one out") from error
    except ValueError as error:  # such as a number of more digits than Python converts
        raise ValueError(f"{where}: not valid JSON ({error})") from error


class _TwiceError(Exception):
    """Raised where a JSON object has a key twice."""


def _object_with(key: str) -> Callable[[list[tuple[str, object]]], dict[str, object]]:
    """Make objects that have ``key`` once; of two values Python would take the last one."""

    def make(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs) and sum(name == key for name, _ in pairs) > 1:
            raise _TwiceError(key)
        return found

    return make


def check_characters(text: str, where: str) -> None:
    """Refuse half a surrogate pair, which JSON can spell but which is no character.

    Raises:
        ValueError: says where in the text it is.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(
            f"{where}: the text holds {half} at character {error.start + 1}, half of a surrogate "
            "pair, which is no character and has no tokens; put \\ufffd in its place, or leave the "
            "record out"
        ) from error


def text_of(record: object, key: str, where: str) -> str:
    """Return the text of a record.

    Args:
        record: a JSON value, or a row of a table as an object.
        key: the key that holds the text.
        where: begins the messages: key, file and line.

    Raises:
        ValueError: there is no text under the key, or it holds what is no character.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{where}: the record must be a JSON object, not {type(record).__name__}")
    if key not in record:
        raise ValueError(
            f"{where}: no key '{key}'; set data.text_key to the key that holds the text, one of "
            f"{sorted(record)}"
        )
    text = record[key]
    if not isinstance(text, str):
        raise ValueError(
            f"{where}: '{key}' holds {type(text).__name__}, not text; set data.text_key to the key "
            "that holds the text"
        )
    if not text.isascii():
        check_characters(text, where)
    return text


def values_of(stream: IO[str], key: str, file: Path, chunk: int) -> Iterator[object]:
    """Values of a ``.json`` file: the elements of a list, or one value after the other.

    Args:
        stream: the file.
        key: as for :func:`parse_record`.
        file: its name, for messages.
        chunk: characters that are read at a time.

    Raises:
        ValueError: it is not JSON; the record is named by its number.
    """
    ahead = _Ahead(stream, json.JSONDecoder(object_pairs_hook=_object_with(key)), chunk)
    numbers = itertools.count(1)
    if ahead.next_character() != "[":
        while ahead.next_character():
            yield ahead.value(f"data.path: {file}, record {next(numbers)}")
        return
    ahead.position += 1
    ends = ahead.next_character() == "]"
    while not ends:
        where = f"data.path: {file}, record {next(numbers)}"
        yield ahead.value(where)
        follows = ahead.next_character()
        if follows not in (",", "]"):
            what = f"{follows!r} follows it" if follows else "the file is cut short"
            raise ValueError(f"{where}: not valid JSON (no , or ] after the record: {what})")
        ahead.position += follows == ","
        ends = follows == "]"
    ahead.position += 1
    if ahead.next_character():
        raise ValueError(f"data.path: {file}: not valid JSON (something follows the list)")


class _Ahead:
    """Text of a ``.json`` file that has been read but not yet parsed."""

    def __init__(self, stream: IO[str], decoder: json.JSONDecoder, chunk: int) -> None:
        self.stream, self.decoder, self.chunk = stream, decoder, chunk
        self.buffer, self.position, self.ended = "", 0, False

    def _read_more(self) -> None:
        """Read at least as much again, so that a long record is not looked at many times."""
        more = self.stream.read(max(self.chunk, len(self.buffer) - self.position))
        self.buffer, self.position = self.buffer[self.position :] + more, 0
        self.ended = not more

    def next_character(self) -> str:
        """Return the next one that is no blank; empty at the end of the file."""
        while True:
            found = _BLANK.match(self.buffer, self.position)
            assert found is not None  # it matches the empty text
            self.position = found.end()
            if self.position < len(self.buffer) or self.ended:
                return self.buffer[self.position : self.position + 1]
            self._read_more()

    def value(self, where: str) -> object:
        """Return the next value."""
        self.next_character()
        while True:
            try:
                with _json_errors(where):
                    value, self.position = self._decoded()
                return value
            except _MoreError:
                self._read_more()

    def _decoded(self) -> tuple[object, int]:
        try:
            return self.decoder.raw_decode(self.buffer, self.position)
        except json.JSONDecodeError as error:
            near = error.pos >= len(self.buffer) - _CUT_SHORT
            if not self.ended and (near or error.msg.startswith("Unterminated")):
                raise _MoreError from error
            raise


class _MoreError(Exception):
    """Raised where a value goes on behind what was read."""
