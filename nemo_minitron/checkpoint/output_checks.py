"""Check the place that a stage will write to; only files of a stage are ever moved or removed."""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemo_minitron.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    files_in,
    matching,
    read_manifest,
    result_in,
)
from nemo_minitron.checkpoint.ownership import OWNER, is_ours, not_ours, owner_files
from nemo_minitron.checkpoint.watched import files_read, read_in_part, read_paths
from nemo_minitron.config.stages import StageConfig

REPLACED = "replaced.json"
"""Mark in a result that waits under ``<output_dir>.old``: a stage put it there."""
# As ``runtime.console.log_file`` writes it, which is not Python's default.
_LOG_LINE = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+( rank \d+)? [\w.]+: ")
_NAMED = 5  # of the user's files in a message


def partial_of(output_dir: Path) -> Path:
    """Return the folder in which a stage works until its result is complete."""
    return output_dir.with_name(output_dir.name + ".partial")


def old_of(output_dir: Path) -> Path:
    """Return the folder that holds a replaced result until the new one is in place."""
    return output_dir.with_name(output_dir.name + ".old")


def log_of(cfg: StageConfig) -> Path:
    """Return the log file of a stage: beside the name that was given, wherever links lead."""
    return Path(f"{Path(cfg.output_dir)}.log")


