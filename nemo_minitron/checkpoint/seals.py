"""Hashes of work that is kept to resume, so that a flipped bit is an error and not another result.

The hashes of ``<folder>/<name>``, a file or a folder, are in ``<folder>.sums/<name>``. They are
written before their file has its name, so what has a name has hashes; work of earlier versions has
none and is taken as it is. Where sealed files become part of a result, its manifest is compared.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from nemo_minitron.checkpoint.manifest import FileEntry, files_in, hash_file, hash_files
from nemo_minitron.documents import read_json_object
from nemo_minitron.runtime.atomic import DRAFT, atomic_file

_SUMS = ".sums"


def seal(path: Path, content: Path) -> None:
    """Write the hashes of what is about to get its name.

    Args:
        path: its name.
        content: where it is now, a file or a folder.
    """
    write_seal(path, entries_of(content))


@contextmanager
def sealed_file(path: Path) -> Iterator[Path]:
    """Yield a draft that becomes ``path`` once its hashes are written: see ``atomic_file``."""
    with atomic_file(path) as draft:
        yield draft
        seal(path, draft)


def entries_of(content: Path, names: Iterable[str] | None = None) -> dict[str, FileEntry]:
    """Size and hash by name: of a file under ``""``, of a folder those of its files, or of some."""
    if not content.is_dir():
        return {"": hash_file(content)}
    return hash_files(content, files_in(content) if names is None else names, 2)


def write_seal(path: Path, entries: Mapping[str, FileEntry]) -> None:
    """Write hashes that are known already; all or nothing."""
    target = _seal_of(path)
    target.parent.mkdir(exist_ok=True)
    with atomic_file(target) as draft:
        draft.write_text(dumped(entries))


def dumped(entries: Mapping[str, FileEntry]) -> str:
    """Return sizes and hashes by name as JSON."""
    return json.dumps({name: asdict(entry) for name, entry in entries.items()})


def loaded(path: Path) -> dict[str, FileEntry]:
    """Read a file that holds what ``dumped`` gave.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    try:
        return {name: FileEntry(**entry) for name, entry in read_json_object(path).items()}
    except TypeError as error:
        raise ValueError(f"{path} holds no sizes and hashes: {error}") from error


def read_seal(path: Path) -> dict[str, FileEntry]:
    """Return the hashes of a file (under ``""``) or of the files of a folder.

    There are none for what an earlier version wrote.

    Raises:
        ValueError: the hashes themselves are damaged.
    """
    return _entries(_seal_of(path)) if _seal_of(path).is_file() else {}


def check_seal(path: Path, remedy: str) -> None:
    """Refuse a file, or a folder with a file, that is not what was written.

    Args:
        path: it.
        remedy: what to do, after "is damaged".

    Raises:
        ValueError: names the file.
    """
    compare(path, read_seal(path), remedy)


def compare(path: Path, entries: Mapping[str, FileEntry], remedy: str) -> None:
    """Do the work of ``check_seal`` with hashes that are already known."""
    for name, entry in entries.items():
        file = path / name if name else path
        if not file.is_file() or hash_file(file) != entry:
            raise ValueError(f"{file} is damaged: it is not what was written; {remedy}")


def sealed_files(work: Path) -> dict[str, FileEntry]:
    """Return all hashes below a working folder by the file they are of, relative to it."""
    found = {}
    for folder in _sums_folders(work):
        for sums in folder.iterdir():
            if sums.name.startswith(".") or sums.name.endswith(DRAFT):
                continue
            path = folder.with_name(folder.name[: -len(_SUMS)]) / sums.name
            for name, entry in _entries(sums).items():
                found[(path / name if name else path).relative_to(work).as_posix()] = entry
    return found


def is_seal(name: str) -> bool:
    """Whether a path inside a working folder is that of hashes."""
    return any(part.endswith(_SUMS) for part in Path(name).parts[:-1])


def remove_seals(work: Path) -> None:
    """Drop the hashes of work that has become a result."""
    for folder in _sums_folders(work):
        shutil.rmtree(folder)


def _sums_folders(work: Path) -> list[Path]:
    return [path for path in work.rglob(f"*{_SUMS}") if path.is_dir()]


def _seal_of(path: Path) -> Path:
    return path.parent.with_name(path.parent.name + _SUMS) / path.name


def _entries(sums: Path) -> dict[str, FileEntry]:
    try:
        return loaded(sums)
    except ValueError:
        raise ValueError(
            f"{sums} is damaged; remove it together with what it is about, and run the same "
            "command again"
        ) from None
