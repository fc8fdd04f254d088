"""``minitron status RUN``: how far a run is, from the files that it writes. Imports no torch."""

import json
import re
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from nemo_minitron.checkpoint.manifest import MANIFEST, read_manifest
from nemo_minitron.checkpoint.output_checks import partial_of
from nemo_minitron.checkpoint.ownership import SIGNED, has_owner, is_ours, read_signed
from nemo_minitron.checkpoint.progress import read_progress
from nemo_minitron.runtime import streams

_SILENT_MINUTES = 30.0
"""Without a logged step a training counts as hung, where ``hang_after_minutes`` sets no limit."""
_END_OF_LOG = 1 << 18
_RECORD = re.compile(r"\d{4}-\d\d-\d\d (\d\d:\d\d:\d\d),\d{3} [A-Z]+(?: rank \d+)? [\w.]+: (.*)")
# The last line of a traceback; the others begin with spaces, or are sentences.
_ERROR = re.compile(r"(?:\w+\.)*(\w+)(?:: (.*))?$")
_TOLD = ("Preempted", "Terminated", "Interrupted")
_TOLD_ANOTHER = ("stopped early", "ended by a signal", "interrupted")
_WIDTH = 80


@dataclass
class Status:
    """The progress of a run or of a stage; fields that are not known are None.

    Attributes:
        run: its folder.
        stage: what runs.
        state: ``running``, ``finished``, ``stopped``, ``failed`` or ``hung``.
        step: steps that are trained.
        steps: of the whole training.
        loss: of the last logged step.
        tokens: that were trained on.
        tokens_per_second: of the last logged step.
        slow: the rank that others wait for, with its node, if ``trainer.straggler_ratio`` looks.
        seconds_left: until the last step, at the speed since the start.
        checkpoint: step of the newest complete training checkpoint.
        checkpoint_age: seconds since it was complete.
        error: the last one in its log, with the time of day.
    """

    run: str
    stage: str = "?"
    state: str = "failed"
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    tokens: float | None = None
    tokens_per_second: float | None = None
    slow: str | None = None
    seconds_left: float | None = None
    checkpoint: int | None = None
    checkpoint_age: float | None = None
    error: str | None = None


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"status: {message}; usage: minitron status RUN [--json]")


def main(arguments: Sequence[str]) -> int:
    """Print the status of a run or of a pipeline's stages.

    Raises:
        ValueError: there is no such run.
    """
    parser = _Parser(prog="minitron status", description=__doc__, allow_abbrev=False)
    parser.add_argument("run", help="output_dir of a stage or of a pipeline")
    parser.add_argument("--json", action="store_true", help="the same as JSON, ages in seconds")
    given = parser.parse_args(arguments)
    found = read(Path(given.run))
    if given.json:
        return streams.write(json.dumps([asdict(status) for status in found], indent=1) + "\n")
    return streams.write("\n".join(line for status in found for line in _lines(status)) + "\n")


def read(run: Path) -> list[Status]:
    """Return status of a stage, or of each stage of a pipeline that has begun, in their order."""
    run = run.resolve()
    if run.name.endswith(".partial"):
        run = run.with_name(run.name.removesuffix(".partial"))
    inner = {path.with_name(path.name.removesuffix(".partial")) for path in _children(run)}
    stages = sorted(inner, key=_begun)
    if stages:
        return [_read_one(path, path.relative_to(run.parent)) for path in stages]
    if not is_ours(partial_of(run)) and not (run / MANIFEST).is_file() and not _log(run).exists():
        raise ValueError(f"status: no stage has written {run}; give the output_dir of one")
    return [_read_one(run, Path(run.name))]


def _children(run: Path) -> list[Path]:
    """Return results and working folders inside a pipeline's folder."""
    folders = [path for path in run.glob("*") if path.is_dir()]
    return [path for path in folders if (path / MANIFEST).is_file() or is_ours(path)]


def _begun(run: Path) -> float:
    """Return roughly when a stage began to run."""
    for path in (partial_of(run) / SIGNED, run / MANIFEST):
        if path.is_file():
            return path.stat().st_mtime
    return time.time()


def _log(run: Path) -> Path:
    return run.with_name(run.name + ".log")


