"""Benchmarks replace their own block of the page and nothing else."""

from benchmarks.docs_block import markdown_table, write_block


def test_blocks(tmp_path) -> None:
    page = tmp_path / "benchmarks.md"
    write_block("one", "first", page)
    write_block("two", markdown_table(["a", "b"], [["x", r"\1"]]), page)
    write_block("one", "second\n", page)
    assert page.read_text() == (
        "# Benchmarks\n\n<!-- begin one -->\nsecond\n<!-- end one -->\n\n"
        "<!-- begin two -->\n| a | b |\n| :-- | --: |\n| x | \\1 |\n<!-- end two -->\n"
    )
