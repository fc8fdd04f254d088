"""Tab completion: ``eval "$(minitron --shell-completion install=bash)"`` (or zsh, fish).

Hydra completes keys, groups and values of one config. Here the first word says which config that
is: the shell's scripts call ``minitron -sc query=<shell>`` with the line so far in COMP_LINE.
"""

import os
import sys
from collections.abc import Sequence

from nemo_minitron.config import load, schema

FLAGS = ("-sc", "--shell-completion")


def complete(arguments: Sequence[str]) -> int:
    """Answer ``install=SHELL``, ``uninstall=SHELL`` and ``query=SHELL``; returns the exit code."""
    action = arguments[0] if arguments else ""
    if action.partition("=")[0] not in ("install", "uninstall", "query"):
        sys.stdout.write('eval "$(minitron --shell-completion install=bash)"   # or zsh, fish\n')
        return 0
    if not action.startswith("query="):
        return _ask_hydra("import", action)
    words = os.environ.get("COMP_LINE", "").split(" ")[1:]
    configs = [*schema.COMMANDS] if words[:1] != ["submit"] else [*schema.STAGE_CONFIGS]
    place = int(words[:1] == ["submit"] and len(words) > 1)
    if len(words) <= place + 1:  # which stage is still being written
        typed = words[place] if words else ""
        sys.stdout.write(" ".join(name for name in configs if name.startswith(typed)) + "\n")
        return 0
    stage = words[place]
    if stage not in schema.STAGE_CONFIGS:
        return 0
    os.environ["COMP_LINE"] = " ".join(["minitron", *words[place + 1 :]])
    for name in (stage, "submit") if place else (stage,):
        _ask_hydra(name, action)
    return 0


def _ask_hydra(config_name: str, action: str) -> int:
    import hydra

    load.register()
    before = sys.argv
    sys.argv = ["minitron", "-sc", action]
    folder = str(schema.conf_dir())
    try:
        hydra.main(version_base="1.3", config_path=folder, config_name=config_name)(
            lambda _: None
        )()
    finally:
        sys.argv = before
    return 0
