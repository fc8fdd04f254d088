"""Result folders: written beside their final place, complete when they appear there.

``<output_dir>.partial`` is where a stage works, ``<output_dir>.old`` where a result that is being
replaced waits until the new one stands.
"""

import errno
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from nemo_minitron.checkpoint.completion import replace, take_back, write_manifest
from nemo_minitron.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    files_in,
    fingerprint,
    has_older_words,
    open_result,
)
from nemo_minitron.checkpoint.output_checks import (
    check_existing,
    check_neighbours,
    check_output,
    finish_for_an_earlier_version,
    old_of,
    partial_of,
    put_back,
)
from nemo_minitron.checkpoint.ownership import (
    SIGNED,
    Claim,
    claim_of,
    claimed,
    discard,
    owner_files,
    read_signed,
    refuse_live_owner,
)
from nemo_minitron.checkpoint.seals import is_seal, remove_seals, sealed_files
from nemo_minitron.checkpoint.watched import (
    InputChangedError,
    content_of,
    identity_of,
    input_states,
    read_paths,
    refuse_changed,
)
from nemo_minitron.config.identity import changes, config_values, input_paths, said
from nemo_minitron.config.stages import StageConfig
from nemo_minitron.documents import JsonObject
from nemo_minitron.runtime import endings
from nemo_minitron.runtime.atomic import atomic_file

