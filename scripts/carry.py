"""Brings what ``make gpu`` needs to a machine that has torch and a GPU but no network.

    python -m scripts.carry pack .carry
    python -m scripts.carry unpack .carry/1 /tmp/minitron     there, with the repository beside it

``pack`` downloads the wheels of requirements/gpu.txt and the quick start's model and text, and
spreads them over the folders ``.carry/1``, ``.carry/2``, ... such that the repository and any one
of them stay below a limit. ``unpack`` takes the loads one after the other: the first has all
wheels, which it installs below ``site``; when the last one is there, ``assets`` appears.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scripts import quickstart_assets

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / "requirements" / "gpu.txt"
ASSETS = ROOT / "requirements" / "quickstart.txt"
INDEX = "index.json"
# Without a wheel of its own; a pure Python package, which builds the same anywhere.
SOURCES = ("antlr4-python3-runtime",)
_PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 24, 17)] + ["manylinux2014_x86_64"]
_PIECE = 8 << 20
_SPARE = 1 << 20  # of every load, for what surrounds the files on their way


@dataclass(frozen=True)
class Piece:
    """Part of a file."""

    path: Path
    start: int
    stop: int

    @property
    def name(self) -> str:
        """File name in a load."""
        return f"{self.path.name}.{self.start:012}"


def _pip(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)


def download(wheels: Path, assets: Path) -> None:
    """Fetch the wheels for Python 3.12 on x86-64 Linux, and the packages of the quick start."""
    lines = [line for line in WHEELS.read_text().splitlines() if line and line[0] != "#"]
    built = [line for line in lines if line.startswith(SOURCES)]
    taken = [line for line in lines if line not in built]
    where = ["--python-version", "3.12", "--implementation", "cp"]
    where += [word for name in _PLATFORMS for word in ("--platform", name)]
    _pip("download", "-q", "--no-deps", "--only-binary=:all:", *where, "-d", wheels, *taken)
    _pip("wheel", "-q", "--no-deps", "-w", wheels, *built)
    _pip("download", "-q", "--no-deps", "--require-hashes", "-r", ASSETS, "-d", assets)


def repository_bytes() -> int:
    """Size of the files that git tracks or would track."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"]
    names = subprocess.run(listed, check=True, capture_output=True, text=True).stdout
    paths = [ROOT / name for name in names.split("\0") if name]
    return sum(path.stat().st_size for path in paths if path.is_file())


def _pieces(files: list[Path]) -> Iterator[Piece]:
    for path in files:
        size = path.stat().st_size
        for start in range(0, size, _PIECE):
            yield Piece(path, start, min(start + _PIECE, size))


def spread(pieces: list[Piece], room: int) -> list[list[Piece]]:
    """Pieces in order, as many to a load as there is room for."""
    loads: list[list[Piece]] = [[]]
    left = room
    for piece in pieces:
        size = piece.stop - piece.start
        if size > left and loads[-1]:
            loads.append([])
            left = room
        loads[-1].append(piece)
        left -= size
    return loads


def pack(folder: Path, limit: int) -> list[int]:
    """Fill ``folder/1``, ``folder/2``, ...; the folder is replaced.

    Args:
        folder: one that git ignores.
        limit: bytes of the repository and one load together.

    Returns:
        Bytes of each load.

    Raises:
        SystemExit: the wheels alone do not fit into the first load.
    """
    room = limit - repository_bytes() - _SPARE
    with tempfile.TemporaryDirectory() as work:
        wheels, assets = Path(work) / "wheels", Path(work) / "assets"
        download(wheels, assets)
        first, rest = sorted(wheels.iterdir()), sorted(assets.iterdir(), key=_size)
        if sum(map(_size, first)) > room:
            raise SystemExit(f"the wheels do not fit into {room:,} bytes")
        loads = spread([*_pieces(first), *_pieces(rest)], room)
        shutil.rmtree(folder, ignore_errors=True)
        sizes = {"wheels": first, "assets": rest}
        index = {kind: {p.name: _size(p) for p in files} for kind, files in sizes.items()}
        return [_write(load, folder / str(n), index) for n, load in enumerate(loads, start=1)]


def _size(path: Path) -> int:
    return path.stat().st_size


def _write(load: list[Piece], folder: Path, index: dict[str, dict[str, int]]) -> int:
    folder.mkdir(parents=True)
    (folder / INDEX).write_text(json.dumps(index))
    for piece in load:
        with piece.path.open("rb") as source:
            source.seek(piece.start)
            (folder / piece.name).write_bytes(source.read(piece.stop - piece.start))
    return sum(map(_size, folder.iterdir()))


def _joined(store: Path, names: dict[str, int], target: Path) -> bool:
    """Put files together; False where a piece is still missing."""
    target.mkdir(parents=True, exist_ok=True)
    whole = True
    for name, size in names.items():
        pieces = sorted(store.glob(f"{name}.????????????"))
        if sum(map(_size, pieces)) != size:
            whole = False
            continue
        with (target / name).open("wb") as out:
            for piece in pieces:
                out.write(piece.read_bytes())
    return whole


def unpack(load: Path, target: Path) -> list[str]:
    """Take a load over, and install and unpack what is whole now. Needs no network.

    Returns:
        What is ready: ``site``, ``assets``.
    """
    store = target / "pieces"
    store.mkdir(parents=True, exist_ok=True)
    for path in load.iterdir():
        shutil.copy(path, store / path.name)
    index = json.loads((store / INDEX).read_text())
    ready = []
    if (target / "site").exists() or _install(store, index["wheels"], target):
        ready.append("site")
    with tempfile.TemporaryDirectory(dir=target) as work:
        if (target / "assets").exists():
            ready.append("assets")
        elif _joined(store, index["assets"], Path(work)):
            (target / "assets.partial").mkdir(exist_ok=True)
            quickstart_assets.unpack(Path(work), target / "assets.partial")
            (target / "assets.partial").rename(target / "assets")
            ready.append("assets")
    return ready


def _install(store: Path, names: dict[str, int], target: Path) -> bool:
    with tempfile.TemporaryDirectory(dir=target) as work:
        if not _joined(store, names, Path(work)):
            return False
        found = sorted(Path(work).iterdir())
        how = ("--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "-q")
        _pip("install", *how, "--target", target / "site", *found)
    return True


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("folder", type=Path)
    packing.add_argument("--limit-mib", type=float, default=64, help="repository and one load")
    unpacking = commands.add_parser("unpack")
    unpacking.add_argument("load", type=Path)
    unpacking.add_argument("target", type=Path)
    args = parser.parse_args()
    if args.command == "pack":
        for number, size in enumerate(pack(args.folder, int(args.limit_mib * 2**20)), start=1):
            sys.stdout.write(f"{args.folder / str(number)}: {size / 2**20:.1f} MiB\n")
    else:
        ready = unpack(args.load, args.target)
        sys.stdout.write(f"{args.target}: {', '.join(ready) or 'nothing'} ready\n")


if __name__ == "__main__":
    main()
