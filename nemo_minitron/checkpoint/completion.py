"""A working folder becomes a result: hashes, manifest, and two renames that lose nothing."""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf

from nemo_minitron.checkpoint.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    config_hash,
    files_in,
    hash_files,
    now,
    result_in,
    versions,
)
from nemo_minitron.checkpoint.output_checks import REPLACED, added_files, old_of
from nemo_minitron.checkpoint.ownership import aside_of, asides_of, owner_files
from nemo_minitron.config.stages import StageConfig
from nemo_minitron.runtime.atomic import rename_folder

log = logging.getLogger(__name__)


def write_manifest(
    cfg: StageConfig,
    stage: str,
    folder: Path,
    inputs: dict[str, str],
    names: Sequence[str],
    sealed: Mapping[str, FileEntry] | None = None,
) -> None:
    """Write ``.hydra/`` and then ``manifest.json``, which declares ``folder`` complete.

    Args:
        cfg: the stage's config.
        stage: its name.
        folder: where the result is.
        inputs: config key (or item name) -> identity.
        names: its files, relative to ``folder``.
        sealed: hashes that some of them had when they were written.

    Raises:
        ValueError: a file is no longer what was written.
    """
    _write_hydra(cfg, folder / ".hydra")
    settings = [f".hydra/{name}" for name in files_in(folder / ".hydra")]
    names = sorted({*names, *settings})
    files = hash_files(folder, names, cfg.workers, flush=True)
    for name, entry in (sealed or {}).items():
        if name in files and files[name] != entry:
            raise ValueError(
                f"{folder / name} is damaged: it is not what was written; remove it, then the same "
                "command makes it again"
            )
    manifest = Manifest(
        folder=folder,
        stage=stage,
        config_hash=config_hash(cfg),
        inputs=inputs,
        files=files,
        versions=versions(),
        created=now(),
    )
    manifest.save(folder)


def replace(work: Path, output: Path, temporary: Sequence[str] = ()) -> None:
    """Rename ``work`` to ``output``; what stood there goes only after that.

    Args:
        work: the working folder.
        output: the place of the result.
        temporary: names in ``work`` that are no part of the result. They are set aside in the last
            moment, as until then a job that is stopped needs them to go on; of a job that is killed
            in that moment ``take_back`` finds them.
    """
    old = old_of(output)
    if old.exists():
        shutil.rmtree(old)  # ``check_neighbours`` has seen that it is ours
    if output.exists():
        (output / REPLACED).touch()
        output.rename(old)
    try:
        _set_aside(work, temporary)
        rename_folder(work, output)
    except BaseException:
        take_back(work)
        if old.exists() and not output.exists():
            old.rename(output)
            (output / REPLACED).unlink()
        raise
    for name in owner_files(os.listdir(output)):
        (output / name).unlink()
    take_back(work)
    if old.exists():
        _remove_replaced(old)


def _set_aside(work: Path, names: Sequence[str]) -> None:
    paths = list(filter(os.path.exists, [work / name for name in names]))
    if paths:
        aside = aside_of(work)
        aside.mkdir()
        for path in paths:
            path.rename(aside / path.name)


def take_back(work: Path) -> None:
    """Put back what was set aside, unless the folder that it came from has become the result.

    The caller owns ``work``. A folder that has a manifest was to become a result when its process
    was killed: work begins without one.
    """
    for aside in asides_of(work):
        if (work / MANIFEST).is_file():
            for path in aside.iterdir():
                path.rename(work / path.name)
        shutil.rmtree(aside, ignore_errors=True)


def _remove_replaced(old: Path) -> None:
    """Remove a result that another has replaced, unless somebody put files into it meanwhile."""
    added = added_files(old, result_in(old))
    if added:
        (old / REPLACED).unlink()
        return log.warning("%s stays: it holds files that no stage wrote (%s)", old, added[0])
    shutil.rmtree(old)


def _write_hydra(cfg: StageConfig, folder: Path) -> None:
    """Write the files that Hydra writes by default; here they must wait for the checks."""
    from hydra.core.hydra_config import HydraConfig

    folder.mkdir(exist_ok=True)
    OmegaConf.save(OmegaConf.create(asdict(cfg)), folder / "config.yaml")
    if not HydraConfig.initialized():
        return
    hydra = HydraConfig.get()
    OmegaConf.save(hydra.overrides.task, folder / "overrides.yaml")
    OmegaConf.save(OmegaConf.create({"hydra": hydra}), folder / "hydra.yaml")
