"""Cache folders that several ranks and several runs share."""

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from nemo_minitron.checkpoint.seals import compare, dumped, entries_of, loaded
from nemo_minitron.config.training import DataConfig
from nemo_minitron.runtime.atomic import rename_folder

_SUMS = "sha256.json"


def cache_folder(data: DataConfig, output_dir: str | Path) -> Path:
    """Return the folder of tokenised data: ``data.cache_dir``, or one beside the results."""
    if data.cache_dir is not None:
        return Path(data.cache_dir).absolute()
    return Path(output_dir).absolute().parent / ".data-cache"


def build_once(
    folder: Path,
    fill: Callable[[Path], None],
    rank: int = 0,
    barrier: Callable[[], object] = lambda: None,
) -> None:
    """Make a cache folder unless it is there; every rank calls this.

    Rank 0 fills a working folder and renames it, so a folder under its final name is complete,
    whatever was killed when. Of two runs that fill the same folder the first to end wins. What is
    there is read and compared with the hashes that were written with it; folders of earlier
    versions have none.

    Args:
        folder: the final name; it must name everything its content depends on.
        fill: writes the content into the folder it is given. Called on rank 0 only.
        rank: global rank of this process.
        barrier: waits for all ranks.

    Raises:
        ValueError: a file of the folder is damaged.
        RuntimeError: on another rank than 0 when rank 0 failed or its files cannot be seen.
    """
    try:
        if rank == 0 and folder.is_dir():
            _check_content(folder)
        elif rank == 0:
            _fill_and_rename(folder, fill)
    finally:
        barrier()
    if not folder.is_dir():
        raise RuntimeError(
            f"rank {rank} finds no {folder}: rank 0 failed (see its message), or data.cache_dir "
            "is not on storage that all nodes share"
        )


def build_for_all(folder: Path, fill: Callable[[Path], None]) -> None:
    """Call ``build_once`` on every rank of the process group, or alone where there is none."""
    import torch.distributed as dist

    if dist.is_initialized():
        from nemo_minitron.runtime.worlds import barrier

        build_once(folder, fill, dist.get_rank(), barrier)
    else:
        build_once(folder, fill)


def _fill_and_rename(folder: Path, fill: Callable[[Path], None]) -> None:
    working = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    working.mkdir(parents=True)
    try:
        fill(working)
        (working / _SUMS).write_text(dumped(entries_of(working)))
        try:
            rename_folder(working, folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(working, ignore_errors=True)


def _check_content(folder: Path) -> None:
    """Refuse a cache of which a bit has flipped, so that it is not taken for other data."""
    sums = folder / _SUMS
    if not sums.is_file():
        return
    remedy = f"remove {folder}, then it is made again"
    try:
        entries = loaded(sums)
    except ValueError:
        raise ValueError(f"{sums} is damaged; {remedy}") from None
    compare(folder, entries, remedy)
