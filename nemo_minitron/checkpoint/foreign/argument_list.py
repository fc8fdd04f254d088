"""The arguments of a training run, as people keep them: a list, a script, or a YAML file.

Nothing is run. A script is read for its variables and for the words that follow ``--``; what lies
in a branch of it (``if``, ``case``), or needs a variable that the script does not set, is not
taken.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nemo_minitron.documents import JsonObject, read_yaml_mapping


@dataclass
class Given:
    """The arguments that a run was started with.

    Attributes:
        values: by the names that Megatron-LM's parser gives its arguments (``num_layers``).
        names: what the user wrote, by the same names (``--num-layers``).
        left: what could not be read, and why.
        bridge: the section ``model`` of a Megatron-Bridge config; None for Megatron-LM.
    """

    values: JsonObject = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    bridge: JsonObject | None = None

    def name(self, key: str) -> str:
        """Return the name by which the user knows an argument."""
        return self.names.get(key, "--" + key.replace("_", "-"))

    def add(self, name: str, values: Sequence[object]) -> None:
        """Take one argument with its values.

        Raises:
            ValueError: it was given before, with another value.
        """
        key = name.lstrip("-").replace("-", "_")
        value = True if not values else values[0] if len(values) == 1 else list(values)
        if any("$" in str(each) for each in values):
            self.left[name] = f"{value} holds a variable that is not set here"
            return
        if key in self.values and self.values[key] != value:
            raise ValueError(
                f"{name} is given twice, as {self.values[key]} and as {value}; leave one of them"
            )
        self.values[key], self.names[key] = value, name


def read(words: Sequence[str]) -> Given:
    """Read a command line: arguments, ``@FILE`` and ``--file FILE``.

    Raises:
        ValueError: a file is missing or of another form, or values contradict each other.
    """
    given, rest = Given(), []
    left = list(words)
    while left:
        word = left.pop(0)
        if word == "--file" or word.startswith("--file="):
            _file(word.partition("=")[2] or (left.pop(0) if left else ""), given)
        elif word.startswith("@"):
            _file(word[1:], given)
        else:
            rest.append(word)
    _words(rest, given)
    return given


def _file(name: str, given: Given) -> None:
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"--file {name}: there is no such file; give a script, a list or a .yaml")
    if path.suffix not in (".yaml", ".yml"):
        try:
            return _script(path.read_text(), given)
        except UnicodeDecodeError:
            raise ValueError(f"--file {name} is not a text file") from None
    values = read_yaml_mapping(path)
    if isinstance(values.get("MODEL_ARGS"), Mapping):  # recipes in Megatron-LM's own tests
        for key, value in values["MODEL_ARGS"].items():
            _yaml_argument(str(key), value, given)
    elif isinstance(values.get("model"), Mapping):
        _bridge(values, given)
    else:
        raise ValueError(
            f"--file {name} has neither a section model (Megatron-Bridge's run_config.yaml) nor "
            "MODEL_ARGS (Megatron-LM's recipes)"
        )


def _yaml_argument(name: str, value: object, given: Given) -> None:
    if value is False or value is None:
        return
    given.add(name, [] if value is True else value if isinstance(value, list) else [value])


# Sections of Megatron-Bridge that hold what Megatron-LM has as arguments, with its names.
_SECTIONS = ("train", "validation", "optimizer", "scheduler", "ddp", "dataset", "rng")
_ONLY = {"logger": ("log_interval",), "checkpoint": ("save_interval",)}


def _bridge(values: JsonObject, given: Given) -> None:
    given.bridge = {k: v for k, v in values["model"].items() if not k.startswith("_")}
    for section in (*_SECTIONS, *_ONLY, "model"):
        for key, value in (values.get(section) or {}).items():
            name = "seq_length" if key == "sequence_length" else key
            if key.startswith("_") or value is None or key not in _ONLY.get(section, (key,)):
                continue
            if name not in given.values:
                given.values[name] = _plain(value)
                given.names[name] = f"{section}.{key}"
    precision = values.get("mixed_precision")
    if isinstance(precision, str):  # bf16_mixed, fp16_mixed, bf16_with_fp8_...
        kind = "bf16" if "bf16" in precision else "fp16"
        given.values[kind], given.names[kind] = True, "mixed_precision"


def _plain(value: object) -> object:
    """Return a value as arguments have it: Bridge writes dtypes and enums as objects."""
    if not isinstance(value, dict) or "_target_" not in value:
        return value
    dtype = str(value["_target_"]).removeprefix("torch.")
    return value.get("_name_", dtype if "." not in dtype else value)


def _words(words: Sequence[str], given: Given) -> None:
    """Read the arguments of a list; what is before the first is the program that it was for."""
    name: str | None = None
    values: list[object] = []
    for word in [*words, "--"]:
        if not word.startswith("--"):
            values.append(word)
            continue
        if name is not None:
            given.add(name, [_scalar(v) for v in values if not _is_program(str(v))])
        name, equals, value = word.partition("=")
        values = [value] if equals else []


def _is_program(word: str) -> bool:
    return word.endswith(".py") or word in ("python", "python3", "torchrun")


def _scalar(text: object) -> object:
    for kind in (int, float):
        try:
            return kind(str(text))
        except ValueError:
            continue
    return {"true": True, "false": False}.get(str(text).lower(), text)


_ASSIGNED = re.compile(
    r"""^\s*(?:export\s+|local\s+|declare\s+)?(\w+)=(?:"([^"]*)"|'([^']*)'|([^\s(]\S*))\s*;?\s*$""",
    re.MULTILINE,
)
_ARRAY = re.compile(r"^\s*\w+\+?=\(\s*$(.*?)^\s*\)|^\s*\w+\+?=\(([^\n]*)\)\s*$", re.M | re.S)
_VARIABLE = re.compile(r"\$\{(\w+)(?::?[-=]([^{}]*))?\}|\$(\w+)")
_LIST = re.compile(r"""["']?\$\{?\w+(?:\[[@*]\]\})["']?|\$@|"\$@\"""")


