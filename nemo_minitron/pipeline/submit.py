"""``minitron submit``: the jobs of a stage or a pipeline as a shell script of ``sbatch`` lines.

Light imports: it runs on a login node. A pipeline becomes one job per item that is not up to date,
each waiting for those whose results it reads, and one last job that writes the report.
"""

import math
import os
import shlex
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import nemo_minitron
from nemo_minitron import usage
from nemo_minitron.checkpoint.output_checks import is_export
from nemo_minitron.config import load
from nemo_minitron.config.parallel import own_ranks
from nemo_minitron.config.pipeline import ClusterConfig
from nemo_minitron.config.stages import (
    STAGE_CONFIGS,
    EvaluateConfig,
    PipelineConfig,
    PruneConfig,
    StageConfig,
)
from nemo_minitron.config.training_stages import TrainingStageConfig
from nemo_minitron.data.checks import check_batches
from nemo_minitron.runtime import streams

REPORT_FLAGS = ("--gpus-per-node=0", "--cpus-per-task=4")


@dataclass(frozen=True)
class Job:
    """One sbatch line.

    Attributes:
        name: of the job and of its log: a stage, or an item of a pipeline.
        stage: whose script runs.
        arguments: of the stage.
        flags: of sbatch, beside those of the cluster.
        after: names of earlier jobs that have to end well first.
        fits: of a job that goes on with fewer nodes, the numbers of nodes that it can use.
    """

    name: str
    stage: str
    arguments: tuple[str, ...]
    flags: tuple[str, ...]
    after: tuple[str, ...] = ()
    fits: tuple[int, ...] = ()


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"submit: {message}; usage: minitron submit <stage> key=value ...")


def parser() -> ArgumentParser:
    """Return arguments of ``minitron submit``."""
    said = "Queue a stage, or every stage of a pipeline, with SLURM; prints the last job's id."
    out = _Parser(prog="minitron submit", description=said, allow_abbrev=False)
    out.add_argument("stage", help="pipeline: a chain of jobs, one for each item that has to run")
    out.add_argument("overrides", nargs="*", metavar="key=value", help="of the stage; cluster.*")
    out.add_argument("--dry-run", action="store_true", help="print the shell script, run nothing")
    out.add_argument("--after", metavar="JOB[:JOB]", help="wait until these jobs have ended well")
    out.add_argument("--config-dir", metavar="DIR", help="look for config files in DIR too")
    return out


def main(arguments: Sequence[str]) -> int:
    """Print or run the script.

    Returns:
        Exit code of ``sbatch``, or 0.

    Raises:
        ValueError: names the key, and what to set.
    """
    given = parser().parse_intermixed_args(arguments)
    text = script(given)
    if given.dry_run:
        return streams.write(text)
    try:
        return subprocess.run(["bash", "-c", text], check=False).returncode
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename} is not here; --dry-run prints the script") from None


def script(given: Namespace) -> str:
    """Return the shell script that submits everything; one path for a dry run and a real one."""
    if given.stage not in STAGE_CONFIGS:
        raise ValueError(usage.unknown_stage(given.stage))
    if not (home() / "launch" / f"{given.stage}.sbatch").is_file():
        raise ValueError(
            f"{given.stage} is not a job for SLURM; run it here: minitron {given.stage}"
        )
    with load.hydra_for(given.config_dir):
        return "\n".join(_lines(given)) + "\n"


def _lines(given: Namespace) -> list[str]:
    ours = [o for o in given.overrides if o.lstrip("+~").startswith(("cluster=", "cluster."))]
    theirs = [o for o in given.overrides if o not in ours]
    composed: Any = load.compose("submit", ours, given.config_dir)
    cluster: ClusterConfig = composed.cluster
    config = load.compose(given.stage, theirs, given.config_dir)
    flags = ("--config-dir", given.config_dir) if given.config_dir else ()
    if isinstance(config, PipelineConfig):
        jobs = list(_chain(config, theirs, flags, cluster))
        logs = Path(config.output_dir) / "slurm"
    else:
        jobs = [_job(given.stage, given.stage, (*_placed(theirs, config), *flags), config, cluster)]
        logs = Path(config.output_dir).parent / "slurm"
    return [*_head(cluster, logs), *_submissions(jobs, cluster, logs, given.after)]


