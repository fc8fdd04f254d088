"""``manifest.json``: what a complete result folder holds, what made it and from what."""

import contextlib
import glob
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import nemo_minitron
from nemo_minitron.checkpoint.inside import is_inside
from nemo_minitron.config.identity import config_values
from nemo_minitron.config.schema import flatten
from nemo_minitron.config.stages import StageConfig
from nemo_minitron.documents import JsonObject, json_value, read_yaml_mapping

MANIFEST = "manifest.json"
CONFIG = ".hydra/config.yaml"
_TOLD = ("metrics.json", "checkpoint/lineage.json")
_CARD = "README.md"
"""Files that tell about a result; what it is does not depend on them."""
_BLOCK = 1 << 20
PAIR = (".bin", ".idx")
_VERSIONS = ("torch", "megatron-core", "nemo_toolkit", "transformers", "lm_eval")


@dataclass(frozen=True)
class FileEntry:
    """One output file: bytes and sha256 (hex)."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A complete result.

    Attributes:
        folder: where it was read from; not stored.
        stage: the stage that wrote it.
        config_hash: see ``config_hash``.
        inputs: config key -> identity of what it named (see ``fingerprint``).
        files: path inside the folder -> entry; every file but the manifest.
        versions: package -> version.
        created: UTC time, ISO 8601.
        counts_card: whether the model card of an export is part of the identity, as it was in the
            first versions; not stored.
    """

    folder: Path
    stage: str
    config_hash: str
    inputs: dict[str, str]
    files: dict[str, FileEntry]
    versions: dict[str, str]
    created: str
    counts_card: bool = False

    @property
    def id(self) -> str:
        """Identity: a function of the stage, its config, its inputs and the files it made.

        Times and versions do not enter, nor does ``metrics.json`` (it holds timings), a log,
        ``lineage.json`` or a model card (they hold names of folders), so a stage run twice on the
        same inputs keeps its identity and what depends on it stays current.
        """
        told = _TOLD if self.counts_card else (*_TOLD, _CARD)
        content = {n: [e.size, e.sha256] for n, e in self.files.items() if _is_content(n, told)}
        return digest([self.stage, self.config_hash, self.inputs, content])

    def save(self, folder: Path) -> None:
        """Write ``manifest.json`` into ``folder`` and flush it to disk."""
        values = {"complete": True, "id": self.id, **asdict(self)}
        del values["folder"], values["counts_card"]
        with open(folder / MANIFEST, "w") as file:
            json.dump(values, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())


def _is_content(name: str, told: tuple[str, ...]) -> bool:
    return name not in told and name.split("/")[0] not in (".hydra", "logs")


def digest(value: object) -> str:
    """Return sha256 (hex) of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def config_hash(cfg: StageConfig) -> str:
    """Return the hash of everything in a stage config that decides its result, its inputs apart."""
    return digest(config_values(cfg))


def stored_config(manifest: Manifest) -> JsonObject | None:
    """The flat config that made a result; None where it was not written by a stage of ours."""
    if CONFIG not in manifest.files:
        return None
    return flatten(read_yaml_mapping(manifest.folder / CONFIG))


def versions() -> dict[str, str]:
    """Return the installed versions of this package and of what computes with it."""
    found = {"nemo_minitron": nemo_minitron.__version__}
    for name in _VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    """Return the UTC time, ISO 8601, whole seconds."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def files_in(folder: Path) -> list[str]:
    """Return relative POSIX paths of all files under ``folder``, sorted.

    What a link to a folder leads to is listed once, so links in a circle have an end.
    """
    found, waiting, linked = [], [""], set()
    while waiting:
        prefix = waiting.pop()
        with contextlib.suppress(OSError), os.scandir(os.path.join(folder, prefix)) as entries:
            for entry in entries:
                name = prefix + entry.name
                if not entry.is_dir():
                    found.append(name)
                    continue
                place = os.path.realpath(entry.path) if entry.is_symlink() else None
                if place not in linked:
                    waiting.append(f"{name}/")
                if place:
                    linked.add(place)
    return sorted(found)


