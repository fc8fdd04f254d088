"""The folder that a campaign works in: inputs, undisturbed runs, and what holds after a fault."""

import contextlib
import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.faults.commands import LAYOUTS, STAGES, write_source
from nemo_minitron.checkpoint.manifest import (
    digest,
    files_in,
    hash_file,
    open_result,
    read_manifest,
)


@dataclass
class Case:
    """What is done to whom, and what was wrong with how it ended."""

    number: int
    stage: str
    layout: str
    fault: str
    moment: float
    seconds: float = 0.0
    code: int | None = None
    last: str = ""
    wrong: list[str] = field(default_factory=list)


class Campaign:
    """The cases of one folder; paths of commands are relative to it."""

    def __init__(self, work: Path, command: list[str], seed: int) -> None:
        """Make the inputs and the undisturbed runs that are not there yet."""
        self.work, self.command, self.seed = work.resolve(), command, seed
        self.temporary = self.work / "tmp"
        self.temporary.mkdir(parents=True, exist_ok=True)
        self.env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",  # where Python was when C++ ends the process
            "TMPDIR": str(self.temporary),
        }
        if not (self.work / "base/pruned").is_dir():
            self._prepare()
        self.inputs = self._inputs()

    def _prepare(self) -> None:
        write_source(self.work)
        for stage, name in (("import", "teacher"), ("importance", "scores"), ("prune", "pruned")):
            done = self.run(stage, "1", f"base/{name}")
            assert done.returncode == 0, done.stderr[-2000:]

    def _inputs(self) -> dict[str, str]:
        found = {}
        for name in ("source", "base"):
            for file in files_in(self.work / name):
                if not file.endswith(".log"):
                    found[f"{name}/{file}"] = hash_file(self.work / name / file).sha256
        return {**found, "tokens.npy": hash_file(self.work / "tokens.npy").sha256}

    def line(self, stage: str, layout: str, output: str) -> list[str]:
        """The command line of a stage."""
        degrees = LAYOUTS[layout]
        return [*self.command, stage, *STAGES[stage], *degrees, f"output_dir={output}"]

    def run(self, stage: str, layout: str, output: str) -> "subprocess.CompletedProcess[str]":
        """Undisturbed."""
        return subprocess.run(
            self.line(stage, layout, output),
            cwd=self.work,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )

    def undisturbed(self, stage: str, layout: str) -> dict[str, Any]:
        """Identity, exit code and seconds of a run that nobody disturbed."""
        known = self.work / f"undisturbed-{stage}-{layout}.json"
        if not known.is_file():
            start = time.monotonic()
            output = f"undisturbed/{stage}-{layout}"
            shutil.rmtree(self.work / output, ignore_errors=True)
            done = self.run(stage, layout, output)
            assert done.returncode == 0, (stage, layout, done.stderr[-2000:])
            values = {"id": self.identity(output), "seconds": time.monotonic() - start}
            known.write_text(json.dumps(values))
        found: dict[str, Any] = json.loads(known.read_text())
        return found

    def identity(self, output: str) -> str:
        """Of a complete result, every file checked."""
        manifest = open_result(self.work / output)
        if manifest.stage != "search":
            return manifest.id
        # How long candidates took stands beside their losses, and is another every time.
        found = json.loads((self.work / output / "candidates.json").read_text())
        for record in found["candidates"]:
            record.pop("latency_ms")
        return digest(found)

    def start(self, case: Case, output: str, **more: Any) -> "subprocess.Popen[str]":
        """The command of a case; its output goes to a file by way of another process.

        So what it says is kept where no file may grow.
        """
        with open(self.work / "said", "w") as log:
            self._copying = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log, text=True)
        process = subprocess.Popen(
            self.line(case.stage, case.layout, output),
            cwd=self.work,
            env=self.env,
            stdout=self._copying.stdin,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            **more,
        )
        assert self._copying.stdin is not None
        self._copying.stdin.close()
        return process

    def finish(self, case: Case, process: "subprocess.Popen[str]", limit: float = 200) -> None:
        """Wait for a disturbed command and note how it ended."""
        try:
            case.code = process.wait(limit)
        except subprocess.TimeoutExpired:
            case.wrong.append(f"no end within {limit:.0f} s")
            _kill_family(process.pid)
            case.code = process.wait()
        self._end_of_output()
        text = (self.work / "said").read_text()
        case.last = text.strip().splitlines()[-1][:200] if text.strip() else ""

    def _end_of_output(self) -> None:
        """Wait until all is copied; a process that outlives the command is found by the judge."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._copying.wait(15)

    def said(self) -> str:
        """What the last command wrote."""
        return (self.work / "said").read_text()

    def judge(self, case: Case, output: str, usual: dict[str, Any]) -> None:
        """What holds after every fault; what a command said that went wrong is kept."""
        said = self.said()
        self._judge(case, output, usual)
        if case.wrong:
            (self.work / f"said-{case.number}").write_text(said)

    def _judge(self, case: Case, output: str, usual: dict[str, Any]) -> None:
        self._no_processes(case)
        if case.fault != "SIGKILL":
            self._no_temporary_files(case, "after the fault")
        if self._inputs() != self.inputs:
            case.wrong.append("an input changed")
        if (self.work / output).exists():
            self._whole(case, output)
        whole = (self.work / output / "manifest.json").is_file()  # it ended before the fault
        again = self.run(case.stage, case.layout, output)  # also removes what a killed job left
        if not whole and again.returncode != 0:
            last = again.stderr.strip().splitlines()[-1:]
            case.wrong.append(f"the same command then ends with {again.returncode}: {last}")
        elif not (self.work / output / "manifest.json").is_file():
            case.wrong.append("no result in the end")
        elif self.identity(output) != usual["id"]:
            case.wrong.append("another identity than an undisturbed run's")
        if (self.work / f"{output}.partial").exists() or (self.work / f"{output}.old").exists():
            case.wrong.append("a working folder is left")
        self._no_processes(case)
        self._no_temporary_files(case, "in the end")

    def _whole(self, case: Case, output: str) -> None:
        try:
            if read_manifest(self.work / output) is None:
                case.wrong.append("a folder without a manifest has the name of a result")
            else:
                open_result(self.work / output)
        except ValueError as error:
            case.wrong.append(f"looks like a result and is none: {error}")

    def _no_processes(self, case: Case) -> None:
        """Processes that were started with this campaign's folder for temporary files."""
        end = time.monotonic() + 15
        while (left := _users_of(str(self.temporary))) and time.monotonic() < end:
            time.sleep(0.2)
        for process in left:
            case.wrong.append(f"left running: {process.cmdline()[:6]}")
            process.kill()

    def _no_temporary_files(self, case: Case, when: str) -> None:
        left = sorted(os.listdir(self.temporary))
        if left:
            case.wrong.append(f"temporary files {when}: {left[:4]}")
            for name in left:
                shutil.rmtree(self.temporary / name, ignore_errors=True)


def _users_of(folder: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            alive = process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE
            if alive and process.environ().get("TMPDIR", "").startswith(folder):
                found.append(process)
        except psutil.Error:
            continue
    return found


def _kill_family(pid: int) -> None:
    family = [psutil.Process(pid)]
    family += family[0].children(recursive=True)
    for process in family:
        process.kill()
