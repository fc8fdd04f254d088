"""How far a training is: a small file in its working folder, for ``minitron status``.

It lies among the logs, which are no part of what a result is.
"""

import json
from pathlib import Path
from typing import Any

from nemo_minitron.documents import JsonObject, read_json
from nemo_minitron.runtime.atomic import atomic_file

_FILE = "logs/status.json"


def write_progress(work: Path, **values: Any) -> None:
    """Note step, loss and speed; one process of a run calls it."""
    path = work / _FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as draft:
        draft.write_text(json.dumps(values))


def read_progress(work: Path) -> tuple[JsonObject, float | None]:
    """Return the last note in a working folder or a result, and its time (seconds since 1970)."""
    path = work / _FILE
    try:
        found, when = read_json(path), path.stat().st_mtime
    except (OSError, ValueError):
        return {}, None
    return (found, when) if isinstance(found, dict) else ({}, None)
