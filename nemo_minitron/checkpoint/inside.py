"""Keeps what a checkpoint names inside the checkpoint's own folder.

An index, a config or a link of somebody else could name any file of this machine, whose content
would then be read, or copied into a result. A link may lead out of the folder in one case: the
cache of Hugging Face's hub keeps every file under ``blobs`` and fills its folders with links.
"""

from pathlib import Path, PurePosixPath, PureWindowsPath


def is_inside(name: str) -> bool:
    """Whether a name is a plain path below the folder that it is relative to."""
    path = PurePosixPath(name)
    plain = not path.is_absolute() and not PureWindowsPath(name).is_absolute()
    return bool(path.parts) and plain and ".." not in path.parts and "\0" not in name


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file that lies in ``folder``, whether it exists or not.

    Args:
        folder: of a checkpoint.
        name: relative to it, as something in the checkpoint says.

    Raises:
        ValueError: the name, or a link under that name, leads out of the folder.
    """
    if not is_inside(name):
        raise ValueError(
            f"{folder} names the file {name!r}, which does not lie in it; a checkpoint may only "
            "name files of its own: download it again"
        )
    path = folder / name
    if not path.is_symlink() and len(PurePosixPath(name).parts) == 1:
        return path
    target = path.resolve()
    if not target.is_relative_to(folder.resolve()) and not _is_hub_cache(target):
        raise ValueError(
            f"{path} is a link to {target}, out of its folder; if that is the right file, copy it "
            "there"
        )
    return path


_READ = (".json", ".safetensors", ".model", ".txt", ".jinja", ".md", "")
"""Endings of the files of a model's folder that are read; licences often have none."""


def refuse_links_out(folder: Path) -> None:
    """Refuse a folder in which a file that may be read is a link out of it.

    Raises:
        ValueError: names the link and where it leads.
    """
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and path.suffix in _READ and not path.is_dir():
            inside(folder, path.name)


def _is_hub_cache(target: Path) -> bool:
    """``models--OWNER--NAME/blobs/HASH``, where the cache of Hugging Face's hub keeps a file."""
    blobs = target.parent
    return blobs.name == "blobs" and blobs.parent.name.startswith("models--")
