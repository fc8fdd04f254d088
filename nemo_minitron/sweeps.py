"""Jobs of ``--multirun``: where each writes, and what SLURM's do when they are told to stop."""

import os
import subprocess
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, read_write

from nemo_minitron.config import load
from nemo_minitron.runtime import ranks
from nemo_minitron.runtime.errors import PREEMPTED, StageFailed


def is_sweep_job() -> bool:
    """Whether Hydra composed this job for a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def job_folder(output_dir: str) -> str:
    """Return the folder of a sweep's job: ``<output_dir>/<swept key>=<value>,...``."""
    if not is_sweep_job():
        return output_dir
    from hydra.core.hydra_config import HydraConfig

    settings = HydraConfig.get()
    fixed = set(settings.job.config.override_dirname.exclude_keys)
    pairs = [override.lstrip("+~").partition("=")[::2] for override in settings.overrides.task]
    swept = [(key, value) for key, value in pairs if key not in fixed]
    if not swept or "output_dir" in dict(swept):
        return output_dir
    short = [key.rpartition(".")[2] for key, _ in swept]
    names = short if len({*short}) == len(short) else [key for key, _ in swept]
    values = [_in_a_name(value) for _, value in swept]
    return str(Path(output_dir) / ",".join(map("=".join, zip(names, values, strict=True))))


def _in_a_name(value: str) -> str:
    return value.replace("/", "_")


def _check_names(key: str, values: list[str]) -> None:
    """Refuse values whose jobs would write to one folder."""
    by_name: dict[str, str] = {}
    for value in values:
        other = by_name.setdefault(_in_a_name(value), value)
        if other != value:
            raise ValueError(
                f"{key}={other} and {key}={value} would share the folder {key.rpartition('.')[2]}="
                f"{_in_a_name(value)} of this sweep; run them in two commands, each with an "
                "output_dir of its own"
            )


def move(composed: DictConfig) -> None:
    """Give a sweep's job its folder before what is made from ``output_dir`` is read."""
    if is_sweep_job() and not OmegaConf.is_missing(composed, "output_dir"):
        with read_write(composed):
            composed.output_dir = job_folder(str(composed.output_dir))


def sweep_settings(flags: Namespace, scratch: str) -> list[str]:
    """Return overrides that tell a sweep's jobs which keys are swept, and keep Hydra's files away.

    Hydra writes multirun.yaml before the first job has been checked: into a scratch folder, since
    every job stores its own config. Launchers that submit jobs need a lasting folder instead.

    Raises:
        ValueError: two jobs would write to one folder.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    overrides = OverridesParser.create().parse_overrides(flags.overrides)
    given: dict[str, Any] = {o.key_or_group: o for o in overrides}
    if not flags.multirun and "hydra.mode" not in given:
        return []
    fixed = [key for key, o in given.items() if not o.is_sweep_override()]
    for key, o in given.items():
        if o.is_choice_sweep() and "output_dir" in fixed:
            _check_names(key, list(o.sweep_string_iterator()))
    settings = [load.override("hydra.job.config.override_dirname.exclude_keys", fixed)]
    if "hydra.sweep.dir" not in given:
        folder = scratch
        if "hydra/launcher" in given:
            folder = str(given["output_dir"].value()) if "output_dir" in fixed else "."
        settings.append(load.override("hydra.sweep.dir", folder))
    return settings


def last_line(codes: Sequence[int], failure: StageFailed) -> str:
    """Say why a sweep failed: Hydra's own last line names no cause.

    Args:
        codes: exit codes of the jobs that ran in this process; none where a launcher took them.
        failure: of the first job that failed.
    """
    if len(codes) < 2:
        return str(failure)
    return f"{sum(map(bool, codes))} of {len(codes)} jobs failed, the first one: {failure}"


def requeue() -> None:
    """Put a pre-empted job of ``hydra/launcher=slurm`` back into SLURM's queue; does nothing else.

    Raises:
        SystemExit: instead of a result, so that submitit goes on waiting for one.
    """
    from hydra.core.hydra_config import HydraConfig

    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
        return
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if restarts >= HydraConfig.get().launcher.max_num_timeout:
        return
    if ranks.rank() == 0:
        subprocess.run(["scontrol", "requeue", _this_job()], check=True)
    raise SystemExit(PREEMPTED)


def _this_job() -> str:
    """Name this job for SLURM: the id of one task of an array is also that of the whole array."""
    env = os.environ
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env["SLURM_JOB_ID"]
