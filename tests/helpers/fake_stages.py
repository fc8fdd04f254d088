"""Stand-ins for stage modules, so that the front end is tested without models.

``modules`` gives them by name, for this process; ``environment`` has every Python process that is
started (the ranks of a layout, the items of a pipeline) load them through a sitecustomize module.
"""

import json
import os
import signal
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SITE = """
import sys
from tests.helpers import fake_stages
sys.modules.update(fake_stages.modules())
"""


def environment(tmp_path: Path, **extra: str) -> dict[str, str]:
    """Environment in which every Python process has the fake stages."""
    folder = tmp_path / "site"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(SITE)
    repo = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": f"{folder}:{repo}", **extra}


def modules() -> dict[str, types.ModuleType]:
    """Module name -> stand-in."""
    from nemo_minitron.config.stages import STAGE_CONFIGS

    stages = (stage for stage in STAGE_CONFIGS if stage != "pipeline")
    names = ["import_" if stage == "import" else stage for stage in stages]
    fakes = {f"nemo_minitron.stages.{stage}": fake(stage.rstrip("_")) for stage in names}
    report: Any = types.ModuleType("report")
    report.write_report = lambda folder, cfg: (folder / "report.html").write_text("report")
    return {**fakes, "nemo_minitron.reporting.report": report}


def fake(stage: str) -> types.ModuleType:
    module: Any = types.ModuleType(stage)
    module.check = lambda cfg: _check(stage, cfg)
    module.run = lambda cfg: _run(stage, cfg)
    return module


def _check(stage: str, cfg: Any) -> None:
    from nemo_minitron.checkpoint.artifact import check_output

    check_output(cfg, stage)
    _do(os.environ.get("FAKE_CHECK", ""), stage)


def _run(stage: str, cfg: Any) -> None:
    """Write a file that is a function of config and inputs, as a real stage does."""
    from nemo_minitron.checkpoint.artifact import Ranks, output_folder
    from nemo_minitron.config.identity import config_values
    from nemo_minitron.runtime.ranks import rank

    _note(stage)
    _do(os.environ.get("FAKE_RUN", ""), stage)
    with output_folder(cfg, stage, ranks=Ranks(rank())) as folder:
        if rank() == 0:
            (folder / "weights").write_text(json.dumps(config_values(cfg), sort_keys=True))
            _die(cfg)
            (folder / "metrics.json").write_text(json.dumps({"seconds": os.getpid()}))


def _die(cfg: Any) -> None:
    """End like a node without power, pipeline and all, in the item that FAKE_DIE names."""
    if Path(cfg.output_dir).name == os.environ.get("FAKE_DIE"):
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def _note(stage: str) -> None:
    """Append what this process sees of its ranks to the file named by FAKE_NOTES."""
    if "FAKE_NOTES" in os.environ:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "MASTER_ADDR")
        seen = {name: os.environ.get(name) for name in names}
        with open(os.environ["FAKE_NOTES"], "a") as file:
            file.write(json.dumps({"stage": stage, **seen}) + "\n")


def _do(what: str, stage: str) -> None:
    """``<stage>:<what>`` of FAKE_CHECK and FAKE_RUN."""
    from nemo_minitron.runtime.errors import Preempted

    wanted, _, action = what.partition(":")
    if wanted != stage:
        return
    actions: Mapping[str, Callable[[], None]] = {
        "value_error": lambda: _raise(ValueError("data.path=/nowhere does not exist; set it")),
        "bug": lambda: _raise(RuntimeError("a bug")),
        "preempted": lambda: _raise(Preempted("step 3 of 9 saved")),
        "disk_full": lambda: _raise(OSError(28, "No space left on device")),
        "rank_1_fails": lambda: (
            _raise(ValueError("bad rank")) if os.environ.get("RANK") == "1" else _sleep()
        ),
        "sleep": _sleep,
        "stop_once": lambda: None if "SLURM_RESTART_COUNT" in os.environ else _sleep(),
    }
    actions[action]()


def _raise(error: BaseException) -> None:
    raise error


def _sleep() -> None:
    import time

    time.sleep(60)
