"""Find out the kind of ``data.path``, and read documents from text files.

A *document* is the unit that is shuffled and split: one ``.txt`` file of several, one part of a
single ``.txt`` file between two ``data.document_separator``, or one record of another file.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_minitron.checkpoint.hf_refusals import refuse_pointer
from nemo_minitron.checkpoint.manifest import MANIFEST, matching, result_in
from nemo_minitron.config.training import DataConfig
from nemo_minitron.data.formats import COMPRESSIONS, FORMS, TABLES, form_of, texts_of
from nemo_minitron.data.repeats import Digests
from nemo_minitron.documents import read_json_object

logger = logging.getLogger(__name__)

TEXT = "text"
INDEXED = "indexed"
NPY = "npy"
SFT = "sft"
_SUFFIXES = " ".join(FORMS)
_FORMS = (
    f"a file of one of the forms {_SUFFIXES} (all but {' and '.join(TABLES)} also with one of "
    f"{' '.join(COMPRESSIONS)} behind), a folder of such files or a pattern that names them, a "
    "folder that datasets' save_to_disk wrote, the prefix of a Megatron .bin/.idx pair, or a .npy "
    "of token ids"
)
_NAMES = 10  # of the entries of a folder, in a message
# In a result of ``generate`` these are about its data, and none.
_ABOUT_A_RESULT = (MANIFEST, "metrics.json")
# What the library datasets writes beside its tables.
_OF_DATASETS = ("state.json", "dataset_info.json")
_SPLITS_OF_DATASETS = "dataset_dict.json"


@dataclass(frozen=True)
class Source:
    """The kind of source that ``data.path`` names, and its files."""

    kind: str
    """``text``, ``indexed`` or ``npy``."""
    path: Path
    """The path as given; for ``indexed`` the prefix without ``.bin``/``.idx``."""
    files: tuple[Path, ...]
    """Every file that is read, in reading order."""
    unread: tuple[Path, ...] = ()
    """What else is in a folder of texts, hidden files left out."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.files)


def find_source(path: str | Path) -> Source:
    """Tell what ``data.path`` is, without reading more than the first bytes of its files.

    Raises:
        ValueError: the path does not exist, its form cannot be read, or a file of it is a pointer
            of Git LFS, which would else be taken for a text.
    """
    source = _source(Path(path))
    for file in source.files:
        refuse_pointer(file)
    return source


def _source(path: Path) -> Source:
    if path.is_dir():
        return _dataset(path) if _of_datasets(path) else _folder(path)
    if path.is_file() and form_of(path):
        return Source(TEXT, path, (path,))
    if path.is_file() and path.suffix == ".npy":
        return Source(NPY, path, (path,))
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    pair = (Path(f"{prefix}.bin"), Path(f"{prefix}.idx"))
    found = [file for file in pair if file.is_file()]
    if len(found) == 2:
        return Source(INDEXED, prefix, pair)
    if len(found) == 1:
        missing = next(file for file in pair if file not in found)
        raise ValueError(f"data.path={path}: {found[0]} is there but {missing} is missing")
    if matched := matching(path):
        return _texts(path, [Path(name) for name in matched])
    if path.exists():
        raise ValueError(f"data.path={path} has an unknown form; it must be {_FORMS}")
    raise ValueError(f"data.path={path} does not exist; set data.path to {_FORMS}")


def _of_datasets(path: Path) -> bool:
    """Whether the library datasets wrote a folder."""
    if (path / _SPLITS_OF_DATASETS).is_file():
        splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise ValueError(
            f"data.path={path} holds the splits {', '.join(splits)} of a DatasetDict; set "
            f"data.path to one of them, such as data.path={path / splits[0] if splits else path}"
        )
    return all((path / name).is_file() for name in _OF_DATASETS)