def _script(text: str, given: Given) -> None:
    text = re.sub(r"(^|\s)#.*", r"\1", text)
    text = _without_branches(re.sub(r"\\\n", " ", text), given)
    known: dict[str, str] = {}
    lists: list[str] = []
    for match in _ASSIGNED.finditer(text):
        value = next(group for group in (*match.groups()[1:], "") if group is not None)
        if "--" in value:
            lists.append(value)
        else:
            known[match[1]] = _expanded(value, known)
    lists += [match[1] or match[2] or "" for match in _ARRAY.finditer(text)]
    commands = _ARRAY.sub("", _ASSIGNED.sub("", text))
    lists += [line for line in commands.splitlines() if re.search(r"(^|\s)--\w", line)]
    for found in lists:
        _words(shlex.split(_LIST.sub("", _expanded(found, known))), given)


def _expanded(text: str, known: Mapping[str, str]) -> str:
    def value(match: "re.Match[str]") -> str:
        name = match[1] or match[3]
        return known.get(name, match[2] if match[2] is not None else match[0])

    for _ in range(4):  # a default may hold a variable
        text = _VARIABLE.sub(value, text)
    return text


def _without_branches(text: str, given: Given) -> str:
    """Return the lines that always run; what the others would add is named."""
    depth, kept = 0, []
    for line in text.splitlines():
        depth += bool(re.match(r"\s*(if|case)\b", line))
        if depth == 0:
            kept.append(line)
        for name in re.findall(r"(?<![\w-])--\w[\w-]*", line) if depth else ():
            given.left[name] = "it is in a branch of the script: add it if that ran"
        depth -= len(re.findall(r"(?:^|;)\s*(?:fi|esac)\b", line))
    return "\n".join(kept)