def check_output(cfg: StageConfig, stage: str) -> None:
    """Refuse an output folder that cannot take the result. Reads only; cheap; any rank.

    Raises:
        ValueError: a complete result is there and overwrite is false, something else is there (also
            under ``.partial``, ``.old`` and ``.log``), somebody added files to the result; the
            folder is, holds or lies in one of the inputs; the cache of data lies in a result.
    """
    output = Path(cfg.output_dir).resolve()
    check_cache(cfg, [output, partial_of(output), old_of(output)])
    check_apart(cfg, output)
    check_neighbours(cfg, output)
    check_existing(cfg, stage, output)
    parent = next(p for p in output.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        why = "is not writable" if parent.is_dir() else "is not a folder"
        raise ValueError(
            f"output_dir={cfg.output_dir} cannot be made: {parent} {why}; set another output_dir"
        )


def check_existing(cfg: StageConfig, stage: str, output: Path) -> None:
    """Refuse what stands in the place of the result, unless it is a result to be replaced.

    Raises:
        ValueError: says what is there and what to do.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    try:
        manifest = read_manifest(output) if output.is_dir() else None
    except ValueError:
        if was_a_result(output) and not cfg.overwrite:
            raise
        if was_a_result(output):
            return check_additions(output, None)  # what replaces it is this very command
        manifest = None
    if manifest is None:
        raise ValueError(
            f"output_dir={cfg.output_dir} exists and is not a result (no {MANIFEST}); it is never "
            "replaced: set another output_dir, or remove it yourself"
        )
    if not cfg.overwrite:
        raise ValueError(
            f"output_dir={cfg.output_dir} already holds a complete result; "
            "set overwrite=true or another output_dir"
        )
    if manifest.stage != stage:
        raise ValueError(
            f"output_dir={cfg.output_dir} holds a result of stage '{manifest.stage}', which "
            f"'{stage}' does not overwrite; set another output_dir"
        )
    check_additions(output, manifest)


def check_apart(cfg: StageConfig, output: Path) -> None:
    """Refuse inputs that are, hold or lie in what the stage writes, moves or removes.

    Raises:
        ValueError: names both.
    """
    places = [output, partial_of(output), old_of(output)]
    for key, value in read_paths(cfg).items():
        for path in _real_places(key, Path(value)):
            for place in places:
                if _within(path, place):
                    by = "" if place == output else f", by working in {place},"
                    raise ValueError(
                        f"output_dir={cfg.output_dir}{by} would replace its own input "
                        f"{key}={value}; set another output_dir"
                    )
                if path.is_dir() and _within(place, path):
                    raise ValueError(
                        f"output_dir={cfg.output_dir} lies inside its own input {key}={value}; "
                        "set another output_dir"
                    )
            if _same(path, log_of(cfg)):
                raise ValueError(
                    f"{key}={value} is the file that the log of output_dir={cfg.output_dir} would "
                    "be written to; set another output_dir"
                )


def _real_places(key: str, path: Path) -> Iterator[Path]:
    """An input, and what the links in it lead to."""
    yield path.resolve()
    if not path.exists():  # the prefix of a pair
        yield from (Path(f"{path}{end}").resolve() for end in (".bin", ".idx"))
        yield from (Path(file).resolve() for file in matching(path))
    if read_in_part(key, path):
        yield from (Path(file).resolve() for file in files_read(key, path))
        return
    seen: set[Path] = set()
    folders = [path] if path.is_dir() else []
    while folders:
        for link in _links_below(folders.pop()):
            place = link.resolve()
            if place not in seen:
                seen.add(place)
                yield place
                folders += [place] if place.is_dir() else []


def _links_below(folder: Path) -> Iterator[Path]:
    """Symbolic links in a folder and its folders.

    A folder may hold very many files; nothing is asked about those that are no links.
    """
    waiting = [str(folder)]
    while waiting:
        with contextlib.suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    yield Path(entry.path)
                elif entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)


def _within(path: Path, folder: Path) -> bool:
    """Whether ``path`` is ``folder`` or lies in it, by whatever names."""
    return any(_same(one, folder) for one in (path, *path.parents))


def _same(one: Path, other: Path) -> bool:
    try:
        return one == other or os.path.samefile(one, other)
    except OSError:
        return False


def check_neighbours(cfg: StageConfig, output: Path) -> None:
    """Refuse a ``.partial``, ``.old`` or ``.log`` beside the output that no stage wrote.

    Raises:
        ValueError: names it.
    """
    work, old, log = partial_of(output), old_of(output), log_of(cfg)
    if os.path.lexists(work) and not (is_ours(work) or left_by_an_earlier_version(output)):
        raise ValueError(not_ours(work))
    if os.path.lexists(old) and not (was_replaced(old) or left_by_an_earlier_version(output)):
        raise ValueError(
            f"{old} was not put there by minitron, and is where this stage would keep the result "
            "that it replaces; it is never touched: move it away, or set another output_dir (if a "
            f"run of an earlier version was killed while it replaced a result: mv {old} {output})"
        )
    if os.path.lexists(log) and not _is_log(log):
        raise ValueError(
            f"{log} was not written by minitron, and is where the log of this stage would go; it "
            "is never touched: move it away, or set another output_dir"
        )


def was_replaced(old: Path) -> bool:
    """Whether a stage moved this result away, to put another in its place."""
    return old.is_dir() and not old.is_symlink() and (old / REPLACED).is_file()


def left_by_an_earlier_version(output: Path) -> bool:
    """Whether a run of an earlier version was killed between its two renames.

    It left nothing under ``output``, the old result under ``.old`` and the new one, complete, under
    ``.partial``, both of one stage.
    """
    if os.path.lexists(output):
        return False
    new, before = (result_in(folder) for folder in (partial_of(output), old_of(output)))
    return new is not None and before is not None and new.stage == before.stage


def _is_log(path: Path) -> bool:
    """Whether a file begins as our logs do; an empty one does."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        start = file.read(1000)
    return not start or _LOG_LINE.match(start) is not None


def check_additions(output: Path, manifest: Manifest | None) -> None:
    """Refuse to replace a result to which somebody has added files.

    Args:
        output: the result.
        manifest: what it holds; None where the manifest is damaged.

    Raises:
        ValueError: names the files.
    """
    names = added_files(output, manifest)
    if names:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        raise ValueError(
            f"output_dir={output} holds files that no stage wrote ({', '.join(names[:_NAMED])}"
            f"{more}), and overwrite=true would remove them; move them away, or set another "
            "output_dir"
        )


def added_files(folder: Path, manifest: Manifest | None) -> list[str]:
    """Return files of a result that its manifest does not list."""
    names = files_in(folder)
    ours = {MANIFEST, REPLACED, *owner_files(names)}
    if manifest is not None:
        ours |= manifest.files.keys()
    else:  # damaged: what its text still names
        text = _manifest_text(folder)
        ours |= {name for name in names if f'"{name}"' in text}
    return [name for name in names if name not in ours and not Path(name).name.startswith(".nfs")]


def was_a_result(folder: Path) -> bool:
    """Whether a manifest that cannot be read is, or was, that of a stage."""
    return '"config_hash": ' in _manifest_text(folder)


def _manifest_text(folder: Path) -> str:
    try:
        return (folder / MANIFEST).read_text(errors="replace")
    except OSError:
        return ""


def put_back(output: Path) -> None:
    """Put back the result of a job that was killed between the two renames of a replacement.

    The caller owns the working folder, so no such replacement is under way.
    """
    if was_replaced(old_of(output)) and not os.path.lexists(output):
        old_of(output).rename(output)
        (output / REPLACED).unlink()


def finish_for_an_earlier_version(output: Path) -> None:
    """Do the second rename of a replacement for a job of an earlier version that was killed.

    Those wrote no ``owner.json``. A folder that has one is resumed, or its job is still alive.
    """
    if left_by_an_earlier_version(output) and not (partial_of(output) / OWNER).exists():
        (old_of(output) / REPLACED).touch()
        with contextlib.suppress(OSError):  # another process was first
            partial_of(output).rename(output)


def check_cache(cfg: StageConfig, outputs: Sequence[Path]) -> None:
    """Refuse tokenised data in a result, which is replaced as a whole and whose files are hashed.

    Args:
        cfg: of a stage, with ``data`` or without.
        outputs: folders of results to come, absolute.

    Raises:
        ValueError: ``data.cache_dir`` lies in one of them, in an input, or in a result that is
            there.
    """
    cache = getattr(getattr(cfg, "data", None), "cache_dir", None)
    if cache is None:
        return
    path = Path(cache).resolve()
    for key, value in read_paths(cfg).items():
        if Path(value).resolve() in (path, *path.parents):
            raise ValueError(
                f"data.cache_dir={cache} lies in the input {key}={value}; set it to a folder of "
                "its own, or leave it out: then it is beside the results"
            )
    for folder in (path, *path.parents):
        if folder in outputs or _is_result_of_a_stage(folder):
            raise ValueError(
                f"data.cache_dir={cache} lies in the result folder {folder}; set it to a folder of "
                "its own, or leave it out: then it is beside the results"
            )


def _is_result_of_a_stage(folder: Path) -> bool:
    """Whether a result exists; that of a pipeline is just the folder around its results."""
    manifest = result_in(folder)
    return manifest is not None and manifest.stage != "pipeline"


def is_export(checkpoint: str | Path) -> bool:
    """Whether a result folder holds a Hugging Face model instead of a ``checkpoint/``."""
    folder = Path(checkpoint)
    return (folder / "config.json").is_file() and not (folder / "checkpoint").exists()
