"""``data.blend``: sources and their weights, in each of the ways to write them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_minitron.documents import read_yaml

_WAYS = (
    "a list of {weight, path}, weights and paths in turn (0.3 a 0.7 b), or the name of a YAML file "
    "that holds such a list"
)


def is_blend(path: object) -> bool:
    """Whether a path names a YAML file of weighted sources."""
    return str(path).endswith((".yaml", ".yml"))


def parse_blend(value: object) -> list[dict[str, Any]]:
    """The sources of a blend as a list of ``{weight, path}``; those of weight 0 are left out.

    Args:
        value: ``data.blend`` as given; what this function returned stays what it is.

    Raises:
        ValueError: names what is wrong, and where.
    """
    if isinstance(value, str):
        value = _read(value)
    if not isinstance(value, list) or not value:
        raise ValueError(f"data.blend={value} must be {_WAYS}")
    mappings = any(isinstance(entry, dict) for entry in value)
    sources = [_source(*e) for e in enumerate(value)] if mappings else _in_turn(value)
    paths = [source["path"] for source in sources]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise ValueError(f"data.blend names {twice} twice; name it once, with the sum of weights")
    if not any(source["weight"] for source in sources):
        raise ValueError(f"data.blend has {len(sources)} weights that are all 0; set one above 0")
    return [source for source in sources if source["weight"]]


def _read(text: str) -> object:
    """Return a YAML file, or the words that Megatron-LM takes after ``--data-path``."""
    words = text.split()
    if len(words) > 1:
        return words
    path = Path(text)
    if not is_blend(path):
        raise ValueError(f"data.blend={text} must be {_WAYS}")
    if not path.is_file():
        raise ValueError(f"data.blend={text} does not exist; it must be {_WAYS}")
    return read_yaml(path)


def _in_turn(words: list[Any]) -> list[dict[str, Any]]:
    weights, paths = words[::2], words[1::2]
    if len(weights) != len(paths) or None in map(_number, weights):
        numbers = sum(_number(word) is not None for word in words)
        raise ValueError(
            f"data.blend={words} has {numbers} weights and {len(words) - numbers} paths; give a "
            "weight before each path"
        )
    pairs = zip(weights, paths, strict=True)
    return [_source(i, {"weight": w, "path": str(p)}) for i, (w, p) in enumerate(pairs)]


def parse_changes(changes: list[dict[str, Any]], sources: int) -> list[dict[str, Any]]:
    """Return the entries of ``data.blend_changes``, their weights as numbers.

    Args:
        changes: as given; what this function returned stays what it is.
        sources: how many there are to weigh.

    Raises:
        ValueError: names the entry and what is wrong with it.
    """
    found: list[dict[str, Any]] = []
    for index, entry in enumerate(changes):
        where = f"data.blend_changes.{index}"
        if set(entry) != {"step", "weights"} or not isinstance(entry["weights"], list):
            raise ValueError(f"{where}={entry} must have step and a list of weights, nothing else")
        step, before = entry["step"], found[-1]["step"] if found else 0
        if isinstance(step, bool) or not isinstance(step, int) or step <= before:
            raise ValueError(
                f"{where}.step={step} must be a number of steps above {before}, where the weights "
                "before it begin"
            )
        weights = [_number(weight) for weight in entry["weights"]]
        if len(weights) != sources or not all(w is not None and 0 <= w < math.inf for w in weights):
            raise ValueError(
                f"{where}.weights={entry['weights']} must be {sources} numbers that are not "
                "negative, one for each source of data.blend whose weight is not 0"
            )
        if not any(weights):
            raise ValueError(f"{where}.weights={entry['weights']} are all 0; set one above 0")
        found.append({"step": step, "weights": weights})
    return found


def check_trained(then: list[dict[str, Any]], now: list[dict[str, Any]], step: int) -> None:
    """Refuse ``data.blend_changes`` that differ in steps that a run has trained already.

    Args:
        then: those that it was trained with.
        now: those that it shall go on with.
        step: steps that are trained.

    Raises:
        ValueError: names the steps and both.
    """
    before, after = ([c for c in changes if c["step"] < step] for changes in (then, now))
    if before != after:
        raise ValueError(
            f"data.blend_changes={now} has {after or 'none'} before step {step}, and this run has "
            f"trained so far with {before or 'none'}; change weights from step {step} on, or set "
            "overwrite=true to train from the start"
        )


def _source(index: int, entry: object) -> dict[str, Any]:
    where = f"data.blend.{index}"
    if not isinstance(entry, dict) or set(entry) != {"weight", "path"}:
        raise ValueError(f"{where}={entry} must have weight and path, and nothing else")
    weight, path = _number(entry["weight"]), entry["path"]
    if weight is None or not 0 <= weight < math.inf:
        raise ValueError(
            f"{where}.weight={entry['weight']} of path={path} must be a number that is not negative"
        )
    if not isinstance(path, str) or not path:
        raise ValueError(f"{where}.path={path} must be a path as data.path takes it")
    if is_blend(path):
        raise ValueError(
            f"{where}.path={path} is a list of sources itself; write its sources into this one"
        )
    return {"weight": weight, "path": path}


def _number(word: object) -> float | None:
    if isinstance(word, bool) or not isinstance(word, int | float | str):
        return None
    try:
        return float(word)
    except ValueError:
        return None


@contextmanager
def naming(index: int) -> Iterator[None]:
    """Let an error about ``data.path`` say which source of the blend it is about."""
    try:
        yield
    except ValueError as error:
        said = str(error).replace("data.path", f"data.blend.{index}.path")
        raise ValueError(said) from error
