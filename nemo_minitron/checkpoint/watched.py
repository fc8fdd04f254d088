"""Inputs while a stage reads them: a result is made from one version of each, or not at all.

Files are opened by name again and again while a stage streams, and somebody may replace or edit
them meanwhile. What the file system says of every file (inode, size, times) is noted before the
first byte is read and compared after the last one. Only where that differs is content read again: a
file that was merely touched changes nothing.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from nemo_minitron.checkpoint.manifest import (
    MANIFEST,
    digest,
    fingerprint,
    halves,
    hash_file,
    hash_files,
    input_files,
    matching,
    open_result,
    read_manifest,
    result_in,
)
from nemo_minitron.config.identity import input_paths
from nemo_minitron.config.stages import StageConfig

# Read by a stage, but no part of the identity of its result: what it holds is in the files made.
# The folder may hold much besides, such as the weights that the tokenizer came with.
_ALSO_READ = ("tokenizer",)
_MOST_FILES = 100_000
_MAY_HOLD_MANY = ("data.path", "data.blend.", "trainer.phases.")  # one file for every document


def read_paths(cfg: StageConfig) -> dict[str, str]:
    """Return the config key -> path of everything that a stage reads."""
    values = asdict(cfg)
    also = {key: values[key] for key in _ALSO_READ if isinstance(values.get(key), str)}
    return {**input_paths(cfg), **also}


def input_states(cfg: StageConfig) -> dict[str, str]:
    """Return one hash per input over what the file system says of its files, by config key."""
    return {key: _state(files_read(key, Path(value))) for key, value in read_paths(cfg).items()}


def identity_of(key: str, path: Path, workers: int) -> str:
    """Return the identity of the content of an input, by the files of it that are read.

    Args:
        key: config key of the input.
        path: the input, which exists.
        workers: threads that hash.
    """
    if read_in_part(key, path):
        hashed = hash_files(path, _names_of_tokenizer(path), workers)
        return digest({name: entry.sha256 for name, entry in hashed.items()})
    return fingerprint(path, workers)


def changed_since(cfg: StageConfig, states: Mapping[str, str]) -> list[str]:
    """Return keys of inputs of which the file system says something else than in ``states``."""
    now = input_states(cfg)
    return [key for key in now if key in states and now[key] != states[key]]


class InputChangedError(ValueError):
    """An input is not what it was when the stage began to read it."""


def content_of(path: Path, identity: str, *, exact: bool) -> str:
    """Return a text that stays the same for as long as the content of an input does.

    Args:
        path: the input.
        identity: its ``manifest.fingerprint``.
        exact: whether a result that was made anew meanwhile is another one even where it is equal:
            in between its place may have held something else.
    """
    if path.is_dir():
        made = hash_file(path / MANIFEST).sha256 if exact and (path / MANIFEST).is_file() else ""
        return f"{identity} {made}"
    return identity


def refuse_changed(
    cfg: StageConfig,
    states: Mapping[str, str],
    contents: Mapping[str, str] | None = None,
    *,
    exact: bool = True,
) -> None:
    """Refuse inputs that are not what they were.

    Args:
        cfg: the stage.
        states: as ``input_states`` gave them before anything was read.
        contents: as ``content_of`` gave them; without, the files have to be untouched.
        exact: as for ``content_of``.

    Raises:
        InputChangedError: names the input.
    """
    paths = read_paths(cfg)
    for key in changed_since(cfg, states):
        why = "its files are other ones now"
        if contents is not None:
            why = _difference(key, Path(paths[key]), contents[key], cfg.workers, exact)
        if why:
            raise InputChangedError(
                f"{key}={paths[key]} changed while it was read ({why}), and a result of both would "
                "be a mixture; leave the inputs alone and run the same command again"
            )


def _difference(key: str, path: Path, before: str, workers: int, exact: bool) -> str:
    """Say how the content of an input differs from before; the text is empty if it does not."""
    try:
        if path.is_dir() and read_manifest(path) is not None:
            open_result(path, "full", key=key, workers=workers)
        now = content_of(path, identity_of(key, path, workers), exact=exact)
    except (ValueError, OSError) as error:
        return str(error)
    return "" if now == before else "it was replaced or edited"


def _state(files: Iterable[str]) -> str:
    """Return the hash over the files of an input: names, inodes, sizes and times."""
    found = []
    for file in files:
        try:
            s = os.stat(file)
        except OSError:
            found.append([file])
            continue
        numbers = [s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns]
        found.append([file, *map(str, numbers)])
    return digest(found)


def _names_of_tokenizer(folder: Path) -> list[str]:
    from nemo_minitron.checkpoint.tokenizer import names_in

    return [*names_in(folder), *(["config.json"] if (folder / "config.json").is_file() else [])]


def read_in_part(key: str, path: Path) -> bool:
    """Whether only some files of an input are read, in whatever folder they lie."""
    return key in _ALSO_READ and path.is_dir()


def files_read(key: str, path: Path) -> list[str]:
    """Return the files of an input: of a result those it lists, else all that are there.

    Paths are strings: a folder that is given by mistake may hold very many files.

    Raises:
        ValueError: the folder holds more files than any model.
    """
    if path.is_dir():
        manifest = result_in(path)
        if read_in_part(key, path):
            names = _names_of_tokenizer(path)
        elif manifest is not None:
            names = [MANIFEST, *manifest.files]
        else:
            names = input_files(path)
            if len(names) > _MOST_FILES and not key.startswith(_MAY_HOLD_MANY):
                raise ValueError(
                    f"{key}={path} holds {len(names):,} files, more than any model; set {key} to "
                    "the folder of the model itself"
                )
        return [os.path.join(path, name) for name in names]
    found = {path} if path.is_file() else set()
    found |= {path.with_name(name) for name in halves(path)}
    return sorted(map(str, found)) or matching(path)
