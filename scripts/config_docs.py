"""Write the page of all config keys from the config dataclasses.

    python scripts/config_docs.py docs/keys.md

``tests/unit/test_repo.py`` fails while the page and the dataclasses differ.
"""

import sys
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path

from nemo_minitron.config import load, schema
from nemo_minitron.config.identity import Meaning, meanings
from nemo_minitron.config.schema import Key
from nemo_minitron.config.stages import StageConfig
from nemo_minitron.usage import shown

HEAD = """\
# Every key

Written by `make docs` from the dataclasses in `nemo_minitron/config/`; do not edit.
"required" keys have no default, `null` means "not set". A key of a shared section is listed with
a stage too where its default differs there. [configuration.md](configuration.md) says how keys,
groups and sweeps work.
"""


_TYPES = {
    "str": "text",
    "int": "whole number",
    "float": "number",
    "bool": "`true` or `false`",
    "Any": "text or list",
    "dict[str, Any]": "keys and values",
    "list[str]": "list of texts",
    "list[int]": "list of whole numbers",
    "list[Any]": "list",
    "list[list[int]]": "list of lists of whole numbers",
    "dict[str, int]": "names and whole numbers",
    "dict[str, str]": "names and texts",
    "list[dict[str, Any]]": "list of mappings",
}

_RESUMED = [
    "data",
    "importance",
    "prune",
    "search",
    "teacher_logits",
    "distill",
    "finetune",
    "generate",
]
_COMMON = meanings(StageConfig)
_RESUMING = """\
## Keys that may differ when work goes on

What a stage has done before it was killed is used when it is started again with the same keys and
inputs. These may differ, and so may paths if what they name is the same; any other key is refused
by name. Of every stage: `verify_inputs` and `workers`.

| stage | keys |
|---|---|
"""


def page() -> str:
    """Text of ``docs/keys.md``."""
    stages = {stage: list(schema.keys(cls)) for stage, cls in schema.COMMANDS.items()}
    common = list(schema.keys(StageConfig))
    sections = _sections(stages.values())
    parts = [HEAD, "## Keys of every stage\n", _table(common)]
    for stage, keys in stages.items():
        parts += [f"## {stage}\n", f"{schema.summary(stage)}\n"]
        parts += [groups] if (groups := _groups(stage)) else []
        used = [name for name in sections if any(_section(k) == name for k in keys)]
        own = [k for k in keys if k not in common and k not in _flat(sections)]
        if own:
            parts.append(_table(own))
        if used:
            links = (f"[{name}](#{name.replace('.', '')})" for name in used)  # GitHub's anchors
            parts.append(f"And the sections {', '.join(links)}.\n")
    for name, keys in sections.items():
        parts += [f"## {name}\n", _table(keys)]
    parts.append(_resuming())
    return "\n".join(parts)


def _resuming() -> str:
    lines = []
    for stage in _RESUMED:
        found = meanings(schema.COMMANDS[stage])
        names = dict.fromkeys(name for key in found for name in _differing(key, found))
        lines.append(f"| `{stage}` | {', '.join(f'`{name}`' for name in names)} |\n")
    return _RESUMING + "".join(lines)


def _differing(key: str, known: dict[str, Meaning]) -> Iterator[str]:
    """Names of what may differ of a key: of its section, if all of that may."""

    def free(name: str) -> bool:
        return known[name].role == "neutral" or "" in known[name].may_change

    parts = key.split(".")
    for section in accumulate(f"{part}." for part in parts[:-1]):
        if all(free(name) for name in known if name.startswith(section)):
            yield f"{section}*"
            return
    if free(key):
        yield from [] if key in _COMMON else [key]
    else:
        for beginning in known[key].may_change:
            yield f"{key}.{beginning}{'*' * beginning.endswith('_')}"


def _section(key: Key) -> str:
    return key.name.rpartition(".")[0]


def _sections(stages: Iterable[list[Key]]) -> dict[str, list[Key]]:
    """Sections that several stages have alike, with the defaults most of them give."""
    stages = list(stages)
    names = [_section(k) for keys in stages for k in keys if "." in k.name]
    found: dict[str, list[Key]] = {}
    for name in dict.fromkeys(names):
        having = [[k for k in keys if _section(k) == name] for keys in stages]
        having = [keys for keys in having if keys]
        same_keys = len({tuple(k.name for k in keys) for keys in having}) == 1
        if len(having) > 1 and same_keys:
            found[name] = [max(same, key=same.count) for same in zip(*having, strict=True)]
    return found


def _flat(sections: dict[str, list[Key]]) -> list[Key]:
    return [key for keys in sections.values() for key in keys]


def _groups(stage: str) -> str:
    # The experiments that are shipped are pipelines.
    others = {"experiment"} if stage != "pipeline" else set()
    named = [
        f"`{name}=` {', '.join(entries)}"
        for name, entries in load.groups(stage).items()
        if entries and name not in others
    ]
    return f"Config groups: {'; '.join(named)}.\n" if named else ""


def _table(keys: Iterable[Key]) -> str:
    lines = ["| key | default | type | meaning |", "|---|---|---|---|"]
    for key in keys:
        cells = (
            f"`{key.name}`",
            _default(key),
            _type(key),
            key.doc,
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _default(key: Key) -> str:
    default = shown(key.default)
    return "required" if default == "???" else f"`{default}`"


def _type(key: Key) -> str:
    """What may be given, in words: ``int | None`` is a whole number, since null is "not set"."""
    if key.words:
        return " or ".join(f"`{word}`" for word in key.words.split(" | "))
    names = key.type.replace("typing.", "").split(" | ")
    return " or ".join(_TYPES[name] for name in names if name != "None")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
