"""Text of others inside Markdown: names, licences and settings that came with a model.

Whatever such a text holds, it stays one line of plain words: it begins no heading, table, link or
HTML of its own.
"""

import html
import re
from typing import Any

_LONGEST = 300
"""Characters; a licence that is a whole text belongs into a file."""


def one_line(value: Any) -> str:
    """The value as text without line breaks and control characters, cut where it is very long."""
    words = "".join(c if c.isprintable() else " " for c in str(value)).split()
    line = " ".join(words)
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."


def code(value: Any) -> str:
    """The value between backticks, which show it letter by letter, also in a cell of a table."""
    return "`" + one_line(value).replace("`", "'").replace("|", "\\|") + "`"


def text(value: Any) -> str:
    """The value between other words."""
    plain = re.sub(r"([\\`*\[\]|#~])", r"\\\1", one_line(value))
    return html.escape(plain, quote=False)
