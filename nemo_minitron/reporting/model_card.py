"""README.md of an exported model: what it is, what it was, and everything that was done to it."""

import html
import json
import re
from typing import TYPE_CHECKING, Any

import yaml

from nemo_minitron.checkpoint.lineage import LICENCE_KEYS, model_facts
from nemo_minitron.config.model import ModelConfig

Entry = dict[str, Any]
"""An entry of a lineage, or a part of one, as it was read from JSON."""

_TAGS = {"prune": "pruning", "distill": "distillation"}
_COUNTS = {"parameters": "parameters", "non_embedding_parameters": "without embeddings"}


def model_card(title: str, config: ModelConfig, lineage: list[Entry]) -> str:
    """Return Markdown with the YAML that Hugging Face reads.

    Args:
        title: heading.
        config: the model.
        lineage: entries of its checkpoint (``checkpoint.lineage``), oldest first; maybe none.
    """
    environment = templates(keep_trailing_newline=True)
    environment.filters |= {"number": _number, "code": code, "text": text}
    sources: list[Entry] = [entry["source"] for entry in lineage if "source" in entry]
    source = sources[0] if sources else {}
    after = model_facts(config)
    before = lineage[0]["model"] if lineage else after
    return environment.get_template("model_card.md.j2").render(
        title=text(title),
        front=_front(source, lineage),
        family=text(config.family),
        after=after,
        source=source,
        passed_over=", ".join(map(code, source.get("passed_over", []))),
        rows=_rows(before, after),
        changed=before != after,
        layers=_layers(config, before["sizes"]["num_layers"] if lineage else None),
        stages=[(_summary(entry), _settings(entry)) for entry in lineage],
        trained=[entry for entry in lineage if "data" in entry],
        scored=[row for entry in lineage for row in map(_score_row, entry.get("scores", []))],
        pruned=any(entry["stage"] == "prune" for entry in lineage),
        licence=", ".join(
            code(f"{key}: {_words(source[key])}") for key in LICENCE_KEYS if key in source
        ),
    )


def _front(source: Entry, lineage: list[Entry]) -> str:
    """Return the YAML between the ``---`` lines."""
    stages = [entry["stage"] for entry in lineage]
    values = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **{key: _plain(source[key]) for key in LICENCE_KEYS if key in source},
        "tags": ["minitron", *(tag for stage, tag in _TAGS.items() if stage in stages)],
    }
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True).strip()


def _number(value: object) -> str:
    """Format an integer with thousands separators; return any other value as text."""
    return f"{value:,}" if isinstance(value, int) else text(value)


def _words(value: object) -> str:
    return ", ".join(map(one_line, value)) if isinstance(value, list) else one_line(value)


def _plain(value: object) -> str | list[str]:
    """Return a licence for YAML that Hugging Face reads: a word or several, on one line."""
    return [one_line(item) for item in value] if isinstance(value, list) else one_line(value)


def _summary(entry: Entry) -> str:
    """Return a stage in one line."""
    said = code(entry["stage"])
    if "source" in entry:
        said += f" of {code(entry['source']['name'])} ({text(entry['source']['format'])})"
    if "teacher" in entry:
        said += f", teacher {_teacher(entry['teacher'])}"
    said += f": {_number(entry['model']['parameters'])} parameters"
    if entry.get("dropped_layers"):
        said += f", without layers {text(_words(entry['dropped_layers']))} (counted from 1)"
    losses = ", ".join(text(f"{key} {loss}") for key, loss in entry.get("losses", {}).items())
    return f"{said}; {losses} at the end" if losses else said


def _teacher(teacher: Entry) -> str:
    if teacher.get("stored_logits"):
        return f"{code(teacher['name'])} (its stored logits)"
    stages = "".join(f", {text(stage)}" for stage in teacher["stages"])
    return f"{code(teacher['name'])} ({_number(teacher['parameters'])} parameters{stages})"


def _settings(entry: Entry) -> str:
    """Return the settings of a stage as they are typed on the command line."""
    pairs = entry.get("settings", {}).items()
    return ", ".join(code(f"{key}={_typed(value)}") for key, value in pairs)


def _typed(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _score_row(scores: Entry) -> list[str]:
    """Return a table row: what was scored, how, and on which data."""
    data = code(scores["data"]) if "data" in scores else ""
    where = f"{data} ({text(scores['split'])})" if "split" in scores else data
    keys = ("seq_aggregation", "batch_aggregation", "samples", "tokens")
    over_positions, over_samples, samples, tokens = (_number(scores.get(key, "")) for key in keys)
    axes, round_ = text(_words(scores.get("axes", []))), _number(scores.get("round", ""))
    axes += f" by {code(scores['criterion'])}" if "criterion" in scores else ""
    return [round_, axes, over_positions, over_samples, where, samples, tokens]


def _rows(before: Entry, after: Entry) -> list[tuple[str, str, str, str]]:
    """Return table rows: name of the size, before, after, share that was kept."""
    pairs = [(label, before[key], after[key]) for key, label in _COUNTS.items()]
    sizes = {**before["sizes"], **after["sizes"]}
    pairs += [(code(name), before["sizes"].get(name), after["sizes"].get(name)) for name in sizes]
    return [(label, _number(old), _number(new), _share(old, new)) for label, old, new in pairs]


def _share(old: object, new: object) -> str:
    if old == new or not (isinstance(old, int) and isinstance(new, int)):
        return ""
    return f"{new / old:.1%}"


def _layers(config: ModelConfig, original: int | None) -> str:
    """Return kept and dropped layers of the original model; nothing when all are kept."""
    if not config.kept_layers:
        return ""
    kept = config.kept_layers
    said = f"Layers of the original model that were kept (0-based): [{', '.join(map(text, kept))}]."
    if original is not None:
        dropped = [index for index in range(original) if index not in kept]
        said += f" Dropped: [{', '.join(map(text, dropped))}]."
    return said


_LONGEST = 300
"""Characters; a licence that is a whole text belongs into a file."""


def one_line(value: object) -> str:
    """The value as text without line breaks and control characters, cut where it is very long."""
    words = "".join(c if c.isprintable() else " " for c in str(value)).split()
    line = " ".join(words)
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."


def code(value: object) -> str:
    """The value between backticks, which show it letter by letter, also in a cell of a table."""
    return "`" + one_line(value).replace("`", "'").replace("|", "\\|") + "`"


def text(value: object) -> str:
    """Write a value so that it can stand between other words."""
    plain = re.sub(r"([\\`*\[\]|#~])", r"\\\1", one_line(value))
    return html.escape(plain, quote=False)


if TYPE_CHECKING:
    from jinja2 import Environment


def templates(*, autoescape: bool = False, keep_trailing_newline: bool = False) -> "Environment":
    """Return the templates below ``templates/``; a value that is missing is an error.

    Args:
        autoescape: as ``jinja2.Environment`` has it.
        keep_trailing_newline: as ``jinja2.Environment`` has it.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("nemo_minitron.reporting"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=autoescape,
        keep_trailing_newline=keep_trailing_newline,
    )
