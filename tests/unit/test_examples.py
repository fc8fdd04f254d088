"""The programs in ``examples/`` are short: what a user adds to his own."""

import ast
import tokenize
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
PROGRAMS = sorted(path.relative_to(EXAMPLES) for path in EXAMPLES.rglob("*.py"))
_NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)


def code_lines(path: Path) -> int:
    """Lines with code; comments, docstrings and empty lines are none."""
    texts: set[int] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            texts.update(range(node.lineno, (node.end_lineno or 0) + 1))
    with path.open("rb") as file:
        tokens = [t for t in tokenize.tokenize(file.readline) if t.type not in _NO_CODE]
    lines = {n for t in tokens if t.string for n in range(t.start[0], t.end[0] + 1)}
    return len(lines - texts - {0})


@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_under_80_lines(program: Path) -> None:
    assert 5 < code_lines(EXAMPLES / program) < 80