def _read_one(run: Path, name: Path) -> Status:
    status, work = Status(str(name)), partial_of(run)
    last, ended = _last_error(_log(run))
    if not is_ours(work) and (run / MANIFEST).is_file():
        manifest = read_manifest(run)
        status.stage, status.state = manifest.stage if manifest else "?", "finished"
        _add_progress(status, run)
        status.seconds_left = None
        return status
    signed = read_signed(work / SIGNED)
    status.stage, status.error = str(signed.get("stage", "?")), last
    _add_progress(status, work)
    _add_checkpoint(status, work)
    if has_owner(work):
        status.state = "hung" if _is_silent(work) else "running"
    else:
        status.state = ended or "failed"
        status.error = last if ended else "ended without a word"
    return status


def _add_progress(status: Status, work: Path) -> None:
    """Add the figures that the training logged at its last step."""
    said, _ = read_progress(work)
    status.step, status.steps = said.get("step"), said.get("max_steps")
    for name in ("loss", "tokens", "tokens_per_second", "slow"):
        setattr(status, name, said.get(name))
    if status.step is not None and status.steps is not None:
        status.seconds_left = (status.steps - status.step) * said.get("seconds_per_step", 0.0)


def _add_checkpoint(status: Status, work: Path) -> None:
    steps = {int(p.name[5:]): p for p in work.glob("checkpoints/step=*") if p.name[5:].isdigit()}
    if steps:
        status.checkpoint = max(steps)
        status.checkpoint_age = time.time() - steps[status.checkpoint].stat().st_mtime


def _is_silent(work: Path) -> bool:
    said, when = read_progress(work)
    steps = said.get("seconds_per_step", 0.0) * said.get("log_every_n_steps", 1) / 60
    minutes = said.get("hang_after_minutes") or max(_SILENT_MINUTES, 3 * steps)
    return when is not None and time.time() - when > 60 * minutes


def _last_error(log: Path) -> tuple[str | None, str | None]:
    """The last error in a log, and what it made of the run; None for the latter if more follows.

    Of ranks that fail together the first one counts: the others miss it.
    """
    if not log.is_file():
        return None, None
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - _END_OF_LOG))
        lines = file.read().decode(errors="replace").splitlines()
    said, ended, clock = None, None, None
    for line in lines:
        record, error = _RECORD.match(line), _ERROR.match(line)
        if record:
            clock = record[1] if record[2] == "failed" else None
            ended = ended if clock else None
        elif clock and error and not ended:
            kind, text = error.groups(default="")
            said, ended = f"{clock} {kind}: {text}", _ending(kind, text)
    return said, ended


def _ending(kind: str, text: str) -> str:
    if kind == "Hung":
        return "hung"
    told = kind in _TOLD or (kind == "StageFailed" and text.startswith(_TOLD_ANOTHER))
    return "stopped" if told else "failed"


def _lines(status: Status) -> list[str]:
    """Lay out one run for a terminal of 80 columns."""
    rows = [f"{status.run}  {status.stage}  {status.state}"]
    if status.step is not None and status.steps:
        done = f"step {status.step:,} of {status.steps:,} ({status.step / status.steps:.0%})"
        loss = "" if status.loss is None else f"loss {status.loss:.4f}"
        left = "" if status.seconds_left is None else f"left {_duration(status.seconds_left)}"
        rows.append("  " + "  ".join(filter(None, (done, loss, left))))
    if status.tokens is not None:
        speed = status.tokens_per_second
        at = "" if speed is None else f" at {speed:,.0f} per second"
        rows.append(f"  tokens {status.tokens:,.0f}{at}")
    if status.slow:
        rows.append(f"  slow: {status.slow}")
    if status.checkpoint is not None:
        age = _duration(status.checkpoint_age or 0.0)
        rows.append(f"  checkpoint of step {status.checkpoint:,}, {age} ago")
    if status.error:
        rows.append(f"  last error {status.error}")
    return [row if len(row) <= _WIDTH else row[: _WIDTH - 3] + "..." for row in rows]


def _duration(seconds: float) -> str:
    """Write seconds as days, hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days = f"{hours // 24}d " if hours >= 24 else ""
    return f"{days}{hours % 24}:{minutes:02}:{rest:02}"
