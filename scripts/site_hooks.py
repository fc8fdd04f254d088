"""What the documentation site takes from outside ``docs/``; mkdocs calls the ``on_*`` functions.

Pages link to each other as files of the repository, so that they also work where the repository
is browsed. The site has those files at other places: ``README.md`` of the repository is its home
page, and source files that pages link to come along, each as a page of its own. The hooks put
them there and turn the links.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPO = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "launch/README.md": "slurm.md",
    "docker/README.md": "containers.md",
}
"""Files of the repository outside ``docs/`` -> pages of the site."""
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")
"""Target of a relative link in Markdown: path, anchor."""
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".sbatch": "bash"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside ``docs/``, then the source files that any page links to."""
    for path, uri in PAGES.items():
        files.append(File.generated(config, uri, content=(REPO / path).read_text("utf-8")))
    pages = [file for file in files if file.is_documentation_page()]
    linked = {path for file in pages for path in _targets(file)}
    for path in sorted(linked):
        if _site_uri(path).startswith("source/"):
            page = File.generated(config, _site_uri(path), content=_source_page(path))
            files.append(page)
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn links to files of the repository into links to pages of the site."""
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown

    def turned(match: "re.Match[str]") -> str:
        target = _site_uri(_resolve(uri, match[1]))
        return posixpath.relpath(target, posixpath.dirname(uri) or ".") + (match[2] or "")

    return LINK.sub(turned, markdown)


def _targets(file: File) -> set[str]:
    """Paths in the repository that a page links to."""
    return {_resolve(file.src_uri, match[1]) for match in LINK.finditer(file.content_string)}


def _resolve(uri: str, link: str) -> str:
    """Path in the repository of what page ``uri`` of the site links to as ``link``."""
    homes = {page: path for path, page in PAGES.items()}
    home = homes.get(uri, f"docs/{uri}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(home), link))


def _site_uri(path: str) -> str:
    """Page of the site that shows a file or folder of the repository."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}/index.md" if (REPO / path).is_dir() else f"source/{path}.md"


def _source_page(path: str) -> str:
    """A source file as a page that search leaves out; a folder as the list of its files."""
    head = f"---\nsearch: {{exclude: true}}\n---\n# {path}\n\n"
    file = REPO / path
    if file.is_dir():
        parts = [p for p in sorted(file.iterdir()) if p.suffix in _LANGUAGES]
        blocks = [f"## {p.name}\n\n{_block(p)}" for p in parts]
        return head + "\n".join(blocks)
    return head + _block(file)


def _block(file: Path) -> str:
    return f"``````{_LANGUAGES.get(file.suffix, 'text')}\n{file.read_text('utf-8')}\n``````\n"