def input_files(folder: Path, hidden: bool = False) -> list[str]:
    """List ``files_in`` without the files that no stage reads.

    That is the bytecode that Python puts beside the modules it imports, and what begins with a dot,
    such as the notes of programs that download models; ``.metadata`` is a part of a checkpoint.
    """
    left_out = ("__pycache__",) if hidden else ("__pycache__", ".")
    names = {name: {*name.split("/")} - {".metadata"} for name in files_in(folder)}
    return [n for n, parts in names.items() if not any(p.startswith(left_out) for p in parts)]


def has_older_words(path: str | Path) -> bool:
    """Whether ``fingerprint`` may say something else of an input than in earlier versions."""
    path = Path(path)
    if path.is_dir() and not (path / MANIFEST).is_file():
        return input_files(path) != input_files(path, hidden=True)
    return path.suffix in PAIR and len(halves(path)) == len(PAIR)


def matching(path: str | Path) -> list[str]:
    """Return the sorted files that a pattern (``/data/**/*.jsonl``) names; none for other paths."""
    if not glob.has_magic(str(path)) or os.path.exists(path):
        return []
    return sorted(filter(os.path.isfile, glob.glob(str(path), recursive=True)))


def hash_file(path: Path, *, flush: bool = False) -> FileEntry:
    """Return the size and sha256 of a file; with ``flush`` it is also forced to disk."""
    sha, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            sha.update(block)  # releases the GIL, so threads hash in parallel
            size += len(block)
        if flush:
            os.fsync(file.fileno())
    return FileEntry(size, sha.hexdigest())


def hash_files(
    folder: Path, names: Iterable[str], workers: int, *, flush: bool = False
) -> dict[str, FileEntry]:
    """Hash files of ``folder`` in ``workers`` threads."""
    names = list(names)
    with ThreadPoolExecutor(max_workers=workers) as pool:
        entries = pool.map(lambda name: hash_file(folder / name, flush=flush), names)
        return dict(zip(names, entries, strict=True))


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a folder, or None if it is missing or does not say "complete".

    Raises:
        ValueError: the manifest was damaged or edited.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        values = json_value(path.read_bytes())
        complete, identity = values.pop("complete"), values.pop("id")
        values["files"] = {name: FileEntry(**entry) for name, entry in values["files"].items()}
        manifest = Manifest(folder=folder, **values)
        _check_names(manifest)
        manifest = replace(manifest, counts_card=manifest.id != identity)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); run the stage that made it again") from None
    if manifest.id != identity:
        raise ValueError(f"{path} was changed; run the stage that made it again")
    return manifest if complete is True else None


def result_in(folder: Path) -> Manifest | None:
    """Return the manifest of a complete result, or None if the folder is not one.

    For those who only ask what a folder is; a stage that reads it calls ``open_result``.
    """
    try:
        return read_manifest(folder)
    except ValueError:  # damaged, or the manifest.json of another program
        return None


def _check_names(manifest: Manifest) -> None:
    """Refuse a manifest that names files outside its folder, or is of other types than ours."""
    outside = [name for name in manifest.files if not is_inside(name)]
    if outside:
        raise ValueError(f"it names {outside[0]!r}, which does not lie in the folder")
    mappings = (manifest.inputs, manifest.versions)
    texts = [manifest.stage, manifest.config_hash, manifest.created]
    texts += [text for mapping in mappings for pair in mapping.items() for text in pair]
    texts += [entry.sha256 for entry in manifest.files.values()]
    sizes = [entry.size for entry in manifest.files.values()]
    if not all(isinstance(text, str) for text in texts) or not all(
        isinstance(size, int) for size in sizes
    ):
        raise ValueError("it holds values of other types than a stage writes")


