"""One of two ranks that would meet, if the second one did not sleep; ``python -m``, folder."""

import sys
import time
from pathlib import Path

import torch.distributed as dist

from nemo_minitron.runtime.ranks import rank
from nemo_minitron.runtime.watch import Watch


def _meet() -> None:
    dist.barrier(group=dist.group.WORLD)


def _sleep() -> None:
    time.sleep(600)


def _main(folder: Path) -> None:
    dist.init_process_group("gloo")
    _meet()
    watch = Watch(0.02, folder)
    watch.start()
    for step in range(3):  # more than the limit in all
        time.sleep(0.6)
        watch.alive(f"ended step {step}")
    try:
        _sleep() if rank() else _meet()
    finally:
        watch.stop()


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