def _placed(overrides: Sequence[str], config: StageConfig) -> list[str]:
    """Return the keys with the composed ``output_dir``, which the job scripts read, too."""
    if f"output_dir={config.output_dir}" in overrides:
        return list(overrides)
    others = [o for o in overrides if not o.startswith("output_dir=")]
    return [*others, load.override("output_dir", config.output_dir)]


def _chain(
    config: PipelineConfig,
    overrides: Sequence[str],
    flags: tuple[str, ...],
    cluster: ClusterConfig,
) -> Iterator[Job]:
    """One job per item that has to run, then the pipeline itself: it skips them and reports."""
    from nemo_minitron.pipeline.plan import read_items, stale

    due: list[str] = []
    items = read_items(config)
    exports = [os.path.abspath(i.config.output_dir) for i in items if i.stage == "export"]
    for item in items:
        item.config.verify_inputs = "size"  # a login node is no place to hash whole models
        after = tuple(name for name in item.needs if name in due)
        if not (after or config.overwrite or stale(item)):
            continue
        due.append(item.name)
        own = (*item.overrides, "overwrite=true", *flags)
        yield _job(item.name, item.stage, own, item.config, cluster, exports, after)
    # The items are made anew by their own jobs, whichever file or key asks for it.
    again = _placed([*overrides, "overwrite=false"] if config.overwrite else overrides, config)
    yield Job("report", "pipeline", (*again, *flags), REPORT_FLAGS, tuple(due))


def _job(
    name: str,
    stage: str,
    arguments: tuple[str, ...],
    config: StageConfig,
    cluster: ClusterConfig,
    exports: Collection[str] = (),
    after: tuple[str, ...] = (),
) -> Job:
    """The job of a stage: one that goes on with fewer nodes where the cluster's keys ask for it."""
    size = _size(config, cluster, exports)
    if size is None:  # the scripts say what these need
        return Job(name, stage, arguments, (), after)
    nodes, per_node = size
    gpus = f"--gpus-per-node={per_node if cluster.gpus_per_node else 0}"
    if cluster.slurm.min_nodes is None or not isinstance(config, TrainingStageConfig):
        tasks = (f"--ntasks={nodes * per_node}", f"--ntasks-per-node={per_node}")
        return Job(name, stage, arguments, (f"--nodes={nodes}", *tasks, gpus), after)
    fits = _fits(config, cluster.slurm.min_nodes, nodes, per_node)
    flags = (f"--nodes={fits[-1]}-{fits[0]}", gpus)
    return Job(name, "elastic", (stage, *arguments), flags, after, fits)


def _size(
    config: StageConfig, cluster: ClusterConfig, exports: Collection[str]
) -> tuple[int, int] | None:
    """Nodes of a stage that runs a model, and ranks on each.

    As many ranks as the layout needs, or all GPUs of ``trainer.num_nodes`` nodes.

    Raises:
        ValueError: the ranks do not spread evenly over whole nodes.
    """
    values: Any = config
    # Without data, pruning needs none but the scores that are there.
    idle = isinstance(config, PruneConfig) and not config.data.given
    if idle or not hasattr(config, "parallel"):
        return None
    export = isinstance(config, EvaluateConfig) and (
        os.path.abspath(config.checkpoint) in exports or is_export(config.checkpoint)
    )
    if export:
        return 1, 1  # lm-eval runs it in one process
    nodes = getattr(getattr(config, "trainer", None), "num_nodes", None) or cluster.slurm.nodes
    per_node = cluster.ranks_per_node
    if nodes is None:
        world = values.parallel.world_size() + own_ranks(config)
        nodes = math.ceil(world / per_node)
        if world % nodes:
            raise ValueError(
                f"the layout needs {world} ranks, which do not spread evenly over {nodes} nodes of "
                f"cluster.gpus_per_node={per_node}; change parallel.data_parallel_size, or set "
                "trainer.num_nodes or cluster.slurm.nodes"
            )
        per_node = world // nodes
    values.parallel.world_size(nodes * per_node - own_ranks(config))
    return nodes, per_node


