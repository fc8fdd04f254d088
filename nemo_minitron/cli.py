"""``minitron <stage> key=value ...``: config -> check -> ranks -> run -> exit code.

Light imports only: what needs torch is imported when a stage runs.
"""

import contextlib
import importlib
import logging
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import nemo_minitron
from nemo_minitron import sweeps, usage
from nemo_minitron.config import load, schema
from nemo_minitron.config.overrides import refuse_blanks
from nemo_minitron.config.parallel import own_ranks
from nemo_minitron.config.stages import (
    STAGE_CONFIGS,
    ImportanceConfig,
    PruneConfig,
    StageConfig,
)
from nemo_minitron.runtime import endings, extensions, peers, ranks, streams, versions
from nemo_minitron.runtime.errors import (
    BAD_INPUT,
    PREEMPTED,
    TERMINATED,
    Ending,
    Preempted,
    RankKilled,
    StageFailed,
    Terminated,
    verdict,
)
from nemo_minitron.runtime.scratch import scratch
from nemo_minitron.runtime.supervise import die_with_parent, killed_by

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code (``usage.EXIT_CODES``)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        return _say(usage.overview())
    if arguments[0] == "--version":
        return _say(nemo_minitron.__version__)
    stage, *rest = arguments
    if stage in usage.COMPLETION_FLAGS:
        return usage.complete(rest)
    others = {"submit": _submit, "status": _status, "from-megatron": _from_megatron}
    if stage in others:
        return others[stage](rest)
    if stage not in STAGE_CONFIGS:
        return _refuse(usage.unknown_stage(stage))
    if "--help" in rest or "-h" in rest:
        return _say(usage.stage_help(stage, usage.config_dir(rest)))
    if stage == "plan" and rest and rest[0] in STAGE_CONFIGS:
        return _plan_one(*rest)
    return _run_hydra(stage, rest)


def _plan_one(stage: str, *arguments: str) -> int:
    """``minitron plan <stage> key=value ...``: a pipeline of that stage alone."""
    from hydra.errors import HydraException

    from nemo_minitron.pipeline.plan import of_one_stage

    try:
        return _run_hydra("plan", of_one_stage(stage, arguments))
    except HydraException as error:
        return _refuse(load.explain(stage, error))
    except ValueError as error:
        return _refuse(str(error))


def _submit(arguments: list[str]) -> int:
    from nemo_minitron.pipeline import submit

    if {"--help", "-h"} & {*arguments}:
        return _say(f"{submit.parser().format_help()}\n{usage.stage_help('submit')}")
    try:
        return submit.main(arguments)
    except ValueError as error:
        return _refuse(str(error))


def _status(arguments: list[str]) -> int:
    from nemo_minitron.reporting import status

    try:
        return status.main(arguments)
    except ValueError as error:
        return _refuse(str(error))


def _from_megatron(arguments: list[str]) -> int:
    """``minitron from-megatron ARGS``: overrides on stdout, what has no key on stderr."""
    stage = None
    if arguments[:1] == ["--stage"] and len(arguments) > 1:
        stage, arguments = arguments[1], arguments[2:]
        if stage not in STAGE_CONFIGS:
            return _refuse(usage.unknown_stage(stage))
    if not arguments or {"--help", "-h"} & {*arguments}:
        return _say(usage.FROM_MEGATRON)
    from nemo_minitron.checkpoint.foreign.argument_list import read
    from nemo_minitron.checkpoint.foreign.argument_overrides import take

    try:
        taken = take(read(arguments))
    except ValueError as error:
        return _refuse(f"from-megatron: {error}")
    for note in taken.comments():
        streams.complain(f"# {note}\n")
    known = [key.name for key in schema.keys(schema.COMMANDS[stage])] if stage else None
    lines = []
    for line in taken.lines():
        key = line.partition("=")[0].lstrip("+")
        if known is None or any(key == k or key.startswith(k + ".") for k in known):
            lines.append(shlex.quote(line))
    return _say("\n".join(lines)) if lines else 0


def _say(text: str) -> int:
    return streams.write(text + "\n")


