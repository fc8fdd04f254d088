"""What Hydra and OmegaConf refuse, in words that name the key and what to write instead."""

import re
import shlex

from nemo_minitron.config.overrides import override

_QUOTES_AND_BRACKETS = ("'", '"', "[", "{", "$")


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
