"""The documents: links and anchors, keys and messages they quote."""

import ast
import functools
import posixpath
import re
from pathlib import Path

import pytest

from nemo_minitron.config import schema
from nemo_minitron.config.stages import STAGE_CONFIGS
from tests.unit.test_repo import PAGES, REPO, name

DOCS = REPO / "docs"


def anchors(page: Path) -> "set[str]":
    """Anchors of the headings of a page, as GitHub and ``mkdocs.yml`` make them."""
    text = re.sub(r"^(```|~~~).*?^\1", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#{1,6} (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_anchors(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in (link for link in links if not link.startswith(("http://", "https://"))):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_page_is_in_the_site():
    nav = (REPO / "mkdocs.yml").read_text()
    for page in DOCS.rglob("*.md"):
        uri = posixpath.relpath(page, DOCS)
        assert f": {uri}\n" in nav, f"{uri} is missing in nav of mkdocs.yml"


# ----------------------------------------------------------------- what the code must still have


@functools.cache
def messages() -> "list[str]":
    """Every string of the package, with ``...`` for the values in it."""
    found = []
    for path in (REPO / "nemo_minitron").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (
                    part.value if isinstance(part, ast.Constant) else "..." for part in node.values
                )
                found.append(collapsed("".join(map(str, parts))))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    found.append((REPO / "launch" / "lib.sh").read_text())
    return found


def quoted(page: str) -> "list[str]":
    return re.findall(r"^> `(.+)`$", (DOCS / page).read_text(), re.MULTILINE)


def collapsed(text: str) -> str:
    """One ``...`` for values that touch."""
    return re.sub(r"\.{3,}", "...", text)


@pytest.mark.parametrize("message", quoted("troubleshooting.md"))
def test_quoted_messages_are_those_of_the_code(message):
    pieces = [re.escape(piece) for piece in collapsed(message).split("...")]
    pattern = re.compile(".*".join(pieces), re.DOTALL)
    assert any(pattern.search(text) for text in messages()), message


def test_other_tools_are_told_keys_that_exist():
    """The right column of the tables of docs/coming-from.md."""
    known = {stage: {key.name for key in schema.keys(cls)} for stage, cls in STAGE_CONFIGS.items()}
    found = 0
    for line in (DOCS / "coming-from.md").read_text().splitlines():
        if heading := re.match(r"## .*", line):
            stages = {"distill"} if "distil" in heading[0] else set(STAGE_CONFIGS)
        row = re.fullmatch(r"\| (.+) \| (.+) \|", line.replace(r"\|", "/"))
        for text in re.findall(r"`([^`]+)`", row[2]) if row else []:
            stage, _, rest = text.rpartition(" ")
            key = rest.partition("=")[0]
            if stage in STAGE_CONFIGS:
                stages_of_row = {stage}
            elif "." in key or key in ("student", "teacher", "output_dir"):
                stages_of_row = stages
            else:
                continue
            found += 1
            assert any(key in known[stage] for stage in stages_of_row), text
    assert found > 90