__all__ = [
    "Manifest",
    "Ranks",
    "check_output",
    "fingerprint",
    "old_of",
    "open_result",
    "output_folder",
    "partial_of",
    "reserved",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ranks:
    """Who this process is among those that write one result together.

    Attributes:
        rank: global rank; rank 0 alone creates, renames and removes folders.
        barrier: waits for all ranks.
    """

    rank: int = 0
    barrier: Callable[[], None] = lambda: None


@contextmanager
def reserved(cfg: StageConfig, stage: str) -> Iterator[None]:
    """Own the place of a result from before its inputs are checked until the stage has ended.

    Args:
        cfg: the stage's config.
        stage: its name; a pipeline only keeps other pipelines away from its folder.

    Raises:
        ValueError: as ``check_output``; or another process is writing the same result.
    """
    output = Path(cfg.output_dir).resolve()
    several = stage == "pipeline"
    check_neighbours(cfg, output) if several else check_output(cfg, stage)
    finish_for_an_earlier_version(output)
    with claimed(partial_of(output), {} if several else input_states(cfg)):
        if not several:
            put_back(output)
            take_back(partial_of(output))
            check_output(cfg, stage)
        yield


@contextmanager
def output_folder(
    cfg: StageConfig,
    stage: str,
    inputs: Mapping[str, str | Path] | None = None,
    *,
    resumable: bool = False,
    temporary: tuple[str, ...] = (),
    ranks: Ranks | None = None,
) -> Iterator[Path]:
    """Give a stage a folder to write into, and make it a result when the body ends well.

    It is a result only if every input is still what it was before the first byte of it was read. On
    success ``.hydra/`` is written, every file is hashed and flushed, ``manifest.json`` follows
    last and the folder is renamed to ``output_dir``. On any failure an old result still stands, and
    the working folder is removed unless it is ``resumable`` and holds anything.

    Args:
        cfg: the stage's config.
        stage: its name.
        inputs: config key -> path of what the result is made from; by default the inputs that
            ``cfg`` names (``config.identity``).
        resumable: keep the working folder on failure and find it again next time, if config and
            inputs are the same (with other ones it is refused, or cleared under overwrite=true);
            keys that say so (``config.base.MAY_CHANGE``) may differ.
        temporary: names in the folder that are there to resume, and are no part of the result.
        ranks: for several ranks that write one result; every rank enters and leaves together.

    Yields:
        The working folder.

    Raises:
        ValueError: as ``check_output``; another process is writing the same result; an input was
            replaced or edited meanwhile.
    """
    ranks = ranks or Ranks()
    work = partial_of(Path(cfg.output_dir).resolve())
    with ExitStack() as stack:
        job: _Job | None = None
        try:  # a stop signal may come as soon as the folder exists
            if ranks.rank == 0:
                if claim_of(work) is None:
                    stack.enter_context(reserved(cfg, stage))
                job = _Job(cfg, stage, _claim(work), resumable, temporary)
                _open_work(job, inputs)
                job.claim.begun = True
            ranks.barrier()
            yield work
            ranks.barrier()
            if job is not None:
                _complete(job)
        except BaseException as error:
            endings.arrived()  # what follows is not to be interrupted
            if job is None:
                raise
            mixed = _mixed(job, error)
            _abandon(job, error)
            if mixed is not None and mixed is not error and isinstance(error, Exception):
                raise mixed from error  # which may be just what reading a mixture gives
            raise
    ranks.barrier()


@dataclass
class _Job:
    """A stage that writes its result.

    Attributes:
        cfg: its config.
        stage: its name.
        claim: on the working folder.
        resumable: see ``output_folder``.
        temporary: see ``output_folder``.
        states: of the inputs, see ``watched.input_states``.
        contents: of the inputs, see ``watched.content_of``.
    """

    cfg: StageConfig
    stage: str
    claim: Claim
    resumable: bool
    temporary: tuple[str, ...]
    states: dict[str, str] = field(default_factory=dict)
    contents: dict[str, str] = field(default_factory=dict)


def _claim(work: Path) -> Claim:
    """Return this process's claim on the working folder, and mark it as used by one job."""
    claim = claim_of(work)
    if claim is None or claim.used:
        raise ValueError(f"{work} is being written by this process; set another output_dir")
    claim.used = True
    return claim


def _open_work(job: _Job, inputs: Mapping[str, str | Path] | None) -> None:
    """Note what the result is made from, and resume, clear or refuse what an earlier job left."""
    cfg, work = job.cfg, job.claim.work
    check_output(cfg, job.stage)
    refuse_live_owner(Path(cfg.output_dir).resolve())
    named = input_paths(cfg) if inputs is None else inputs
    identities = {key: _identity(value, cfg.workers) for key, value in named.items()}
    mine = {"stage": job.stage, "config": config_values(cfg), "inputs": identities}
    job.contents = _contents(job, identities)
    job.states = {key: s for key, s in input_states(cfg).items() if key in job.contents}
    refuse_changed(cfg, {key: s for key, s in job.claim.states.items() if key in job.contents})
    before = read_signed(work / SIGNED)
    left = [path for path in work.iterdir() if not owner_files([path.name])]
    if left and job.resumable:
        identities |= _in_older_words(named, before.get("inputs", {}), identities, cfg.workers)
    if left and not (job.resumable and _resumes(cfg, work, before, mine)):
        _clear(work, left)
    elif left and "mixed" in before:
        raise ValueError(
            f"{work} holds unfinished work during which an input was another one for a time "
            f"({before['mixed']}); remove that folder to start over"
        )
    _sign(work, mine)


def _identity(value: str | Path, workers: int) -> str:
    """Hash an input, which takes minutes where it is large; ownership is taken before that.

    It is a function of its own so that a test can make it as slow as it is with a large input.
    """
    return fingerprint(value, workers)


def _clear(work: Path, left: list[Path]) -> None:
    log.info("removing what is in %s, left by a job that did not end well", work)
    for path in left:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _sign(work: Path, mine: JsonObject) -> None:
    """Write what the folder is for."""
    with atomic_file(work / SIGNED) as draft:
        draft.write_text(json.dumps(mine, indent=1))


def _mixed(job: _Job, error: BaseException) -> InputChangedError | None:
    """Return the error for a changed input, and mark kept work so that no run resumes it."""
    found = error if isinstance(error, InputChangedError) else None
    if found is None:
        try:
            refuse_changed(job.cfg, job.states, job.contents, exact=not job.resumable)
        except InputChangedError as changed:
            found = changed
    if found is not None and job.claim.begun and job.claim.stands():
        with suppress(OSError):
            _sign(job.claim.work, {**read_signed(job.claim.work / SIGNED), "mixed": str(found)})
    return found


def _contents(job: _Job, identities: Mapping[str, str]) -> dict[str, str]:
    """For each input that is read by its path, return what must not change while it is read."""
    found = {}
    for key, value in read_paths(job.cfg).items():
        if key in identities:
            identity = identities[key]
        elif Path(value).exists() and identities:
            identity = identity_of(key, Path(value), job.cfg.workers)
        else:
            continue
        found[key] = content_of(Path(value), identity, exact=not job.resumable)
    return found


def _in_older_words(
    named: Mapping[str, str | Path], then: JsonObject, now: Mapping[str, str], workers: int
) -> dict[str, str]:
    """Return identities as an earlier version wrote them, of inputs that are what they were."""
    return {
        key: then[key]
        for key in then
        if key in now
        and then[key] != now[key]
        and has_older_words(named[key])
        and fingerprint(named[key], workers, earlier=True) == then[key]
    }


def _resumes(cfg: StageConfig, work: Path, owner: JsonObject, mine: JsonObject) -> bool:
    """Whether the working folder belongs to this very job.

    Raises:
        ValueError: it belongs to another one, whose work overwrite=true would discard.
    """
    if not owner:
        return False
    then, now = owner.get("inputs", {}), mine["inputs"]
    inputs = {k: (then.get(k), now.get(k)) for k in {*then, *now} if then.get(k) != now.get(k)}
    changed = {**changes(cfg, owner.get("config", {}), resuming=True), **inputs}
    if owner.get("stage") == mine["stage"] and not changed:
        log.info("resuming the work in %s", work)
        return True
    if cfg.overwrite:
        return False
    ways = "; data.blend_changes has weights from a step on" if "data.blend" in changed else ""
    raise ValueError(
        f"{work} holds unfinished work of another config ({said(changed) or owner['stage']}); "
        "use the same keys and inputs to resume it, set overwrite=true to discard it, or set "
        f"another output_dir{ways}"
    )


def _complete(job: _Job) -> None:
    """Turn the working folder into the result."""
    cfg, work = job.cfg, job.claim.work
    refuse_changed(cfg, job.states, job.contents, exact=not job.resumable)
    there = files_in(work)
    ours, left_out = {MANIFEST, *owner_files(there)}, tuple(f"{n}/" for n in job.temporary)
    names = [n for n in there if n not in ours and not is_seal(n) and not n.startswith(left_out)]
    inputs, sealed = read_signed(work / SIGNED)["inputs"], sealed_files(work)
    write_manifest(cfg, job.stage, work, inputs, names, sealed)
    remove_seals(work)
    job.claim.check()
    output = Path(cfg.output_dir).resolve()
    check_neighbours(cfg, output)
    check_existing(cfg, job.stage, output)
    replace(work, output, job.temporary)


def _abandon(job: _Job, error: BaseException) -> None:
    """Keep the working folder if a later run can resume it; remove it otherwise."""
    work, output = job.claim.work, Path(job.cfg.output_dir).resolve()
    job.claim.used = False
    if not job.claim.stands():
        return
    names = files_in(work)
    if job.resumable and len(owner_files(names)) < len(names):
        log.info("unfinished work stays in %s; the same command resumes it", work)
    else:
        discard(work)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        stands = f"; the old result in {output} still stands" if output.exists() else ""
        log.error("the disk of %s is full%s", output.parent, stands)