def _refuse(message: str) -> int:
    streams.complain(f"minitron: {message}\n")
    return BAD_INPUT


def _run_hydra(stage: str, arguments: list[str]) -> int:
    """Hand over to Hydra, which composes the config(s) and calls ``job`` for each."""
    import hydra
    import yaml
    from hydra._internal.utils import get_args_parser
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    # Hydra would answer every exception with exit code 1; this makes it let them through.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    load.register(stage)
    flags, unknown = get_args_parser().parse_known_intermixed_args(arguments)
    codes: list[int] = []

    def job(composed: "DictConfig") -> None:
        load.register(stage)  # a launcher may run this in a process that has not
        code, message = run_job(stage, composed)
        codes.append(code)
        if code == PREEMPTED:
            sweeps.requeue()
        if (
            code and sweeps.is_sweep_job()
        ):  # the launcher has to know, and runs the other jobs still
            raise StageFailed(message, code)

    before = sys.argv
    try:
        ranks.check_launcher()
        refuse_blanks(flags.overrides, unknown)
        others = [a for a in arguments if a not in flags.overrides]
        flags.overrides = overrides = load.opened(flags.overrides)
        load.check_overrides(stage, overrides, flags.config_dir)
        with scratch() as temporary:
            sweep = sweeps.sweep_settings(flags, str(temporary))
            sys.argv = [f"minitron {stage}", *overrides, *sweep, *others]
            folder = str(schema.conf_dir())
            hydra.main(version_base="1.3", config_path=folder, config_name=stage)(job)()
    except StageFailed as failure:
        streams.complain(f"minitron {stage}: {sweeps.last_line(codes, failure)}\n")
        return failure.code
    except (HydraException, OmegaConfBaseException) as error:
        return _refuse(load.explain(stage, error))
    except (ValueError, yaml.YAMLError) as error:
        return _refuse(" ".join(str(error).split()))
    finally:
        sys.argv = before
    return max(codes, default=0)


def run_job(stage: str, composed: "DictConfig") -> tuple[int, str]:
    """Run one composed job, whatever happens in it.

    Returns:
        Exit code, and the line that said why it is not 0.
    """
    extensions.be_quiet()
    known: list[StageConfig] = []
    with endings.taken(f"minitron {stage}", partial(_asked_to_stop, stage, known)):
        try:
            if stage == "pipeline":  # its items name each other's folders
                sweeps.move(composed)
            known.append(load.stage_config(stage, composed))
            if stage != "pipeline":
                known[0].output_dir = sweeps.job_folder(known[0].output_dir)
            with scratch():
                _run(stage, known[0])
        except (Exception, KeyboardInterrupt, Ending) as happened:
            endings.close()  # the launcher of a rank that was killed asks the others to stop
            return _said(stage, _cause(happened), known)
    return 0, ""


def _said(stage: str, error: BaseException, known: Sequence[StageConfig]) -> tuple[int, str]:
    """Say how a job ended, with its traceback where that may help; as ``run_job``."""
    log_path = next((path for path in map(_log_path, known) if os.path.exists(path)), None)
    code, message = verdict(stage, error, log_path)
    if code == 1 and not isinstance(error, StageFailed | RankKilled):
        log.error("%s failed", stage, exc_info=error)
    ranks.leave_verdict(code, message)
    streams.complain(f"minitron {stage}: {message}\n")
    return code, message


def _cause(error: BaseException) -> BaseException:
    """Find why a job ended (a signal, another rank), even if a library raised something else."""
    peers.leave()
    if isinstance(error, StageFailed):
        return error
    if endings.asked() is not None:
        return endings.asked() or error
    if isinstance(error, Exception) and not isinstance(error, ValueError):
        return _killed(peers.killed(wait=1.0)) or error
    return error


def _killed(rank: int | None) -> RankKilled | None:
    return None if rank is None else RankKilled(f"rank {rank} {killed_by(signal.SIGKILL)}")


def _asked_to_stop(stage: str, known: Sequence[StageConfig]) -> Ending:
    """Say what a stop signal does at the moment it arrives."""
    gone = _killed(peers.killed())
    return gone or (_stopped(stage, known[0]) if known else Terminated("a signal asked to stop"))


