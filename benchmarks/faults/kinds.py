"""The kinds of faults: what is done to a command, and how it has to end."""

import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from benchmarks.faults.campaign import Campaign, Case
from benchmarks.faults.commands import INPUTS, RANKED, STAGES
from nemo_minitron.checkpoint.manifest import read_manifest

# Stages whose work may go on: 75 at SIGTERM once there is something to save, and before.
SAVING = ("importance", "distill", "finetune", "teacher_logits", "search")


_EARLY = 0.4
"""Share of the usual seconds before which a command cannot have been about to end."""


def _wait(case: Case, process: "subprocess.Popen[str]", usual: dict[str, Any]) -> None:
    """Until the moment of the case: a share of the seconds that the command usually takes.

    It counts from the first line of this package; before that the interpreter starts.
    """
    while process.poll() is None and not _begun(process.pid):
        time.sleep(0.005)
    end = time.monotonic() + case.moment * usual["seconds"]
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.01)


def _begun(process: int) -> bool:
    """Whether SIGTERM has a handler."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return True
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) & (1 << (signal.SIGTERM - 1)))


def _signal(number: int, codes: Callable[[Case], tuple[int, ...]]) -> Callable[..., None]:
    def fault(
        campaign: Campaign, case: Case, output: str, usual: dict[str, Any], _: random.Random
    ) -> None:
        process = campaign.start(case, output)
        _wait(case, process, usual)
        if process.poll() is None:
            process.send_signal(number)
        campaign.finish(case, process)
        if case.code == 0 and case.moment < _EARLY:
            case.wrong.append("the signal changed nothing")
        _check_ending(campaign, case, codes(case))

    return fault


def _check_ending(campaign: Campaign, case: Case, codes: tuple[int, ...]) -> None:
    if case.code not in (0, *codes):
        case.wrong.append(f"exit code {case.code}, not one of {codes}")
    if case.code in (0, -signal.SIGKILL):
        return
    if not case.last.startswith(f"minitron {case.stage}: "):
        case.wrong.append("the last line does not say what happened")
    if case.code in (75, 130, 143, 2) and "Traceback" in campaign.said():
        case.wrong.append("a traceback")


def _killed_rank(
    campaign: Campaign, case: Case, output: str, usual: dict[str, Any], draw: random.Random
) -> None:
    process = campaign.start(case, output)
    _wait(case, process, usual)
    victim, number = None, str(draw.randrange(2))
    while victim is None and process.poll() is None:
        try:
            for child in psutil.Process(process.pid).children(recursive=True):
                if child.environ().get("RANK") == number:
                    victim = child
                    break
        except psutil.Error:
            continue
        time.sleep(0.02)
    start = time.monotonic()
    if victim is not None:
        victim.kill()
    campaign.finish(case, process)
    _check_ending(campaign, case, (1,))
    if case.code and f"rank {number} was killed" not in case.last:
        case.wrong.append("the last line does not name the rank")
    if time.monotonic() - start > 16 and case.code:
        case.wrong.append(f"the others ended after {time.monotonic() - start:.0f} s")


def _damaged(
    campaign: Campaign, case: Case, output: str, usual: dict[str, Any], draw: random.Random
) -> None:
    """One byte of an input is another: refused by name; for a source, that or another model."""
    path = campaign.work / draw.choice(INPUTS[case.stage])
    if path.is_dir():
        manifest = read_manifest(path)
        assert manifest is not None
        path = path / draw.choice(sorted(manifest.files))
    before = path.read_bytes()
    place = draw.randrange(len(before))
    cut, bit = draw.random() < 0.3, 1 << draw.randrange(8)
    flipped = bytes([before[place] ^ bit]) + before[place + 1 :]
    path.write_bytes(before[:place] + (b"" if cut else flipped))
    try:
        campaign.finish(case, campaign.start(case, output))
    finally:
        path.write_bytes(before)
    _check_ending(campaign, case, (2,))
    outside = path.name == "tokens.npy" or "source" in path.parts
    if case.code == 0 and outside:  # other data are other data; the result is not that of before
        shutil.rmtree(campaign.work / output)
        case.code = 2
    elif case.code == 0:
        case.wrong.append(f"took a damaged {path.name}")
    if case.code == 2 and not outside and path.name not in case.last:
        case.wrong.append("the last line does not name the file")


def _full_disk(
    campaign: Campaign, case: Case, output: str, usual: dict[str, Any], draw: random.Random
) -> None:
    """No file may grow beyond some size, as on a disk that has no more room (EFBIG, not ENOSPC)."""
    limit = draw.choice((2_000, 10_000, 30_000, 60_000))

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    campaign.finish(case, campaign.start(case, output, preexec_fn=limited))
    _check_ending(campaign, case, (1,))


def _two_at_once(
    campaign: Campaign, case: Case, output: str, usual: dict[str, Any], draw: random.Random
) -> None:
    first = campaign.start(case, output)
    time.sleep(case.moment * usual["seconds"] * 0.8)
    second = campaign.run(case.stage, case.layout, output)
    campaign.finish(case, first)
    codes = sorted((case.code or 0, second.returncode))
    if codes != [0, 2]:
        case.wrong.append(f"exit codes {codes} of two equal commands")
    case.code = 0 if 0 in codes else case.code


# Kind -> how often it is drawn, and what it does.
FAULTS: Mapping[str, tuple[int, Callable[..., None]]] = {
    "SIGKILL": (5, _signal(signal.SIGKILL, lambda case: (-signal.SIGKILL,))),
    "SIGTERM": (
        5,
        _signal(signal.SIGTERM, lambda case: (75, 143) if case.stage in SAVING else (143,)),
    ),
    "SIGINT": (5, _signal(signal.SIGINT, lambda case: (130,))),
    "killed rank": (4, _killed_rank),
    "damaged input": (3, _damaged),
    "full disk": (2, _full_disk),
    "two at once": (2, _two_at_once),
}


def run_case(campaign: Campaign, number: int) -> Case:
    """Draw case ``number``, do it and judge it."""
    draw = random.Random(f"{campaign.seed}:{number}")
    fault = draw.choices(list(FAULTS), [weight for weight, _ in FAULTS.values()])[0]
    ranked = fault == "killed rank" or draw.random() < 0.45
    stage = draw.choice(RANKED if ranked else tuple(STAGES))
    layout = draw.choice(("tp2", "pp2")) if ranked else "1"
    case = Case(number, stage, layout, fault, draw.random())
    start = time.monotonic()
    usual = campaign.undisturbed(stage, layout)
    output = f"out/{number}"
    shutil.rmtree(campaign.work / "out", ignore_errors=True)
    _, disturb = FAULTS[fault]
    disturb(campaign, case, output, usual, draw)
    campaign.judge(case, output, usual)
    case.seconds = round(time.monotonic() - start, 1)
    return case
