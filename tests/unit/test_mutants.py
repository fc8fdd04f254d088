"""The table of mutants fits the code as it is now."""

import pytest

from benchmarks.mutants import REPO, Mutant, read_table

MUTANTS = read_table()


def test_there_are_thirty() -> None:
    assert len(MUTANTS) == 30
    assert len({mutant.breaks for mutant in MUTANTS}) == 30


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.breaks)
def test_each_is_an_error_in_the_code_of_today(mutant: Mutant) -> None:
    mutant.source(REPO / "nemo_minitron")
    for test in mutant.tests:
        file, _, function = test.partition("::")
        assert f"def {function.partition('[')[0]}" in (REPO / "tests" / file).read_text()


@pytest.mark.parametrize("source", ["x = 1\n", "x = 1\nfor y in [2, 2]: x = 2\nx = 2\n"])
def test_a_text_that_is_not_there_once_is_refused(tmp_path, source) -> None:
    (tmp_path / "a.py").write_text(source)
    with pytest.raises(ValueError, match=r"a.py holds 'x = 2' [02] times, not once"):
        Mutant("The number is wrong.", "a.py", "x = 2", "x = 3", []).source(tmp_path)


def test_a_mutant_that_is_no_python_is_refused(tmp_path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(SyntaxError):
        Mutant("Nothing runs.", "a.py", "x = 1", "x = (", []).source(tmp_path)
