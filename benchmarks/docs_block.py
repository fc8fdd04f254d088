"""Puts a benchmark's table into docs/benchmarks.md, between marks that name the benchmark."""

import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
RESULTS = PAGE.with_name("results.md")


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and sample standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with its first column left-aligned and the figures right-aligned."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_block(name: str, text: str, page: Path = PAGE) -> None:
    """Replace the block of one benchmark, or append it.

    Args:
        name: of the benchmark, as its module is called.
        text: Markdown.
        page: the page; made when it is missing.
    """
    begin = f"<!-- {name}: begin (written by python -m benchmarks.{name} --write) -->"
    end = f"<!-- {name}: end -->"
    block = f"{begin}\n{text.strip()}\n{end}"
    old = page.read_text() if page.exists() else "# Benchmarks\n"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if pattern.search(old):
        page.write_text(pattern.sub(lambda _: block, old))
    else:
        page.write_text(f"{old.rstrip()}\n\n{block}\n")
