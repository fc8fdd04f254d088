"""How long training waits for a checkpoint, and what SIGKILL leaves of one that is being written.

``python -m benchmarks.async_save [--write]`` from the repository root, about ten minutes on two
cores. Checkpoints of one model (weights and Adam's state, fp32) are written by turns at once and
beside the training, at several layouts; what counts as waiting is everything between two steps.
Then ``minitron finetune`` is killed at random moments while a checkpoint is being written, and
started again, until it is through: all checkpoints that have their name must be whole, and the
final weights those of an undisturbed run. Exit status 1 when the ratio is above 0.2 or a kill left
something wrong.
"""

import argparse
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.distill_step import TEACHER, _config, _fill, clear_gradients, micro_batches
from benchmarks.docs_block import markdown_table, write_block
from nemo_minitron.checkpoint.seals import compare, read_seal
from nemo_minitron.config.parallel import ParallelConfig
from tests.helpers.pool import WorkerPool
from tests.helpers.tiny import LLAMA, read_weights, write_npy, write_result

LIMIT = 0.2
MODEL = replace(TEACHER, num_layers=4, num_attention_heads=8, num_query_groups=4)
LAYOUTS = {
    "1 rank": (1, ParallelConfig()),
    "TP2": (2, ParallelConfig(tensor_model_parallel_size=2)),
    "PP2": (2, ParallelConfig(pipeline_model_parallel_size=2)),
    "DP2": (2, ParallelConfig()),
}


def waits(parallel: ParallelConfig, folder: str, rounds: int) -> dict[bool, list[float]]:
    """Seconds that training waits for each checkpoint, by whether it is written beside it."""
    from nemo_minitron.models.gpt import MinitronGPTModel
    from nemo_minitron.models.saving import Saver
    from nemo_minitron.runtime.launch import init_model_parallel
    from nemo_minitron.runtime.megatron import start_writer_helper

    init_model_parallel(parallel)
    start_writer_helper()
    model = MinitronGPTModel(_config(MODEL, None, parallel, 2, 64, "32"))
    _fill(model.chunks)
    (optimizer,) = model.configure_optimizers()
    batches = micro_batches(2, 64, MODEL.vocab_size)

    def step() -> None:
        clear_gradients(model)
        model.forward_backward(batches)
        optimizer.step()

    found: dict[bool, list[float]] = {False: [], True: []}
    savers = {background: Saver(background) for background in found}
    for number in range(rounds + 1):
        for background, saver in savers.items():
            step()
            target = Path(folder) / f"step={number}"
            seconds = _timed(lambda: saver.save(model.training_state(is_loading=False), target))
            while not _agreed(target.exists()):
                step()
                seconds += _timed(lambda: saver.settle(wait=False))
            if number:  # the first one imports and starts what the others only use
                found[background].append(seconds)
            if torch.distributed.get_rank() == 0:
                shutil.rmtree(target)
            torch.distributed.barrier()
    return found


def _timed(work: Callable[[], None]) -> float:
    torch.distributed.barrier()
    begin = time.perf_counter()
    work()
    torch.distributed.barrier()
    return time.perf_counter() - begin


def _agreed(value: bool) -> bool:
    flag = torch.tensor(float(value))
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
    return bool(flag)


def table(folder: Path, rounds: int) -> tuple[list[list[str]], float]:
    """Median waits by layout, and the largest ratio."""
    pool, rows, worst = WorkerPool(), [], 0.0
    for name, (ranks, parallel) in LAYOUTS.items():
        found = pool.run(ranks, waits, parallel, str(folder / name.replace(" ", "")), rounds)[0]
        at_once, beside = (statistics.median(found[background]) for background in (False, True))
        worst = max(worst, beside / at_once)
        rows.append([name, f"{at_once:.2f}", f"{beside:.2f}", f"{beside / at_once:.2f}"])
    pool.close()
    return rows, worst


def kills(folder: Path, number: int, seed: int) -> list[str]:
    """Kill a training ``number`` times while a checkpoint is written; returns what was wrong."""
    model = replace(LLAMA, hidden_size=512, ffn_hidden_size=2048)
    write_result(folder / "model", model, 1)
    write_npy(folder / "data.npy", 4 * (number + 4), 16, model.vocab_size)
    draw, wrong = random.Random(seed), []
    command = _finetune(folder, "killed", number + 2)
    checkpoints = folder / "killed.partial" / "checkpoints"
    for kill in range(number):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while process.poll() is None and not list(checkpoints.glob("step=*.*.tmp")):
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        output = process.communicate()[0].decode()
        if process.returncode != -signal.SIGKILL:
            wrong.append(f"kill {kill}: ended with {process.returncode}: {output[-500:]}")
        for path in checkpoints.glob("step=*"):
            if path.suffix != ".tmp":
                compare(path, read_seal(path), f"after kill {kill}")
    for name in ("killed", "undisturbed"):
        subprocess.run(_finetune(folder, name, number + 2), check=True, capture_output=True)
    killed, undisturbed = (read_weights(folder / name) for name in ("killed", "undisturbed"))
    differ = [key for key, want in undisturbed.items() if not torch.equal(killed[key], want)]
    return wrong + [f"{key} is other than in an undisturbed run" for key in differ]


def _finetune(folder: Path, name: str, steps: int) -> list[str]:
    return [
        *(sys.executable, "-m", "nemo_minitron", "finetune", f"checkpoint={folder}/model"),
        *(f"output_dir={folder}/{name}", f"data.path={folder}/data.npy", "data.seq_length=16"),
        *("data.global_batch_size=4", f"trainer.max_steps={steps}", "trainer.limit_val_batches=0"),
        *("trainer.save_every_n_steps=1", "trainer.save_top_k=1", "trainer.async_save=true"),
    ]


def main() -> int:
    """Run both parts and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="checkpoints of each kind")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows, worst = table(Path(folder), args.rounds)
        header = ("layout", "at once, s", "beside training, s", "ratio")
        text = markdown_table(header, rows)
        sys.stdout.write(text + "\n")
        wrong = kills(Path(folder), args.kills, args.seed)
    said = f"{args.kills} kills while a checkpoint was written: {len(wrong)} wrong."
    sys.stdout.write("\n".join([said, *wrong]) + "\n")
    if args.write:
        write_block("async_save", f"{text}\n\n{said}")
    return int(bool(wrong) or worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
