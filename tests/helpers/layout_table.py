"""The tables in ``docs/layouts.md``, made by the tests that ran.

``MINITRON_WRITE_DOCS=1 pytest tests/dist`` rewrites the rows of those tests inside the marked
blocks; rows of tests that did not run stay as they are.
"""

from collections.abc import Mapping
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs" / "layouts.md"
BEGIN, END = "<!-- layouts: begin (written by the tests) -->", "<!-- layouts: end -->"
HEADER = (
    "| ranks | layout | largest relative score error | kept indices identical "
    "| weights equal | test |\n|---|---|---|---|---|---|"
)
GRADIENT_BEGIN = "<!-- gradients: begin (written by the tests) -->"
GRADIENT_END = "<!-- gradients: end -->"
GRADIENT_HEADER = (
    "| ranks | layout | losses | largest relative gradient error | test |\n|---|---|---|---|---|"
)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


class LayoutTable:
    """Rows by test name."""

    def __init__(self) -> None:
        self.rows: dict[str, str] = {}

    def record(
        self,
        test: str,
        *,
        ranks: int,
        layout: str,
        score_error: float,
        same_indices: bool,
        same_weights: bool,
    ) -> None:
        """One layout's verdict; call it before the asserts so that a failure shows too."""
        # One digit: the last bits differ from machine to machine.
        error = f"{score_error:.0e}" if score_error else "0"
        self.rows[test] = (
            f"| {ranks} | {layout} | {error} | {_yes(same_indices)} "
            f"| {_yes(same_weights)} | `{test}` |"
        )

    def write(self, path: Path = DOCS) -> None:
        """Rewrite the marked block, fewest ranks first."""
        _write(path, HEADER, self.rows, BEGIN, END)


class GradientTable:
    """Gradients of a layout against those of one rank; rows by test name."""

    def __init__(self) -> None:
        self.rows: dict[str, str] = {}

    def record(self, test: str, *, ranks: int, layout: str, losses: str, error: float) -> None:
        """One layout's verdict; call it before the asserts so that a failure shows too."""
        worst = f"{error:.0e}" if error else "0"
        self.rows[test] = f"| {ranks} | {layout} | {losses} | {worst} | `{test}` |"

    def write(self, path: Path = DOCS) -> None:
        """Rewrite the marked block, fewest ranks first."""
        _write(path, GRADIENT_HEADER, self.rows, GRADIENT_BEGIN, GRADIENT_END)


def _write(path: Path, header: str, rows: Mapping[str, str], begin: str, end: str) -> None:
    before, rest = path.read_text().split(begin)
    _, after = rest.split(end)
    lines = sorted({**read_rows(path, begin, end), **rows}.values(), key=_ranks)
    path.write_text("\n".join([before + begin, header, *lines, end + after]))


def _ranks(row: str) -> int:
    return int(row.split("|")[1])


def read_rows(path: Path = DOCS, begin: str = BEGIN, end: str = END) -> Mapping[str, str]:
    """Test name -> row of the marked block."""
    block = path.read_text().split(begin)[1].split(end)[0]
    rows = [line for line in block.splitlines() if line.endswith("` |")]
    return {row.split("`")[-2]: row for row in rows}
