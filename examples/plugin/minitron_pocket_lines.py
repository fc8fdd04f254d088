"""A logger: a line of JSON for each step that is logged. A run that goes on adds to its file."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class LinesLogger(Logger):
    """Every logger gets ``save_dir``, and what ``exp_manager.loggers`` says beside its name."""

    name, version = "lines", None

    def __init__(self, save_dir: str, file: str = "metrics.jsonl") -> None:
        """Take the folder of this logger, the same when a run goes on, and a name in it."""
        super().__init__()
        self.path = Path(save_dir) / file

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write them."""
        with self.path.open("a") as lines:
            lines.write(json.dumps({"step": step, **metrics}) + "\n")

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: they stand in ``.hydra/`` of the result."""
