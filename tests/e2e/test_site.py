"""The site that ``make site`` builds: strictly, without dead links, without a network."""

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

REPO = Path(__file__).parents[2]


class Page(HTMLParser):
    """Links, embedded files and anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.embedded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: "list[tuple[str, str | None]]") -> None:
        found = {key: value or "" for key, value in attrs}
        self.anchors |= {found[key] for key in ("id", "name") if key in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag == "link" and found.get("rel") not in ("next", "prev", "canonical"):
            self.embedded.append(found.get("href", ""))
        elif "src" in found:
            self.embedded.append(found["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=100)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_no_dead_links(site):
    pages = {path: Page(path.read_text()) for path in site.rglob("*.html")}
    assert len(pages) > 40
    for path, page in pages.items():
        if path.name == "404.html":  # its links start at the root of the server
            continue
        for link in page.links + page.embedded:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https"):
                continue
            target = path.parent / unquote(parts.path) if parts.path else path
            target = (target / "index.html" if target.is_dir() else target).resolve()
            assert target.exists(), f"{path.relative_to(site)}: {link}"
            if parts.fragment and target in pages:
                assert parts.fragment in pages[target].anchors, f"{path.relative_to(site)}: {link}"


def test_nothing_comes_from_elsewhere(site):
    """Fonts, scripts and pictures are files of the site; `make look` sees what scripts ask for."""
    for path in site.rglob("*.html"):
        for link in Page(path.read_text()).embedded:
            assert urlsplit(link).netloc == "", f"{path.relative_to(site)}: {link}"
    for path in site.rglob("*.css"):
        assert "url(http" not in path.read_text(), path.relative_to(site)
