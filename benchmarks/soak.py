"""A long training that is disturbed thirty times, beside one that is not.

``python -m benchmarks.soak [--write]`` from the repository root, on two cores. The quick start's
model in small learns from its teacher for 2,000 steps on two pipeline ranks. Whenever a new
checkpoint has appeared, something happens to the job at a random moment: SIGTERM to all of it, a
killed rank, SIGKILL to all of it, a disk without room, Ctrl-C; then the same command is started
again. In the end the weights must be those of the undisturbed run, bit for bit, every step must
have one loss in TensorBoard, the same as there, and every exit code must say what happened. Exit
status 1 when one of this is not so.
"""

import argparse
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from benchmarks.docs_block import markdown_table, write_block
from tests.helpers.tiny import LLAMA, read_weights, write_npy, write_result

# SmolLM2's shape, an eighth as wide: 9 heads in 3 groups, embeddings that are also the output.
TEACHER = replace(
    LLAMA,
    num_layers=6,
    hidden_size=72,
    ffn_hidden_size=192,
    num_attention_heads=9,
    num_query_groups=3,
    kv_channels=8,
    vocab_size=512,
    share_embeddings_and_output_weights=True,
)
STUDENT = replace(TEACHER, ffn_hidden_size=128)
LENGTH, SAVE_EVERY = 32, 50
TAG = "train/loss"
Family = list[psutil.Process]


@dataclass(frozen=True)
class Blow:
    """Something that happens to a job: what is done, and the exit codes that say so."""

    do: Callable[[Family, random.Random], None]
    codes: tuple[int, ...]


def _to_all(number: int) -> Callable[[Family, random.Random], None]:
    def do(family: Family, draw: random.Random) -> None:
        for process in family:
            process.send_signal(number)

    return do


def _kill_rank(family: Family, draw: random.Random) -> None:
    number = str(draw.randrange(2))
    next(one for one in family if one.environ().get("RANK") == number).kill()


def _fill_disk(family: Family, draw: random.Random) -> None:
    """From now on no file of the job may grow beyond a size that a checkpoint exceeds."""
    for process in family:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))


def _interrupt(family: Family, draw: random.Random) -> None:
    """Ctrl-C reaches the process in front, which passes it on."""
    family[0].send_signal(signal.SIGINT)


BLOWS = {
    "SIGTERM to all": Blow(_to_all(signal.SIGTERM), (75,)),
    "a killed rank": Blow(_kill_rank, (1,)),
    "SIGKILL to all": Blow(_to_all(signal.SIGKILL), (-signal.SIGKILL,)),
    "no room on the disk": Blow(_fill_disk, (1,)),
    "Ctrl-C": Blow(_interrupt, (130,)),
}


def _command(folder: Path, name: str, steps: int) -> list[str]:
    return [
        *(sys.executable, "-m", "nemo_minitron", "distill", f"student={folder}/student"),
        *(f"teacher={folder}/teacher", f"output_dir={folder}/{name}"),
        *(f"data.path={folder}/data.npy", f"data.seq_length={LENGTH}", "data.split=95/5/0"),
        *("data.micro_batch_size=2", "data.global_batch_size=4"),
        *("parallel.pipeline_model_parallel_size=2", f"trainer.max_steps={steps}"),
        *(f"trainer.save_every_n_steps={SAVE_EVERY}", "trainer.async_save=true"),
        *("trainer.limit_val_batches=1", f"trainer.val_check_interval={4 * SAVE_EVERY}"),
        *("trainer.log_every_n_steps=1", "optim.lr=1e-3", "optim.lr_warmup_steps=10"),
    ]


def _newest(folder: Path) -> int:
    """Step of the newest checkpoint of an unfinished run; -1 without one."""
    steps = (folder / "checkpoints").glob("step=*")
    return max((int(path.name[5:]) for path in steps if path.name[5:].isdigit()), default=-1)


def strike(command: list[str], work: Path, name: str, draw: random.Random) -> list[str]:
    """Start the job, let one thing happen to it, and return what was wrong."""
    before, blow = _newest(work), BLOWS[name]
    log = work.with_suffix(".said")
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    while process.poll() is None and _newest(work) <= before:
        time.sleep(0.02)
    time.sleep(draw.uniform(0, 1.5))
    if process.poll() is None:
        first = psutil.Process(process.pid)
        blow.do([first, *first.children(recursive=True)], draw)
    try:
        code = process.wait(120)
    except subprocess.TimeoutExpired:
        process.kill()
        return [f"{name}: the job did not end; {log.read_text()[-500:]}"]
    if code in blow.codes:
        return []
    return [f"{name}: exit code {code}, not {blow.codes}: {log.read_text()[-500:]}"]


def curve(result: Path) -> dict[int, set[float]]:
    """Step -> values of the training loss in TensorBoard's files, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {path.parent for path in result.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    values: dict[int, set[float]] = defaultdict(set)
    steps = [event.step for event in events.Scalars(TAG)]
    for event in events.Scalars(TAG):
        values[event.step].add(event.value)
    if steps != sorted(set(steps)):
        values[-1].add(float("nan"))
    return dict(values)


def soak(folder: Path, steps: int, blows: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Both trainings; returns how often each thing happened, and what was wrong."""
    write_result(folder / "teacher", TEACHER, 1)
    write_result(folder / "student", STUDENT, 2)
    write_npy(folder / "data.npy", 400, LENGTH, TEACHER.vocab_size)
    subprocess.run(_command(folder, "calm", steps), check=True, capture_output=True)
    draw, wrong, happened = random.Random(seed), [], Counter[str]()
    command = _command(folder, "rough", steps)
    names = [list(BLOWS)[number % len(BLOWS)] for number in range(blows)]
    draw.shuffle(names)
    for name in names:
        if (folder / "rough").exists():
            break
        found = strike(command, folder / "rough.partial", name, draw)
        happened[name] += 1
        wrong += found
        step = _newest(folder / "rough.partial")
        sys.stdout.write(f"{sum(happened.values())}: {name}, at step {step}: {found or 'right'}\n")
        sys.stdout.flush()
    subprocess.run(command, check=True, capture_output=True)
    calm, rough = (read_weights(folder / name) for name in ("calm", "rough"))
    wrong += [f"{key} is another" for key in calm if not torch.equal(calm[key], rough[key])]
    curves = [curve(folder / name) for name in ("calm", "rough")]
    if curves[0] != curves[1] or len(curves[0]) != steps:
        odd = [step for step in curves[0] if curves[0][step] != curves[1].get(step)]
        wrong.append(f"TensorBoard: {len(curves[1])} steps of {steps}; other values at {odd[:5]}")
    if sum(happened.values()) < blows:
        wrong.append(f"the training was through after {sum(happened.values())} of {blows} blows")
    return happened, wrong


def main() -> int:
    """Run it and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--blows", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    args = parser.parse_args()
    # A shell ignores Ctrl-C for what it starts in the background, and children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["OMP_NUM_THREADS"] = "1"
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        happened, wrong = soak(Path(folder), args.steps, args.blows, args.seed)
    rows = [[name, str(count)] for name, count in sorted(happened.items())]
    text = markdown_table(("what happened", "times"), rows)
    minutes = (time.monotonic() - begin) / 60
    said = (
        f"{args.steps} steps twice in {minutes:.0f} minutes. Wrong: {len(wrong)} (exit codes, "
        "weights bit for bit, one loss per step in TensorBoard)."
    )
    sys.stdout.write("\n".join([text, said, *wrong]) + "\n")
    if args.write:
        write_block("soak", f"{text}\n\n{said}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