def _fits(config: TrainingStageConfig, least: int, most: int, per_node: int) -> tuple[int, ...]:
    """Return numbers of nodes on which a training can be, the largest first.

    Raises:
        ValueError: the least or the most of them is none.
    """
    if config.trainer.num_nodes is not None:
        raise ValueError(
            f"trainer.num_nodes={config.trainer.num_nodes} wants as many nodes at every start, and "
            f"cluster.slurm.min_nodes={least} fewer; set cluster.slurm.nodes in place of "
            "trainer.num_nodes"
        )
    if least > most:
        raise ValueError(
            f"cluster.slurm.min_nodes={least} must be at most the nodes of the job, {most}; lower "
            "it, or set cluster.slurm.nodes"
        )
    failures: dict[int, ValueError] = {}
    for nodes in range(least, most + 1):
        try:
            ranks = config.parallel.world_size(nodes * per_node - own_ranks(config))
            for phase in config.phases():
                check_batches(phase.data, config.parallel, ranks)
        except ValueError as error:
            failures[nodes] = error
    fits = tuple(nodes for nodes in range(most, least - 1, -1) if nodes not in failures)
    for nodes in (least, most):
        if nodes in failures:
            raise ValueError(
                f"cluster.slurm.min_nodes={least} lets this training be on {nodes} nodes of "
                f"{per_node} ranks: {failures[nodes]}"
                + (f"; {', '.join(map(str, fits))} nodes would do" if fits else "")
            )
    return fits


def _head(cluster: ClusterConfig, logs: Path) -> Iterator[str]:
    slurm = cluster.slurm
    image = os.environ.get("CONTAINER_IMAGE") or slurm.container_image
    if image is None:
        raise ValueError(
            "no container to run in: set cluster.slurm.container_image=<image> or CONTAINER_IMAGE, "
            "or cluster.slurm.container_image=none to run without"
        )
    values = {"MINITRON_HOME": str(home()), "CONTAINER_IMAGE": image}
    if slurm.container_mounts:
        values["CONTAINER_MOUNTS"] = slurm.container_mounts
    if slurm.env:
        values["CONTAINER_ENV"] = ",".join(slurm.env)
    beside = Path(sys.executable).parent / "minitron"
    if image == "none" and beside.exists():
        values["MINITRON"] = str(beside)
    yield "#!/usr/bin/env bash"
    yield "set -euo pipefail"
    for name, value in {**values, **slurm.env}.items():
        yield f"[[ -n ${{{name}:-}} ]] || export {name}={shlex.quote(str(value))}"
    yield f"mkdir -p {shlex.quote(str(logs))}"
    yield "jobs=()"
    yield """trap '((${#jobs[@]} == 0)) || scancel "${jobs[@]}"' ERR"""


def home() -> Path:
    """Return the folder that holds ``launch/``.

    Raises:
        ValueError: it is not where this package is.
    """
    package = Path(nemo_minitron.__file__).parent
    given = os.environ.get("MINITRON_HOME")
    for folder in [Path(given)] if given else [package, package.parent]:
        if (folder / "launch" / "lib.sh").is_file():
            return folder
    raise ValueError("launch/ is not beside this package; set MINITRON_HOME to the folder it is in")


def _submissions(
    jobs: Sequence[Job], cluster: ClusterConfig, logs: Path, after: str | None
) -> Iterator[str]:
    places = {job.name: number for number, job in enumerate(jobs)}
    for number, job in enumerate(jobs):
        waits = [f"${{jobs[{places[name]}]}}" for name in job.after]
        waits = waits or ([after] if after else [])
        words = ["sbatch", "--parsable", f"--job-name=minitron-{job.name}"]
        words += [f"--output={logs}/%x_%j.log", *job.flags, *_cluster_flags(cluster)]
        line = shlex.join(words)
        if job.fits:
            line = f"MINITRON_NODES={shlex.quote(' '.join(map(str, job.fits)))} {line}"
        if waits:
            line += f' --kill-on-invalid-dep=yes --dependency="afterok:{":".join(waits)}"'
        line += f' "$MINITRON_HOME/launch/{job.stage}.sbatch" {shlex.join(job.arguments)}'
        yield f"job=$({line})"
        yield 'jobs+=("${job%%;*}")'
        yield f'echo "{job.name}: job ${{jobs[{number}]}}" >&2'
    yield 'echo "${jobs[-1]}"'


def _cluster_flags(cluster: ClusterConfig) -> Iterator[str]:
    for name in ("account", "partition", "time"):
        value = getattr(cluster.slurm, name)
        if value is not None:
            yield f"--{name}={value}"
    yield from cluster.slurm.sbatch_args
