"""Code blocks of the documents, each with a comment before it that says how it is tested.

    <!-- test: run with data.seq_length=16 distill:trainer.max_steps=3 -->

        minitron importance ...

The first word is what a test does with the block:

- ``run``: run it on a small model. The keys after ``with`` are added where a stage has them, those
  with ``STAGE:`` before them for that stage alone.
- ``fails CODE: TEXT``: run it; it ends with that exit code and says that.
- ``python``: execute it where the blocks before it ran.
- ``compose``: compose the config. ``sbatch``: that too, after the script ran with ``--dry-run``.
- ``make``: look the targets up. ``shell``: look files and variables up.
"""

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

from nemo_minitron.config import schema
from nemo_minitron.config.stages import STAGE_CONFIGS

REPO = Path(__file__).parents[2]
PAGES = (REPO / "README.md", *sorted((REPO / "docs" / "tutorials").glob("*.md")))
"""Pages in which every block has to have a test."""
KINDS = ("run", "fails", "compose", "python", "sbatch", "make", "shell")
# An indented block: lines of four spaces or more, and empty ones between, after an empty line.
_BLOCK = re.compile(
    r"(?:^<!-- test: (?P<test>.+?) -->\n\n)?(?<=\n\n)(?P<code>(?: {4}.*\n|\n(?= {4}))+)",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Snippet:
    """One block.

    Attributes:
        page: path in the repository.
        kind: one of KINDS.
        rest: what follows the kind in the comment.
        code: the block.
    """

    page: str
    kind: str
    rest: str
    code: str

    @property
    def lines(self) -> list[str]:
        """Commands; a backslash joins lines."""
        return [line for line in self.code.replace("\\\n", " ").splitlines() if line.strip()]

    @property
    def ending(self) -> tuple[int, str]:
        """Exit code of its commands, and what they say."""
        code, _, says = (self.rest if self.kind == "fails" else "0").partition(": ")
        return int(code), says

    def arguments(self, line: str) -> list[str]:
        """Return the arguments of ``minitron``, and keys after ``with`` that its stage takes."""
        words = shlex.split(line)
        stage = words[1]
        known = {key.name for key in schema.keys(STAGE_CONFIGS[stage])}
        added = []
        for word in self.rest.removeprefix("with ").split() if self.kind == "run" else ():
            only, _, key = word.rpartition(":")
            unread = key.startswith("data.") and "data.path=" not in line  # prune scores nothing
            if only in ("", stage) and key.partition("=")[0] in known and not unread:
                added.append(key)
        return words[1:] + added


def snippets(path: Path) -> list[Snippet]:
    """The blocks of a page, in order; an untested one has the kind ``""``."""
    found = []
    for match in _BLOCK.finditer(path.read_text()):
        kind, _, rest = (match["test"] or "").partition(" ")
        code = textwrap.dedent(match["code"])
        found.append(Snippet(path.relative_to(REPO).as_posix(), kind, rest, code))
    return found