def _run(stage: str, config: StageConfig) -> None:
    """Check, then run here or in ranks of our own."""
    if ranks.started_by_us():
        die_with_parent()
    ranks.adopt_slurm()
    ranks.set_teacher_ranks(own_ranks(config))
    launched = ranks.launched_world_size()
    ranks.check_nodes(getattr(getattr(config, "trainer", None), "num_nodes", None))
    parallel = getattr(config, "parallel", None)
    world = parallel.world_size(launched) + ranks.teacher_ranks() if parallel else 1
    module = stage_module(stage)
    if parallel:
        ranks.check_launcher()  # what SLURM says of this rank was not there before
        ranks.check_meeting_point()
    if not ranks.started_by_us() and parallel:
        versions.check_megatron()
    with _place(stage, config):
        if not ranks.started_by_us():
            _check(module, config)
        if world > 1 and launched is None:
            ranks.check_fits(world)
            return _start_ranks(stage, config, world)
        if ranks.rank() and stage not in schema.RANKED_STAGES:
            return log.debug("rank 0 alone runs %s", stage)
        from nemo_minitron.runtime.console import log_file

        with log_file(_log_path(config)) if stage != "plan" else contextlib.nullcontext():
            module.run(config)


def _place(stage: str, config: StageConfig) -> contextlib.AbstractContextManager[None]:
    """Hold the place of the result, for all ranks and from before inputs are hashed."""
    if stage == "plan" or ranks.started_by_us() or ranks.rank():
        return contextlib.nullcontext()
    from nemo_minitron.checkpoint.artifact import reserved

    return reserved(config, stage)


def _log_path(config: StageConfig) -> Path:
    from nemo_minitron.checkpoint.output_checks import log_of

    return log_of(config)


def stage_module(stage: str) -> ModuleType:
    """Return the module with the ``check`` and ``run`` of a stage."""
    return importlib.import_module(
        f"nemo_minitron.stages.{'import_' if stage == 'import' else stage}"
    )


def _check(module: ModuleType, config: StageConfig) -> None:
    """Check the user's input; among launched ranks, rank 0 alone hashes whole files."""
    verify = config.verify_inputs
    if ranks.rank():
        config.verify_inputs = "size"
    module.check(config)
    config.verify_inputs = verify


def _start_ranks(stage: str, config: StageConfig, world: int) -> None:
    """Run the stage in ranks of our own; a signal may end them before they know what it means."""
    try:
        ranks.start_ranks(world, _same_job(stage, config))
    except StageFailed as failure:
        if failure.code == TERMINATED:
            raise _stopped(stage, config) from None
        raise


def _stopped(stage: str, config: StageConfig) -> Preempted | Terminated:
    """Say after a stop signal whether the same command resumes or starts over."""
    saves = stage in (
        "data",
        "distill",
        "finetune",
        "teacher_logits",
        "generate",
        "search",
        "pipeline",
    )
    if isinstance(config, ImportanceConfig | PruneConfig):  # what they have to save are scores
        saves = config.data.given and config.save_every_n_samples > 0
    return (Preempted if saves else Terminated)("a signal asked to stop")


def _same_job(stage: str, config: StageConfig) -> list[str]:
    """Return arguments that run this very job again, alone, also when it is part of a sweep."""
    from hydra.core.hydra_config import HydraConfig

    settings = HydraConfig.get()
    of_sweep = ("hydra.mode", "hydra.sweep", "hydra/sweep", "hydra.launch", "hydra/launch")
    dropped = (*of_sweep, "hydra.job.config", "hydra.searchpath")
    ours = [o for o in settings.overrides.hydra if not o.lstrip("+~").startswith(dropped)]
    task = [o for o in settings.overrides.task if not o.startswith("output_dir=")]
    folder = load.override("output_dir", config.output_dir)
    named = ["--config-name", str(settings.job.config_name)]
    return [stage, *task, *ours, folder, *named, *load.config_flags()]
