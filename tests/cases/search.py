"""Tasks for the rank pool: a search that is killed at a chosen place, or whose ranks are apart."""

import os
import time
from pathlib import Path
from unittest.mock import patch

from tests.helpers.bad_input import Ending, run_line


class KilledError(Exception):
    """Stands for a job that ends without warning."""


def killed_after(line: list[str], candidates: int, steps: int) -> tuple[int, int]:
    """Run a command; end it once so many candidates are scored or steps trained.

    Returns:
        Candidates scored and steps trained by this command.
    """
    from nemo_minitron.models.gpt import MinitronGPTModel
    from nemo_minitron.stages import candidates as stage

    done = {"scored": 0, "steps": 0}
    score, step = stage._zero_shot, MinitronGPTModel.training_step

    def counted_score(*args):
        if done["scored"] == candidates:
            raise KilledError
        done["scored"] += 1
        return score(*args)

    def counted_step(*args):
        if done["steps"] == steps:
            raise KilledError
        done["steps"] += 1
        return step(*args)

    with (
        patch.object(stage, "_zero_shot", counted_score),
        patch.object(MinitronGPTModel, "training_step", counted_step),
    ):
        run_line(line)
    return done["scored"], done["steps"]


def with_slow_reader(line: list[str]) -> Ending:
    """Run a command on ranks of which all but the first take their time to read a file."""
    read = Path.read_text

    def slow(path, *args, **kwargs):
        if os.environ["RANK"] != "0" and path.parent.name == "scored":
            time.sleep(0.3)
        return read(path, *args, **kwargs)

    with patch.object(Path, "read_text", slow):
        return run_line(line)