def open_result(
    path: str | Path,
    verify: str = "full",
    *,
    key: str = "",
    needs: str | None = None,
    workers: int = 2,
) -> Manifest:
    """Check an input folder against its manifest.

    Args:
        path: result folder of an earlier stage.
        verify: ``full`` hashes every file, ``size`` compares sizes only.
        key: config key that named the folder, for messages.
        needs: a file the result must hold, e.g. ``checkpoint/model.yaml``.
        workers: hashing threads.

    Raises:
        ValueError: not a complete result, or a file is missing, truncated or changed.
    """
    folder = Path(path)
    named = f"{key}={path}" if key else str(path)
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None:
        raise ValueError(_not_a_result(folder, named))
    if needs is not None and needs not in manifest.files:
        raise ValueError(
            f"{named} is a result of stage '{manifest.stage}' without {needs}; {_HINT}"
        )
    problem = _damage(manifest, verify, workers)
    if problem:
        raise ValueError(
            f"{named} was damaged or edited after it was written: {problem}; restore the file, or "
            f"run '{manifest.stage}' again with overwrite=true"
        )
    return manifest


_HINT = "give the folder that the right stage wrote as its output_dir"


def _not_a_result(folder: Path, named: str) -> str:
    if not folder.exists():
        return f"{named} does not exist; {_HINT}"
    whole = read_manifest(folder.parent)
    if whole is not None and any(name.startswith(f"{folder.name}/") for name in whole.files):
        return f"{named} is a part of a result; give the result folder {folder.parent} itself"
    return (
        f"{named} is not a complete result ({MANIFEST} is missing): the stage that wrote it did "
        f"not end well, or it is something else; {_HINT}, or run that stage again"
    )


def _damage(manifest: Manifest, verify: str, workers: int) -> str | None:
    for name, entry in manifest.files.items():
        file = manifest.folder / name
        if not file.is_file():
            return f"{name} is missing"
        size = file.stat().st_size
        if size != entry.size:
            word = "truncated" if size < entry.size else "changed"
            return f"{name} is {word} ({size} bytes, {entry.size} when it was written)"
    if verify == "full":
        for name, entry in hash_files(manifest.folder, manifest.files, workers).items():
            if entry != manifest.files[name]:
                return f"{name} is changed (its sha256 differs)"
    return None


def fingerprint(path: str | Path, workers: int = 2, *, earlier: bool = False) -> str:
    """Return identity of an input: the manifest id of a result folder, else a hash of the content.

    Args:
        path: result folder, data file, data folder, a Megatron .bin/.idx pair (one of its files, or
            their prefix), or a pattern that names files.
        workers: hashing threads.
        earlier: as earlier versions did, which counted hidden files, and of a pair that was given
            by one of its files the other one not.

    Raises:
        ValueError: there is nothing at ``path``.
    """
    path = Path(path)
    pair = halves(path)
    if path.suffix in PAIR and len(pair) == len(PAIR) and not earlier:
        folder, names = path.parent, pair
    elif path.is_file():
        return "sha256:" + hash_file(path).sha256
    elif path.is_dir():
        manifest = read_manifest(path)
        if manifest is not None:
            return f"{manifest.stage}:{manifest.id}"
        folder, names = path, input_files(path, hidden=earlier)
    elif matched := matching(path):
        folder, names = Path(), matched
    else:
        folder, names = path.parent, pair
    if not names:
        raise ValueError(f"{path} does not exist or is empty")
    hashes = {name: e.sha256 for name, e in hash_files(folder, names, workers).items()}
    return "sha256:" + digest(hashes if path.is_dir() else list(hashes.values()))


def halves(path: Path) -> list[str]:
    """Return the files that exist of the pair which its prefix, or one of the two, names."""
    prefix = path.name.removesuffix(path.suffix) if path.suffix in PAIR else path.name
    return [prefix + end for end in PAIR if (path.parent / (prefix + end)).is_file()]
