"""Task for the rank pool: a search that is killed at a chosen place."""

from unittest.mock import patch

from tests.e2e.bad_input import run_line


class Killed(Exception):
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
            raise Killed
        done["scored"] += 1
        return score(*args)

    def counted_step(*args):
        if done["steps"] == steps:
            raise Killed
        done["steps"] += 1
        return step(*args)

    with (
        patch.object(stage, "_zero_shot", counted_score),
        patch.object(MinitronGPTModel, "training_step", counted_step),
    ):
        run_line(line)
    return done["scored"], done["steps"]
