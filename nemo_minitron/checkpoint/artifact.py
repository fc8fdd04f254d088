"""Result folders: written beside their final place, complete when they appear there.

``<output_dir>.partial`` is where a stage works, ``<output_dir>.old`` where a result that is being
replaced waits until the new one stands.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from omegaconf import OmegaConf

from nemo_minitron.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    config_hash,
    config_values,
    files_in,
    fingerprint,
    hash_files,
    input_paths,
    now,
    open_result,
    read_manifest,
    versions,
)
from nemo_minitron.config.stages import StageConfig
from nemo_minitron.data.cache import check_cache
from nemo_minitron.documents import read_json

__all__ = ["Manifest", "Ranks", "check_output", "fingerprint", "open_result", "output_folder"]

log = logging.getLogger(__name__)

OWNER = "partial.json"


@dataclass(frozen=True)
class Ranks:
    """Who this process is among those that write one result together.

    Attributes:
        rank: global rank; rank 0 alone creates, renames and removes folders.
        barrier: waits for all ranks.
    """

    rank: int = 0
    barrier: Callable[[], None] = lambda: None


def partial_of(output_dir: Path) -> Path:
    """Where a stage works before its result is complete."""
    return output_dir.with_name(output_dir.name + ".partial")


def old_of(output_dir: Path) -> Path:
    """Where a replaced result waits until the new one stands."""
    return output_dir.with_name(output_dir.name + ".old")


def check_output(cfg: StageConfig, stage: str) -> None:
    """Refuse an output folder that cannot take the result. Reads only; cheap; any rank.

    Raises:
        ValueError: a complete result is there and overwrite is false, something else is there, or
            the folder is (or holds) one of the inputs; the cache of data lies in a result.
    """
    output = Path(cfg.output_dir).resolve()
    check_cache(cfg, [output])
    for key, value in input_paths(cfg).items():
        path = Path(value).resolve()
        if path == output or output in path.parents:
            raise ValueError(
                f"output_dir={cfg.output_dir} would replace its own input {key}={value}; "
                "set another output_dir"
            )
    _check_existing(cfg, stage, output)
    parent = next(p for p in output.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"output_dir={cfg.output_dir} cannot be made: {parent} is not writable")


def _check_existing(cfg: StageConfig, stage: str, output: Path) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    try:
        manifest = read_manifest(output) if output.is_dir() else None
    except ValueError:
        if cfg.overwrite:
            return  # damaged, and what replaces it is this very command
        raise
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


@contextmanager
def output_folder(
    cfg: StageConfig,
    stage: str,
    inputs: Mapping[str, str | Path | Manifest] | None = None,
    *,
    resumable: bool = False,
    may_change: tuple[str, ...] = (),
    ranks: Ranks | None = None,
) -> Iterator[Path]:
    """Give a stage a folder to write into, and make it a result when the body ends well.

    On success ``.hydra/`` is written, every file is hashed and flushed, ``manifest.json`` follows
    last and the folder is renamed to ``output_dir``. On any failure an old result still stands, and
    the working folder is removed unless it is ``resumable`` and holds anything.

    Args:
        cfg: the stage's config.
        stage: its name.
        inputs: config key -> path or manifest of what the result is made from; by default the
            inputs that ``cfg`` names (``config.schema.INPUT_KEYS``).
        resumable: keep the working folder on failure and find it again next time, if config and
            inputs are the same (with other ones it is refused, or cleared under overwrite=true).
        may_change: keys (or beginnings of keys) that may differ then; the stage copes with it.
        ranks: for several ranks that write one result; every rank enters and leaves together.

    Yields:
        The working folder.

    Raises:
        ValueError: as ``check_output``; or another process is writing the same result.
    """
    ranks = ranks or Ranks()
    output = Path(cfg.output_dir).resolve()
    work = partial_of(output)
    mine = False  # a folder that is refused is somebody else's
    try:  # a stop signal may come as soon as the folder exists
        if ranks.rank == 0:
            _open_work(cfg, stage, inputs, output, resumable, may_change)
            mine = True
        ranks.barrier()
        yield work
        ranks.barrier()
        if ranks.rank == 0:
            _complete(cfg, stage, work, output)
    except BaseException as error:
        if mine:
            _abandon(work, output, error, keep=resumable and files_in(work) != [OWNER])
        raise
    ranks.barrier()


def _open_work(
    cfg: StageConfig,
    stage: str,
    inputs: Mapping[str, str | Path | Manifest] | None,
    output: Path,
    resumable: bool,
    may_change: tuple[str, ...],
) -> None:
    """Create or re-open the working folder and sign it."""
    old = old_of(output)
    if old.exists() and not output.exists():
        old.rename(output)  # a job was killed between the two renames of ``_replace``
    check_output(cfg, stage)
    work = partial_of(output)
    owner = _read_owner(work)
    _refuse_live_owner(work, owner)
    named = input_paths(cfg) if inputs is None else inputs
    mine = {
        "stage": stage,
        "config": config_values(cfg),
        "inputs": {key: _identity(value, cfg.workers) for key, value in named.items()},
        **_signature(),
    }
    if work.exists() and not (resumable and _resumes(cfg, work, owner, mine, may_change)):
        log.info("removing %s, left by a job that did not end well", work)
        shutil.rmtree(work)
    _sign(work, mine)


def _sign(work: Path, owner: dict[str, Any]) -> None:
    """Create the working folder if need be and say whose it is; all or nothing."""
    made = not work.exists()
    draft = work / f"{OWNER}.draft"
    try:
        work.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(owner, indent=1))
        draft.replace(work / OWNER)
    except BaseException:  # disk full, a signal; what an earlier run left to resume stays resumable
        shutil.rmtree(work, ignore_errors=True) if made else draft.unlink(missing_ok=True)
        raise


def _identity(value: str | Path | Manifest, workers: int) -> str:
    if isinstance(value, Manifest):
        return f"{value.stage}:{value.id}"
    return fingerprint(value, workers)


def _signature() -> dict[str, Any]:
    """This process: start time too, since process ids come round again."""
    process = psutil.Process()
    return {"host": socket.gethostname(), "pid": process.pid, "started": process.create_time()}


def _read_owner(work: Path) -> dict[str, Any]:
    try:
        owner = read_json(work / OWNER)
    except (OSError, ValueError):  # killed before it was written whole
        return {}
    return owner if isinstance(owner, dict) else {}


def _refuse_live_owner(work: Path, owner: dict[str, Any]) -> None:
    if owner.get("host") != socket.gethostname() or owner.get("pid") == os.getpid():
        return  # a process of another node cannot be looked up; a requeued job must go on
    with contextlib.suppress(psutil.Error, KeyError):
        if psutil.Process(owner["pid"]).create_time() == owner["started"]:
            raise ValueError(
                f"{work} is being written by process {owner['pid']}; wait for it, end it, or set "
                "another output_dir"
            )


def _resumes(
    cfg: StageConfig,
    work: Path,
    owner: dict[str, Any],
    mine: dict[str, Any],
    may_change: tuple[str, ...],
) -> bool:
    """Whether the working folder belongs to this very job.

    Raises:
        ValueError: it belongs to another one, whose work overwrite=true would discard.
    """
    if not owner:
        return False
    changes = [
        f"{key} {before.get(key)} -> {after.get(key)}"
        for part in ("config", "inputs")
        for before, after in [(owner.get(part, {}), mine[part])]
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key) and not key.startswith(may_change)
    ]
    if owner.get("stage") == mine["stage"] and not changes:
        log.info("resuming the work in %s", work)
        return True
    if cfg.overwrite:
        return False
    raise ValueError(
        f"{work} holds unfinished work of another config ({', '.join(changes) or owner['stage']}); "
        "use the same keys and inputs to resume it, set overwrite=true to discard it, or set "
        "another output_dir"
    )


def _complete(cfg: StageConfig, stage: str, work: Path, output: Path) -> None:
    """Turn the working folder into the result."""
    names = [name for name in files_in(work) if name not in (OWNER, MANIFEST)]
    write_manifest(cfg, stage, work, _read_owner(work)["inputs"], names)
    (work / OWNER).unlink()
    _flush_folder(work)
    _replace(work, output)


def write_manifest(
    cfg: StageConfig, stage: str, folder: Path, inputs: dict[str, str], names: Sequence[str]
) -> None:
    """Write ``.hydra/`` and then ``manifest.json``, which declares ``folder`` complete.

    Args:
        cfg: the stage's config.
        stage: its name.
        folder: where the result is.
        inputs: config key (or item name) -> identity.
        names: its files, relative to ``folder``.
    """
    _write_hydra(cfg, folder / ".hydra")
    settings = [f".hydra/{name}" for name in files_in(folder / ".hydra")]
    names = sorted({*names, *settings})
    manifest = Manifest(
        folder=folder,
        stage=stage,
        config_hash=config_hash(cfg),
        inputs=inputs,
        files=hash_files(folder, names, cfg.workers, flush=True),
        versions=versions(),
        created=now(),
    )
    manifest.save(folder)


def _replace(work: Path, output: Path) -> None:
    """Rename ``work`` to ``output``; what stood there goes only after that."""
    old = old_of(output)
    if old.exists():
        shutil.rmtree(old)
    if output.exists():
        output.rename(old)
    try:
        work.rename(output)
    except OSError:
        if old.exists():
            old.rename(output)
        raise
    _flush_folder(output.parent)
    if old.exists():
        shutil.rmtree(old)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _abandon(work: Path, output: Path, error: BaseException, *, keep: bool) -> None:
    if keep:
        log.info("unfinished work stays in %s; the same command resumes it", work)
    else:
        shutil.rmtree(work, ignore_errors=True)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        stands = f"; the old result in {output} still stands" if output.exists() else ""
        log.error("the disk of %s is full%s", output.parent, stands)


def _write_hydra(cfg: StageConfig, folder: Path) -> None:
    """What Hydra would write by itself, had it not to wait for the checks."""
    from hydra.core.hydra_config import HydraConfig

    folder.mkdir(exist_ok=True)
    OmegaConf.save(OmegaConf.create(asdict(cfg)), folder / "config.yaml")
    if not HydraConfig.initialized():
        return
    hydra = HydraConfig.get()
    OmegaConf.save(hydra.overrides.task, folder / "overrides.yaml")
    OmegaConf.save(OmegaConf.create({"hydra": hydra}), folder / "hydra.yaml")
