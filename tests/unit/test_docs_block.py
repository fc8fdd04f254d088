"""Benchmarks replace their own block of the page and nothing else."""

from benchmarks.docs_block import markdown_table, write_block


def test_blocks(tmp_path) -> None:
    names = ("one", "two")
    page = tmp_path / "benchmarks.md"
    write_block("one", "first", page)
    write_block("two", markdown_table(["a", "b"], [["x", r"\1"]]), page)
    write_block("one", "second\n", page)
    one, two = (f"<!-- {n}: begin (written by python -m benchmarks.{n} --write) -->" for n in names)
    assert page.read_text() == (
        f"# Benchmarks\n\n{one}\nsecond\n<!-- one: end -->\n\n"
        f"{two}\n| a | b |\n| :-- | --: |\n| x | \\1 |\n<!-- two: end -->\n"
    )
