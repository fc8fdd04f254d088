"""``minitron`` whose training waits before its fourth step for as long as the file HOLD is there.

A job that a test wants to stop is then in the middle of its training, however fast the machine is,
and the checkpoints that it has begun are complete.
"""

import os
import sys
import time
from pathlib import Path

from nemo_minitron.cli import main
from nemo_minitron.runtime import cpu
from nemo_minitron.runtime.extensions import be_quiet


def _hold() -> None:
    be_quiet()
    cpu.install()
    from nemo_minitron.models.gpt import MinitronGPTModel

    step, file = MinitronGPTModel.training_step, Path(os.environ["HOLD"])

    def held_step(self, batch, batch_idx):
        if self.trainer.global_step == 3 and file.exists():
            self.trainer.strategy.settle(wait=True)
        while self.trainer.global_step == 3 and file.exists():
            time.sleep(0.1)
        return step(self, batch, batch_idx)

    MinitronGPTModel.training_step = held_step


if __name__ == "__main__":
    _hold()
    sys.exit(main(sys.argv[1:]))
