"""A seeded campaign of faults over every stage: kills, signals, damaged files, full disks, twins.

    python -m benchmarks.faults --cases 0:200 --work /tmp/faults

Case ``n`` is the same in every run. After each one it is checked that

- the exit code and the last line say what happened, and there is no traceback in wrong input;
- inputs are what they were, and nothing looks like a result that is not one;
- the same command then succeeds, resumed or anew, with the identity of an undisturbed run;
- no process and no temporary file is left.

A line per case goes to ``<work>/cases.jsonl``; cases that stand there are not run again. The table
at the end counts by fault.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors.torch import save_file

from nemo_minitron.checkpoint.manifest import (
    digest,
    files_in,
    hash_file,
    open_result,
    read_manifest,
)

VOCAB = 259
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": VOCAB,
    "torch_dtype": "float32",
}
DATA = ("data.path=tokens.npy", "data.seq_length=16", "data.micro_batch_size=1")
TRAIN = ("trainer.limit_val_batches=0", "trainer.max_steps=6", "trainer.save_every_n_steps=2")
TRAIN += ("optim.lr_warmup_steps=0", "data.global_batch_size=2")
STAGES: Mapping[str, tuple[str, ...]] = {
    "import": ("source=source",),
    "importance": (
        *("checkpoint=base/teacher", *DATA, "data.global_batch_size=1", "data.num_samples=8"),
        "save_every_n_samples=2",
    ),
    "prune": (
        *("checkpoint=base/teacher", "importance=base/scores"),
        "pruning.target.ffn_hidden_size=32",
    ),
    "distill": ("student=base/pruned", "teacher=base/teacher", *DATA, *TRAIN),
    "finetune": ("checkpoint=base/pruned", *DATA, *TRAIN),
    "teacher_logits": (
        *("checkpoint=base/teacher", *DATA, *TRAIN[:2], "data.global_batch_size=2"),
        *("shard_samples=2", "top_k=4"),
    ),
    "search": (
        *("checkpoint=base/teacher", "importance=base/scores", *DATA, "data.num_samples=2"),
        *("data.global_batch_size=1", "data.split_name=train"),
        "search.ffn_hidden_size=[32,40]",
    ),
    "evaluate": ("checkpoint=base/pruned", *DATA, "data.global_batch_size=1"),
    "export": ("checkpoint=base/pruned",),
}
RANKED = ("importance", "distill", "finetune", "teacher_logits", "search", "evaluate")
LAYOUTS: Mapping[str, tuple[str, ...]] = {
    "1": (),
    "tp2": ("parallel.tensor_model_parallel_size=2",),
    "pp2": ("parallel.pipeline_model_parallel_size=2",),
}
INPUTS: Mapping[str, tuple[str, ...]] = {
    "import": ("source/model.safetensors", "source/config.json"),
    "importance": ("base/teacher", "tokens.npy"),
    "prune": ("base/teacher", "base/scores"),
    "distill": ("base/pruned", "base/teacher"),
    "finetune": ("base/pruned",),
    "teacher_logits": ("base/teacher",),
    "search": ("base/scores", "base/teacher"),
    "evaluate": ("base/pruned",),
    "export": ("base/pruned",),
}
FAULTS = (
    "SIGKILL",
    "SIGTERM",
    "SIGINT",
    "killed rank",
    "damaged input",
    "full disk",
    "two at once",
)
WEIGHTS = (5, 5, 5, 4, 3, 2, 2)
# Stages whose work may go on: 75 at SIGTERM once there is something to save, and before.
SAVING = ("importance", "distill", "finetune", "teacher_logits", "search")


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
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary)}
        if not (self.work / "base/pruned").is_dir():
            self._prepare()
        self.inputs = self._inputs()

    def _prepare(self) -> None:
        _source(self.work)
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

    def case(self, number: int) -> Case:
        """Draw case ``number``, do it and judge it."""
        draw = random.Random(f"{self.seed}:{number}")
        fault = draw.choices(FAULTS, WEIGHTS)[0]
        ranked = fault == "killed rank" or draw.random() < 0.45
        stage = draw.choice(RANKED if ranked else tuple(STAGES))
        layout = draw.choice(("tp2", "pp2")) if ranked else "1"
        case = Case(number, stage, layout, fault, draw.random())
        start = time.monotonic()
        usual = self.undisturbed(stage, layout)
        output = f"out/{number}"
        shutil.rmtree(self.work / "out", ignore_errors=True)
        _FAULTS[fault](self, case, output, usual, draw)
        self._judge(case, output, usual)
        case.seconds = round(time.monotonic() - start, 1)
        return case

    def start(self, case: Case, output: str, **more: Any) -> "subprocess.Popen[str]":
        """The command of a case, its output in a file."""
        log = open(self.work / "said", "w")  # noqa: SIM115
        return subprocess.Popen(
            self.line(case.stage, case.layout, output),
            cwd=self.work,
            env=self.env,
            stdout=log,
            stderr=log,
            text=True,
            start_new_session=True,
            **more,
        )

    def finish(self, case: Case, process: "subprocess.Popen[str]", limit: float = 200) -> None:
        """Wait for a disturbed command and note how it ended."""
        try:
            case.code = process.wait(limit)
        except subprocess.TimeoutExpired:
            case.wrong.append(f"no end within {limit:.0f} s")
            _kill_family(process.pid)
            case.code = process.wait()
        text = (self.work / "said").read_text()
        case.last = text.strip().splitlines()[-1][:200] if text.strip() else ""

    def said(self) -> str:
        """What the last command wrote."""
        return (self.work / "said").read_text()

    def _judge(self, case: Case, output: str, usual: dict[str, Any]) -> None:
        """What holds after every fault."""
        self._no_processes(case)
        if case.fault != "SIGKILL":
            self._no_temporary_files(case, "after the fault")
        if self._inputs() != self.inputs:
            case.wrong.append("an input changed")
        if (self.work / output).exists():
            self._whole(case, output)
        whole = (self.work / output / "manifest.json").is_file()  # it ended before the fault
        again = None if whole else self.run(case.stage, case.layout, output)
        if again is not None and again.returncode != 0:
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


def _source(work: Path) -> None:
    """A tiny Llama with random weights, and tokens."""
    folder = work / "source"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    draw = torch.Generator().manual_seed(0)
    hidden, ffn = 32, 48
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (VOCAB, hidden)}
    shapes |= {"model.norm": (hidden,), "lm_head": (VOCAB, hidden)}
    for layer in range(4):
        own = f"model.layers.{layer}."
        shapes |= {f"{own}self_attn.{x}_proj": (hidden, hidden) for x in "qkvo"}
        shapes |= {f"{own}mlp.{x}_proj": (ffn, hidden) for x in ("gate", "up")}
        shapes |= {f"{own}mlp.down_proj": (hidden, ffn)}
        shapes |= {f"{own}{x}_layernorm": (hidden,) for x in ("input", "post_attention")}
    weights = {f"{n}.weight": torch.randn(s, generator=draw) * 0.2 for n, s in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    np.save(work / "tokens.npy", np.random.default_rng(0).integers(0, VOCAB, (32, 16)))


# ------------------------------------------------------------------------------------ the faults


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
    damaged = before[:place] if draw.random() < 0.3 else None
    flipped = bytes([before[place] ^ (1 << draw.randrange(8))])
    path.write_bytes(
        damaged if damaged is not None else before[:place] + flipped + before[place + 1 :]
    )
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


_FAULTS: Mapping[str, Callable[..., None]] = {
    "SIGKILL": _signal(signal.SIGKILL, lambda case: (-signal.SIGKILL,)),
    "SIGTERM": _signal(
        signal.SIGTERM,
        lambda case: (75, 143) if case.stage in SAVING else (143,),
    ),
    "SIGINT": _signal(signal.SIGINT, lambda case: (130,)),
    "killed rank": _killed_rank,
    "damaged input": _damaged,
    "full disk": _full_disk,
    "two at once": _two_at_once,
}


# ------------------------------------------------------------------------------------ the table


def table(cases: list[dict[str, Any]]) -> str:
    """Cases by fault: how many, on how many ranks, exit codes, how many went wrong."""
    by_fault: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for case in cases:
        by_fault[case["fault"]].append(case)
    rows = [
        "| Fault | Cases | 1 rank | TP2 | PP2 | Exit codes | Wrong |",
        "|---|---|---|---|---|---|---|",
    ]
    for fault in FAULTS:
        found = by_fault[fault]
        layouts = Counter(case["layout"] for case in found)
        codes = Counter(str(case["code"]) for case in found)
        said = ", ".join(f"{code}: {count}" for code, count in sorted(codes.items()))
        wrong = sum(bool(case["wrong"]) for case in found)
        counts = " | ".join(str(layouts[name]) for name in LAYOUTS)
        rows.append(f"| {fault} | {len(found)} | {counts} | {said} | {wrong} |")
    wrong = sum(bool(case["wrong"]) for case in cases)
    rows.append(f"| all | {len(cases)} | | | | | {wrong} |")
    return "\n".join(rows)


def main() -> int:
    """Run the cases that are not done yet and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", default="0:200", help="first:stop")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path(".faults"))
    parser.add_argument("--again", action="store_true", help="run again those that went wrong")
    args = parser.parse_args()
    first, stop = map(int, args.cases.split(":"))
    campaign = Campaign(args.work, [sys.executable, "-m", "nemo_minitron"], args.seed)
    record = campaign.work / "cases.jsonl"
    lines = record.read_text().splitlines() if record.is_file() else []
    done = {case["number"]: case for case in map(json.loads, lines)}
    for number in range(first, stop):
        if number in done and not (args.again and done[number]["wrong"]):
            continue
        case = campaign.case(number)
        done[number] = asdict(case)
        with record.open("a") as file:
            file.write(json.dumps(done[number]) + "\n")
        what = f"{case.fault}, {case.stage} on {case.layout}, at {case.moment:.2f}"
        sys.stdout.write(f"{number}: {what}: {case.code} {case.wrong or 'right'}\n")
        sys.stdout.flush()
    chosen = [done[number] for number in range(first, stop) if number in done]
    sys.stdout.write(table(chosen) + "\n")
    return int(any(case["wrong"] for case in chosen))


if __name__ == "__main__":
    sys.exit(main())
