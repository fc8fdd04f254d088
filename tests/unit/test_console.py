"""Tables on terminals of any width."""

import itertools

import pytest

from nemo_minitron.runtime.console import fitted

HEADER = ("run", "tokens", "hours", "GPUs")
ROWS = [("importance", "4.2M", "0.1", "16"), ("distilled", "80.0B", "46.0", "32")]


def test_a_table_that_fits_stays():
    assert fitted(HEADER, ROWS, 40) == [(HEADER, ROWS)]


def test_a_table_that_is_too_wide_is_turned_over():
    [(header, rows)] = fitted(HEADER, ROWS, 36)
    assert header == ["run", "importance", "distilled"]
    assert rows == [["tokens", "4.2M", "80.0B"], ["hours", "0.1", "46.0"], ["GPUs", "16", "32"]]


@pytest.mark.parametrize("width", [5, 25, 33])
def test_one_that_is_too_wide_either_way_comes_in_parts(width):
    tables = fitted(HEADER, ROWS, width)
    assert len(tables) > 1
    names = [name for header, _ in tables for name in header[1:]]
    assert names == list(HEADER[1:])
    for number, row in enumerate(ROWS):
        assert {rows[number][0] for _, rows in tables} == {row[0]}
        cells = [rows[number][1:] for _, rows in tables]
        assert list(itertools.chain.from_iterable(cells)) == list(row[1:])


def test_lines_of_a_heading_count_one_by_one():
    assert fitted(("a", "two\nlines"), [("b", "c")], 13) == [(("a", "two\nlines"), [("b", "c")])]
    assert len(fitted(("a", "two lines"), [("b", "c")], 12)[0][0]) == 2
