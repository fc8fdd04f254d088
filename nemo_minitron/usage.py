"""``minitron --help``, ``minitron <stage> --help`` and tab completion, made from the dataclasses.

Plain text and light imports: help has to appear at once, also on a login node's cold disk.

Hydra completes keys, groups and values of one config. Here the first word says which config that
is: the shell's scripts call ``minitron -sc query=<shell>`` with the line so far in COMP_LINE.
"""

import os
import shutil
import sys
import textwrap
from argparse import ArgumentParser
from collections.abc import Sequence

from nemo_minitron.config import load, schema
from nemo_minitron.config.stages import STAGE_CONFIGS
from nemo_minitron.runtime import plugins

FLAGS = (
    ("--cfg job", "print the composed config and stop"),
    ("-m, --multirun", "run every combination of key=a,b values, each into its own folder"),
    ("--config-dir DIR", "look for config files in DIR too"),
    ("hydra.verbose=true", "log debug messages"),
    ("--hydra-help", "what else Hydra offers"),
)
FROM_MEGATRON = """\
usage: minitron from-megatron [--stage STAGE] ARGS... | @FILE | --file FILE

Prints the keys that say what the arguments of a run of Megatron-LM said, one to
a line; on stderr, after a #, whatever has no key here, and why. Nothing is run.

  ARGS           as they stand behind pretrain_gpt.py; a torchrun before them
                 gives the replicas
  FILE           a shell script, a list of arguments, the run_config.yaml of a
                 Megatron-Bridge checkpoint, or a .yaml with MODEL_ARGS
  --stage STAGE  the keys of this stage alone

  minitron from-megatron --file train.sh |
      xargs minitron plan finetune checkpoint=C output_dir=O
"""
COMPLETION_FLAGS = ("-sc", "--shell-completion")
EXIT_CODES = (
    ("0", "done"),
    ("2", "bad input: the last line says which key to change"),
    ("75", "stopped early, work saved: the same command goes on from there"),
    ("130", "interrupted by Ctrl-C: the same command goes on from what was saved, or starts over"),
    ("143", "ended by a signal, nothing saved: the same command starts over"),
    ("1", "anything else: the traceback is in <output_dir>.log"),
)


def overview() -> str:
    """Return the text of ``minitron --help``."""
    rows = [(stage, schema.summary(stage)) for stage in STAGE_CONFIGS]
    return "\n".join(
        [
            "usage: minitron <stage> key=value ...",
            "",
            "Turns a trained GPT-style model into a smaller one.",
            "",
            "stages:",
            *_table(rows),
            "",
            "`minitron <stage> --help` lists its keys.",
            "`minitron submit <stage> key=value ...` queues it with SLURM.",
            "`minitron status RUN` says how far a run is, or each stage of a pipeline.",
            "`minitron from-megatron ARGS...` prints the keys for arguments of Megatron-LM.",
            "",
            "flags:",
            *_table(FLAGS),
            "",
            "exit codes:",
            *_table(EXIT_CODES),
            *_from_others(),
        ]
    )


def _from_others() -> list[str]:
    """List the additions of other packages, with their names."""
    rows = [
        (f"{what} {point.name}", f"from {plugins.origin(point)}")
        for kind, what in plugins.KINDS.items()
        for point in plugins.found(kind)
    ]
    return ["", "from other packages:", *_table(rows)] if rows else []


def config_dir(arguments: Sequence[str]) -> str | None:
    """Return the value of ``--config-dir`` in a command line, or None."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    found: str | None = parser.parse_known_args(list(arguments))[0].config_dir
    return found


def stage_help(stage: str, own: str | None = None) -> str:
    """Return text of ``minitron <stage> --help``; ``own`` is the user's folder of config files."""
    keys = [
        (f"{key.name}={shown(key.default)}", f"{key.words}: {key.doc}".removeprefix(": "))
        for key in schema.keys(schema.COMMANDS[stage])
    ]
    groups = [
        (f"{name}=", ", ".join(entries) or "(yours, from --config-dir)")
        for name, entries in load.groups(stage, own).items()
    ]
    return "\n".join(
        [
            f"usage: minitron {stage} key=value ...",
            "",
            *textwrap.wrap(schema.summary(stage).replace("``", ""), _width()),
            "",
            "keys and defaults (??? must be given):",
            *_table(keys),
            "",
            "config groups (conf/<group>/<entry>.yaml):",
            *_table(groups),
            "",
            "flags:",
            *_table(FLAGS),
        ]
    )


def unknown_stage(stage: str) -> str:
    """Return the message for a stage that does not exist."""
    near = load.nearest(stage, schema.COMMANDS)
    hint = f"did you mean {near}?" if near else f"stages: {', '.join(STAGE_CONFIGS)}"
    return f"{stage} is not a stage; {hint}"


def shown(value: object) -> str:
    """Return a default as it is written in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(shown, value))}]"
    return repr(value) if isinstance(value, str) and "\n" in value else str(value)


def _width() -> int:
    return shutil.get_terminal_size((100, 24)).columns


def _table(rows: "list[tuple[str, str]] | tuple[tuple[str, str], ...]") -> list[str]:
    """Return two columns, the second wrapped to the terminal; the first gets half of it at most."""
    width = _width()
    column = min(max(len(left) for left, _ in rows) + 4, 52, max(width // 2, 12))
    lines = []
    for left, right in rows:
        wrapped = textwrap.wrap(right.replace("``", ""), max(width - column, 20)) or [""]
        head = f"  {left}".ljust(column)
        if not head.endswith(" "):  # a long key gets its own line
            lines.append(head)
            head = ""
        lines.append(head.ljust(column) + wrapped[0])
        lines += [" " * column + line for line in wrapped[1:]]
    return lines


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

    load.register(config_name)
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
