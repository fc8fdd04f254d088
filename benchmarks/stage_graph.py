"""Many small ``minitron`` stages, each once, in a few processes that stay.

A small model's stage takes less time than importing Megatron, so stages run one after the other
inside long-lived processes. Results stay in a folder: what is there is not run again.
"""

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_minitron.runtime.console import progress
from nemo_minitron.runtime.scratch import scratch


@dataclass(frozen=True)
class Job:
    """One stage.

    Attributes:
        name: folder of its result below the graph's; other jobs need it by this name.
        line: arguments of ``minitron`` without ``output_dir``; ``{name}`` is that job's folder.
        needs: jobs whose results it reads.
    """

    name: str
    line: tuple[str, ...]
    needs: tuple[str, ...] = field(default=())

    def arguments(self, root: Path) -> list[str]:
        """The whole line."""
        folders = {name: str(root / name) for name in self.needs}
        filled = [fill(word, folders) for word in self.line]
        return [*filled, f"output_dir={root / self.name}"]


def fill(word: str, values: dict[str, str]) -> str:
    """Replace every ``{name}`` of ``values``; other braces stay."""
    for name, value in values.items():
        word = word.replace("{" + name + "}", value)
    return word


def run_stage(arguments: list[str], log: str) -> float:
    """Run a stage in this process; everything it prints goes into ``log``.

    Returns:
        Seconds.

    Raises:
        RuntimeError: it failed.
    """
    from nemo_minitron.cli import main

    start = time.monotonic()
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as stream, _output_into(stream.fileno()):
        code = main(arguments)
    if code:
        raise RuntimeError(f"minitron {' '.join(arguments)}: exit code {code}, see {log}")
    return time.monotonic() - start


@contextlib.contextmanager
def _output_into(descriptor: int) -> Iterator[None]:
    """Standard output and error of this process and what it starts go to a file."""
    kept = os.dup(1), os.dup(2)
    try:
        for number in (1, 2):
            os.dup2(descriptor, number)
        yield
    finally:
        for number, before in zip((1, 2), kept, strict=True):
            os.dup2(before, number)
            os.close(before)


def run_graph(
    jobs: Sequence[Job], root: Path, processes: int, stages_each: int | None = None
) -> dict[str, float]:
    """Run the jobs whose results are missing, each when what it needs is there.

    Args:
        jobs: earlier ones go first where there is a choice.
        root: folder of the results.
        processes: stages that run at one time, one thread each.
        stages_each: stages after which a process makes room for a new one; None: any number.
            What a large model leaves behind is gone with its process.

    Returns:
        Seconds of the jobs that ran.

    Raises:
        RuntimeError: a job failed; those that were running are waited for.
    """
    names = {name for job in jobs for name in (job.name, *job.needs)}
    done = {name for name in names if (root / name / "manifest.json").exists()}
    waiting = [job for job in jobs if job.name not in done]
    seconds: dict[str, float] = {}
    running: dict[Future[float], str] = {}
    context = multiprocessing.get_context("spawn")
    # Python 3.10 keeps a process for as many stages as there are.
    renewed: dict[str, Any] = {}
    if sys.version_info >= (3, 11):
        renewed["max_tasks_per_child"] = stages_each
    with (
        scratch(),  # compilers remember paths in it, so that it outlives the stages of a process
        ProcessPoolExecutor(processes, context, initializer=_one_thread, **renewed) as pool,
        progress("stages", len(waiting)) as advance,
    ):
        while waiting or running:
            for job in [job for job in waiting if done.issuperset(job.needs)]:
                if len(running) == processes:
                    break
                log = root / "logs" / f"{job.name.replace('/', '_')}.log"
                running[pool.submit(run_stage, job.arguments(root), str(log))] = job.name
                waiting.remove(job)
            if not running:
                raise ValueError(f"jobs {[job.name for job in waiting]} need what nobody makes")
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                seconds[name] = future.result()
                done.add(name)
                advance(1)
    return seconds


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