def _dataset(path: Path) -> Source:
    """Return the tables of a folder that ``save_to_disk`` wrote, in its order."""
    state = read_json_object(path / _OF_DATASETS[0])
    try:
        files = tuple(path / entry["filename"] for entry in state["_data_files"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"data.path={path}: state.json names no tables ({error!r})") from error
    if lost := [file for file in files if not file.is_file()] or (not files and [path]):
        raise ValueError(f"data.path={path}: state.json names {lost[0]}, which is no file there")
    return Source(TEXT, path, files)


def _folder(path: Path) -> Source:
    about = _ABOUT_A_RESULT if result_in(path) else ()
    named = (entry for entry in path.iterdir() if entry.name not in about)
    return _texts(path, sorted(entry for entry in named if not entry.name.startswith(".")))


def _texts(path: Path, entries: Sequence[Path]) -> Source:
    """Return the source of the files among ``entries`` that hold texts."""
    files = tuple(entry for entry in entries if form_of(entry) and not entry.is_dir())
    lost = [entry for entry in files if not entry.is_file()]
    if lost:
        raise ValueError(
            f"data.path: file {lost[0]} is not an ordinary file, or a link to one that is not "
            "there; take it out of data.path"
        )
    chosen = set(files)
    others = tuple(entry for entry in entries if entry not in chosen)
    if not files and not path.is_dir():
        raise ValueError(
            f"data.path={path} names no file of the forms {_SUFFIXES}; it names {_named(others)}"
        )
    if not files:
        raise ValueError(
            f"data.path={path} is a folder without a file of the forms {_SUFFIXES} (subfolders "
            f"are not searched); it holds {_named(others) or 'nothing'}; set data.path to a folder "
            "that holds some, or to a pattern such as 'folder/**/*.jsonl'"
        )
    return Source(TEXT, path, files, others)


def _named(entries: Sequence[Path]) -> str:
    """Return the first names, folders with a slash at the end, and how many more there are."""
    names = [f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries[:_NAMES]]
    more = len(entries) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def refuse_npy(source: Source) -> None:
    """Refuse rows of ids in a blend: they are samples already, and are not shuffled or split."""
    if source.kind == NPY:
        raise ValueError(
            f"data.path={source.path} is a .npy, which cannot be blended; write its tokens as a "
            ".bin/.idx pair, or read it on its own"
        )


def warn_unread(source: Source) -> None:
    """Name what lies in a folder of texts and is not read, and files in which nothing is."""
    if source.unread:
        logger.warning(
            "data.path=%s: %d of %d %s are not read: %s; read are files of the forms %s%s",
            source.path,
            len(source.unread),
            len(source.unread) + len(source.files),
            "entries of the folder" if source.path.is_dir() else "files of the pattern",
            _named(source.unread),
            _SUFFIXES,
            " in the folder itself" if source.path.is_dir() else "",
        )
    empty = [file for file in source.files if file.stat().st_size == 0]
    if source.kind == TEXT and empty and len(empty) < len(source.files):
        logger.warning(
            "data.path=%s: %d files are empty: %s", source.path, len(empty), _named(empty)
        )


def read_documents(source: Source, data: DataConfig) -> Iterator[str]:
    """Documents in file order, stripped, empty ones left out.

    Files are streamed: one document is in memory at a time.

    Raises:
        ValueError: a file cannot be read, is not UTF-8 or a record has no text; the line is named.
    """
    if not data.document_separator:
        raise ValueError("data.document_separator must not be empty; the default is two line ends")
    for file in source.files:
        separator = data.document_separator if source.path == file else None
        for part in texts_of(file, data.text_key, separator):
            if text := part.strip():
                yield text


def unique_documents(documents: Iterable[str], dropped: Counter[str]) -> Iterator[str]:
    """Documents without exact repeats, which could otherwise land in two splits.

    Args:
        documents: texts in reading order; the first of equal ones stays.
        dropped: ``dropped["duplicates"]`` counts those left out.
    """
    seen = Digests()
    for text in documents:
        if seen.add(text):
            yield text
        else:
            dropped["duplicates"] += 1


def no_documents(source: Source) -> ValueError:
    """Return the error for a source in which every document is empty."""
    return ValueError(f"data.path={source.path} holds no documents: every text in it is empty")
