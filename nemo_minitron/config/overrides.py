"""Overrides as text: how people write and Hydra reads them, and what to write where it cannot."""

import contextlib
import os
import re
import shlex
from collections.abc import Iterable, Sequence

_PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./-]*")
_SPLIT = re.compile(r"(\+*data\.split)=\[?\s*([\d.]+(?:\s*,\s*[\d.]+)*)\s*\]?")
_FREE = ("megatron.", "exp_manager.loggers.")
_QUOTES_AND_BRACKETS = ("'", '"', "[", "{", "$")
_HOME = re.compile(r"([+\w./@]+)=(~[^',]*)")


def opened(overrides: Iterable[str]) -> list[str]:
    """Return overrides as Hydra needs them: ``megatron.<part>.<field>`` is new to its config.

    The fields of Megatron's dataclasses and the arguments of loggers are no keys of ours, so Hydra
    would ask for a ``+`` before each. Whether there is one is checked elsewhere. What people
    write for lists of shares and for their home is text to Hydra: ``data.split=99,1,0``, ``~/x``.
    """
    written = []
    for text in overrides:
        split, home = _SPLIT.fullmatch(text), _HOME.fullmatch(text)
        if split:
            text = override(split[1], re.sub(r"\s", "", split[2]))
        elif home:
            text = override(home[1], os.path.expanduser(home[2]))
        written.append(f"++{text}" if text.startswith(_FREE) else text)
    return written


def refuse_blanks(overrides: Sequence[str], unknown: Sequence[str]) -> None:
    """Refuse ``key = value`` and ``--key value`` with what to write instead.

    Args:
        overrides: words that are no flags.
        unknown: flags that Hydra does not have.

    Raises:
        ValueError: names the words.
    """
    if unknown:
        key, equals, value = unknown[0].lstrip("-").partition("=")
        given = value if equals else next((o for o in overrides if "=" not in o), "...")
        raise ValueError(
            f"{unknown[0]} is not a flag; keys are written without hyphens before them: "
            f"{key.replace('-', '_')}={given}"
        )
    words = [*overrides, "...", "..."]
    for place, word in enumerate(overrides):
        before, bare = words[place - 1] if place else "", "=" not in word
        if word.startswith("=") and before and "=" not in before:
            value = word[1:] or words[place + 1]
        elif bare and before.endswith("="):
            before, value = before[:-1], word
        else:
            continue
        raise ValueError(f"a key and its value are one word, without blanks: {before}={value}")


def override(key: str, value: object) -> str:
    """``key=value`` in Hydra's grammar; lists and dictionaries included."""
    return f"{key}={_quoted(value)}"


def _quoted(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and _is_plain(value):
        return value
    if isinstance(value, str):
        # Backslashes only count before a quote (or at the end), so only those are doubled.
        text = re.sub(r"(\\*)(?='|$)", r"\1\1", value).replace("'", "\\'")
        return f"'{text}'"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_quoted, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_quoted(v)}" for k, v in value.items()) + "}"
    return repr(value)


def _is_plain(text: str) -> bool:
    """Whether Hydra reads the bare text as this very string (a path, a name)."""
    with contextlib.suppress(ValueError):
        float(text)
        return False  # a number, or "nan" and its like
    return text.lower() not in ("null", "true", "false") and bool(_PLAIN.fullmatch(text))


def unreadable(text: str, why: str) -> str:
    """Message for a word of the command line that Hydra's grammar has no place for.

    A path with an accent, a comma or a bracket needs quotes of its own inside those of the shell.
    """
    message = f"{text} is not a key=value that Hydra can read ({why})"
    key, equals, value = text.partition("=")
    if not equals or not value or value.startswith(_QUOTES_AND_BRACKETS):
        return message
    quoted = override(key, value)
    shown = shlex.quote(quoted) if re.search(r'["$`\\!]', quoted) else f'"{quoted}"'
    return f"{message}; if the value is a text, quote it: {shown}"


def refused_value(key: str, value: object, text: str) -> str:
    """Message for a value that OmegaConf does not take.

    Args:
        key: full name of the key.
        value: what was given, as far as OmegaConf says.
        text: first line of OmegaConf's message.
    """
    if re.match(r"field '.*' is not Optional|Incompatible value 'None'", text):
        return f"{key}=null: {key} needs a value; set it, or leave it out if it has a default"
    if "is not a ListConfig, list or tuple" in text:
        return f"{key}={value} must be a list; write {key}=[{value}]"
    if re.match(r"Cannot convert '(list|ListConfig)' to string", text):
        return f"{key}={value} must be one value, not a list; write {key}=VALUE"
    if text.endswith("does not support deletion"):
        return f"~{key}: a key cannot be removed; leave it out to take its default"
    return f"{key}: {text}"


def check_entry(group: str, value: object) -> None:
    """Refuse what is no name of a config file, as ``parallel=null``: Hydra would not say whose.

    Raises:
        ValueError: names the group.
    """
    if value is None or isinstance(value, int | float):
        given = "null" if value is None else value
        raise ValueError(
            f"{group}={given} must name one of the config files of the group; leave {group} out "
            "to take none of them"
        )
