"""The command line: help, refusals, exit codes, ranks and sweeps."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import yaml
from hydra.core.hydra_config import HydraConfig

from nemo_minitron.cli import main
from nemo_minitron.config.stages import STAGE_CONFIGS
from nemo_minitron.runtime import ranks
from tests.helpers import fake_stages

HEAVY = ("torch", "nemo", "megatron", "transformers", "matplotlib")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a command line here and give exit code, stdout, stderr and what appeared on disk."""
    for name, module in fake_stages.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.chdir(tmp_path)
    # What a process of one command leaves behind would reach other tests.
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(logging.getLogger(), "level", logging.INFO)

    def run_line(*arguments: str):
        before = set(tmp_path.rglob("*"))
        code = main(arguments)
        out, err = capsys.readouterr()
        new = {str(p.relative_to(tmp_path)) for p in set(tmp_path.rglob("*")) - before}
        return code, out, err, new

    return run_line


def minitron(tmp_path: Path, *arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
    """Run a command line in a process of its own, with the fake stages in it and in its ranks."""
    return subprocess.run(
        [sys.executable, "-m", "nemo_minitron", *arguments],
        env=fake_stages.environment(tmp_path, **env),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.mark.alone
@pytest.mark.parametrize("arguments", [["--help"], ["prune", "--help"], ["prune", "--cfg", "job"]])
def test_help_is_fast_and_light(arguments):
    """Under a second of work: a machine that is busy or slow to read files does not count."""
    code = (
        "import sys; from nemo_minitron.cli import main; assert main(sys.argv[1:]) == 0; "
        f"assert not set({HEAVY}) & set(sys.modules)"
    )
    seconds = []
    for _ in range(3):  # the machine may be busy: the best of three counts
        start, before = time.monotonic(), os.times()
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
        after = os.times()
        work = after.children_user + after.children_system
        work -= before.children_user + before.children_system
        seconds.append(min(work, time.monotonic() - start))
    assert min(seconds) < 1.0


def test_help_lists_stages_keys_defaults_and_groups(run):
    code, out, _, _ = run("--help")
    assert code == 0
    assert all(stage in out for stage in STAGE_CONFIGS)
    code, out, _, _ = run("distill", "--help")
    assert code == 0
    for text in ("data.seq_length=512", "Tokens of each sample.", "student=???", "optim=", "tp2"):
        assert text in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("prun", "prun is not a stage; did you mean prune?"),
        ("frobnicate", "frobnicate is not a stage; stages: import, data"),
        (
            "prune pruning.target.hiden_size=1",
            "pruning.target.hiden_size is not a key of prune; "
            "did you mean pruning.target.hidden_size?",
        ),
        ("prune hidden_size=1", "did you mean pruning.target.hidden_size?"),
        ("prune +extra=1", "extra is not a key of prune"),
        ("prune workers=abc", "workers: Value 'abc' of type 'str' could not be converted"),
        ("prune workers=0 checkpoint=a output_dir=b", "workers=0 must be at least 1"),
        ("prune", "prune needs output_dir, checkpoint; add output_dir=... checkpoint=..."),
        (
            "prune pruning=mine",
            "Could not find 'pruning/mine'; pruning= is one of glm45_air_82b, llama31",
        ),
        ("prune a=[", "a=[ is not a key=value that Hydra can read"),
        ("prune --config-dir /nowhere", "'/nowhere' not found"),
        ("prune workers=1,2", "Ambiguous value for argument 'workers=1,2'"),
        ("prune experiment=quickstart", "conf/experiment/quickstart.yaml sets model="),
        (
            "prune checkpoint=a output_dir=${oc.env:NOT_SET}/b",
            "prune: output_dir: NOT_SET is not set in the environment; export it, or write "
            "${oc.env:NOT_SET,DEFAULT}\n",
        ),
        (
            "prune checkpoint=${a} output_dir=b",
            "prune: checkpoint: Interpolation key 'a' not found\n",
        ),
        ("pipeline inputs.model=x", "write +inputs.model=... to add it"),
        (
            "pipeline experiment=quickstart stages.pruned.config.workers=3",
            "whose items have numbers from 0; write +change.pruned.workers=... to change",
        ),
        ("plan stages.pruned.name=a", "write +change.pruned.name=... to change a key of the item"),
        ("pipeline experiment=quickstart stages.99.config.workers=3", "index out of range"),
        (
            "distill student=a teacher=b data.path=c output_dir=d data.seq_length=0",
            "data.seq_length=0 must be at least 1",
        ),
    ],
)
def test_refused_in_one_line(run, line, message):
    code, _, err, new = run(*line.split())
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert err.startswith("minitron")
    assert not new


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("prune checkpoint = a", "one word, without blanks: checkpoint=a"),
        ("prune checkpoint =a", "one word, without blanks: checkpoint=a"),
        ("prune checkpoint= a", "one word, without blanks: checkpoint=a"),
        ("prune --checkpoint a", "--checkpoint is not a flag; keys are written without hyphens"),
        ("prune --output-dir=a", "before them: output_dir=a"),
    ],
)
def test_other_programs_ways_to_write_a_key_get_a_hint(run, line, message):
    code, _, err, new = run(*line.split())
    assert (code, new) == (2, set())
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("split", ["99,1,0", "[99,1,0]", "[99, 1, 0]", "'99,1,0'", "99/1/0"])
def test_a_split_may_be_written_in_any_way(run, split):
    arguments = ["student=a", "teacher=b", "data.path=c", "output_dir=d", f"data.split={split}"]
    code, out, err, _ = run("distill", *arguments, "--cfg", "job")
    assert code == 0, err
    found = yaml.safe_load(out)["data"]["split"]
    assert found.replace("/", ",") == "99,1,0"


def test_a_path_may_start_at_home(run, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    code, out, err, _ = run("import", "source=~/model", "output_dir=out", "--cfg", "job")
    assert code == 0, err
    assert yaml.safe_load(out)["source"] == str(tmp_path / "model")


def test_help_knows_the_users_folder_and_which_experiments_a_stage_takes(run, tmp_path):
    for name, text in {
        "trainer/short": "max_steps: 7\n",
        "experiment/wide": "# @package _global_\ntrainer: {max_steps: 7}\n",
    }.items():
        (tmp_path / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / f"{name}.yaml").write_text(text)
    _, out, _, _ = run("distill", "--config-dir", "conf", "--help")
    assert "short" in out
    assert "wide" in out
    assert "quickstart" not in out
    _, out, _, _ = run("pipeline", "--config-dir=conf", "--help")
    assert "quickstart" in out
    assert "wide" not in out


def test_hydra_searchpath_reaches_the_items_of_a_pipeline(run, tmp_path):
    (tmp_path / "own" / "trainer").mkdir(parents=True)
    (tmp_path / "own" / "trainer" / "short.yaml").write_text("max_steps: 7\n")
    config = "{checkpoint: a, data.path: b, trainer: short}"
    arguments = (
        f"hydra.searchpath=['file://{tmp_path / 'own'}']",
        f"stages=[{{name: t, stage: finetune, config: {config}}}]",
        "output_dir=x",
    )
    code, _, err, _ = run("pipeline", *arguments)
    assert code == 2
    assert "trainer/short" not in err  # found; what stops it is that there is no model
    assert "data.path=b does not exist" in err


def test_a_result_with_its_config_and_log(run):
    Path("model").mkdir()
    Path("model/file").write_text("x")
    code, _, err, new = run(
        "prune", "checkpoint=model", "output_dir=out/pruned", "pruning.drop_layers=[2]"
    )
    assert code == 0, err
    assert new == {"out", "out/pruned.log", "out/pruned"} | {
        f"out/pruned/{name}"
        for name in (
            "weights",
            "metrics.json",
            "manifest.json",
            ".hydra",
            ".hydra/config.yaml",
            ".hydra/overrides.yaml",
            ".hydra/hydra.yaml",
        )
    }
    config = yaml.safe_load(Path("out/pruned/.hydra/config.yaml").read_text())
    assert config["pruning"]["drop_layers"] == [2]
    assert yaml.safe_load(Path("out/pruned/.hydra/overrides.yaml").read_text()) == [
        "checkpoint=model",
        "output_dir=out/pruned",
        "pruning.drop_layers=[2]",
    ]
    assert "hydra" in yaml.safe_load(Path("out/pruned/.hydra/hydra.yaml").read_text())
    code, _, err, _ = run("prune", "checkpoint=model", "output_dir=out/pruned")
    assert code == 2
    assert "already holds a complete result; set overwrite=true or another output_dir" in err


@pytest.mark.parametrize(
    ("action", "code", "last"),
    [
        ("value_error", 2, "data.path=/nowhere does not exist; set it"),
        ("preempted", 75, "run the same command again to go on"),
        ("disk_full", 1, "free some space or set another output_dir, then run the same command"),
        ("bug", 1, "the traceback is in out.log"),
    ],
)
def test_exit_codes_and_last_lines(run, monkeypatch, tmp_path, action, code, last):
    (tmp_path / "model.gguf").write_text("x")
    monkeypatch.setenv("FAKE_RUN", f"import:{action}")
    got, _, err, _ = run("import", "source=model.gguf", "output_dir=out")
    assert got == code
    assert last in err.splitlines()[-1]
    assert "Traceback" in (tmp_path / "out.log").read_text()
    assert ("Traceback" in err) == (code == 1)
    assert not (tmp_path / "out.partial").exists()


def test_a_failed_check_writes_nothing(run, monkeypatch, tmp_path):
    (tmp_path / "model.gguf").write_text("x")
    monkeypatch.setenv("FAKE_CHECK", "import:value_error")
    code, _, err, new = run("import", "source=model.gguf", "output_dir=deep/out")
    assert (code, new) == (2, set())
    assert err == "minitron import: data.path=/nowhere does not exist; set it\n"


def test_sweep_gives_every_job_its_folder(run, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/file").write_text("x")
    code, _, err, _ = run(
        "prune",
        "-m",
        "checkpoint=model",
        "output_dir=sweep",
        "pruning.target.ffn_hidden_size=1024,512",
        "pruning.target.num_layers=3",
    )
    assert code == 0, err
    folders = {p.name for p in (tmp_path / "sweep").iterdir() if p.is_dir()}
    assert folders == {"ffn_hidden_size=1024", "ffn_hidden_size=512"}
    assert not list(tmp_path.rglob("multirun*"))
    values = json.loads((tmp_path / "sweep/ffn_hidden_size=512/weights").read_text())
    assert values["pruning.target.ffn_hidden_size"] == 512


def test_sweep_runs_all_jobs_and_reports_the_bad_one(run, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/file").write_text("x")
    code, _, err, _ = run("prune", "-m", "checkpoint=model", "output_dir=a,b", "workers=0,1")
    assert code == 2
    last = err.splitlines()[-1]
    assert last == "minitron prune: 2 of 4 jobs failed, the first one: workers=0 must be at least 1"
    assert not (tmp_path / "a/manifest.json").exists() or (tmp_path / "b/manifest.json").exists()


def test_jobs_of_a_sweep_that_would_share_a_folder(run, tmp_path):
    """In which the second would find the result of the first, or replace it."""
    line = ["prune", "-m", "output_dir=sweep", "pruning.target.num_layers=3"]
    code, _, err, new = run(*line, "checkpoint=runs/a/b,runs/a_b,runs/c")
    assert code == 2
    assert not new
    assert (
        "checkpoint=runs/a/b and checkpoint=runs/a_b would share the folder checkpoint=runs" in err
    )
    for path in ("a/b", "c_b"):
        (tmp_path / "runs" / path).mkdir(parents=True)
        (tmp_path / "runs" / path / "file").write_text("x")
    code, _, err, _ = run(*line, "checkpoint=runs/a/b,runs/c_b")
    assert code == 0, err
    names = {p.name for p in (tmp_path / "sweep").iterdir() if p.is_dir()}
    assert names == {"checkpoint=runs_a_b", "checkpoint=runs_c_b"}


def test_config_dir_adds_groups_and_entries(run, tmp_path):
    for name in ("conf/pruning", "conf/mine", "model"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "conf/pruning/small.yaml").write_text("target: {num_layers: 7}\n")
    (tmp_path / "conf/mine/w.yaml").write_text("# @package _global_\nworkers: 5\n")
    arguments = ["prune", "--config-dir", "conf", "pruning=small", "+mine=w", "--cfg", "job"]
    code, out, err, _ = run(*arguments)
    assert code == 0, err
    config = yaml.safe_load(out)
    assert config["pruning"]["target"]["num_layers"] == 7
    assert config["workers"] == 5


def test_starts_the_ranks_a_layout_needs(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/file").write_text("x")
    line = ["evaluate", "checkpoint=model", "data.path=model", "output_dir=out"]
    notes = tmp_path / "notes"
    env = {"FAKE_NOTES": str(notes)}
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        os.environ.pop(name, None)
    done = minitron(tmp_path, *line, "parallel=tp2", **env)
    assert done.returncode == 0, done.stderr
    seen = [json.loads(text) for text in notes.read_text().splitlines()]
    assert sorted((s["RANK"], s["WORLD_SIZE"]) for s in seen) == [("0", "2"), ("1", "2")]
    if not ranks.visible_gpus():
        cores = len(os.sched_getaffinity(0))
        assert {s["OMP_NUM_THREADS"] for s in seen} == {str(max(1, cores // 2))}
    assert (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize(
    ("action", "code", "last"),
    [("preempted", 75, "run the same command again"), ("rank_1_fails", 2, "bad rank")],
)
def test_exit_code_and_message_of_a_rank_come_through(tmp_path, action, code, last):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/file").write_text("x")
    line = ["evaluate", "checkpoint=model", "data.path=model", "output_dir=out", "parallel=tp2"]
    done = minitron(tmp_path, *line, FAKE_RUN=f"evaluate:{action}")
    assert done.returncode == code, done.stderr
    assert last in done.stderr.splitlines()[-1]


def test_no_rank_outlives_a_killed_parent(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/file").write_text("x")
    notes = tmp_path / "notes"
    line = ["evaluate", "checkpoint=model", "data.path=model", "output_dir=out", "parallel=tp2"]
    env = fake_stages.environment(tmp_path, FAKE_RUN="evaluate:sleep", FAKE_NOTES=str(notes))
    parent = subprocess.Popen([sys.executable, "-m", "nemo_minitron", *line], env=env, cwd=tmp_path)
    while not notes.exists() or len(notes.read_text().splitlines()) < 2:
        assert parent.poll() is None
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while _mentioning(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _mentioning(str(tmp_path))


def _mentioning(text: str) -> list[str]:
    """Processes whose environment mentions ``text``."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if path.name != str(os.getpid()) and text in (path / "environ").read_text():
                found.append(path.name)
        except (OSError, UnicodeDecodeError):
            continue
    return found


_DATA = ("data.path=model.gguf", "output_dir=out")
STOPPED: dict[str, tuple[int, tuple[str, ...]]] = {
    "import": (143, ("import", "source=model.gguf", "output_dir=out")),
    "importance": (75, ("importance", "checkpoint=model.gguf", *_DATA)),
    "no_state": (143, ("importance", "checkpoint=model.gguf", "save_every_n_samples=0", *_DATA)),
    "distill": (75, ("distill", "student=model.gguf", "teacher=model.gguf", *_DATA)),
    "ranks": (143, ("evaluate", "checkpoint=model.gguf", "parallel=tp2", *_DATA)),
}


@pytest.mark.parametrize("case", STOPPED)
def test_sigterm(tmp_path, case):
    """75 where the same command goes on, 143 where it starts over; no empty folder is left."""
    code, (stage, *keys) = STOPPED[case]
    notes = tmp_path / "notes"
    (tmp_path / "model.gguf").write_text("x")
    env = fake_stages.environment(tmp_path, FAKE_RUN=f"{stage}:sleep", FAKE_NOTES=str(notes))
    line = [sys.executable, "-m", "nemo_minitron", stage, *keys]
    child = subprocess.Popen(line, env=env, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not notes.exists():
        time.sleep(0.05)
    child.terminate()
    said = child.communicate(timeout=30)[1]
    assert child.returncode == code, said
    assert "run the same command again" in said.splitlines()[-1]
    assert not (tmp_path / "out.partial").exists()


def test_a_wheel_brings_its_config_files(tmp_path):
    """The wheel is unpacked, not installed: its dependencies are those of this environment."""
    repo = Path(__file__).parents[2]
    source = tmp_path / "source"
    for name in ("nemo_minitron", "conf", "launch"):
        shutil.copytree(repo / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(repo / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*pip, "-w", tmp_path, source], check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        wheel.extractall(tmp_path / "site")
    conf = {f"nemo_minitron/{p.relative_to(repo)}" for p in (repo / "conf").rglob("*.yaml")}
    modules = {str(p.relative_to(repo)) for p in (repo / "nemo_minitron").rglob("*.py")}
    assert conf | modules <= names
    shutil.rmtree(source)
    line = ["prune", "pruning=llama31_minitron_4b_width", "--cfg", "job"]
    code = (
        "import nemo_minitron, sys; from nemo_minitron.cli import main; "
        "assert 'site' in nemo_minitron.__file__; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *line],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "hidden_size: 3072" in done.stdout


def test_layout_must_fit_the_launcher(run, monkeypatch, tmp_path):
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    line = ["evaluate", "checkpoint=model", "data.path=model", "output_dir=out", "parallel=tp2"]
    code, _, err, _ = run(*line)
    assert code == 2
    assert "the launcher started 3 ranks" in err


@pytest.mark.parametrize(
    ("env", "says"),
    [
        (
            {"RANK": "0"},
            "RANK=0 is in the environment without WORLD_SIZE; start all ranks with srun",
        ),
        ({"RANK": "x"}, "RANK=x in the environment is not a number; start all ranks with srun"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment is not a number"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1 in the environment is not a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 in the environment must be below WORLD_SIZE=2;"),
    ],
)
def test_what_no_launcher_says(run, monkeypatch, env, says):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    code, out, err, new = run("import", "source=model", "output_dir=out")
    assert (code, out, new) == (2, "", set())
    assert err.startswith(f"minitron: {says}")


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"RANK": "0"}, "RANK=0 and WORLD_SIZE=2 are in the environment without MASTER_ADDR"),
        ({"RANK": "1", "MASTER_ADDR": "localhost"}, "without MASTER_PORT, where the ranks meet"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "RANK=0 is in the environment without WORLD_SIZE"),
    ],
)
def test_ranks_that_could_not_meet(run, monkeypatch, tmp_path, env, says):
    """They are told before their input is looked at, and not after it has been hashed."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"WORLD_SIZE": "2"} | env).items():
        monkeypatch.setenv(name, value)
    line = ["evaluate", "checkpoint=none", "data.path=none", "output_dir=out", "parallel=tp2"]
    code, _, err, _ = run(*line)
    assert code == 2
    assert says in err


SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "8"}
SRUN |= {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "localhost,b[3-4]"}


@pytest.fixture
def slurm(monkeypatch):
    for name in [n for n in os.environ if n.startswith("SLURM")]:
        monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what adopt_slurm sets is undone
        monkeypatch.delenv(name)
    return lambda env: [monkeypatch.setenv(name, value) for name, value in env.items()]


def test_srun_tells_each_task_who_it_is(slurm):
    slurm(SRUN)
    ranks.adopt_slurm()
    assert (ranks.rank(), ranks.launched_world_size()) == (5, 8)
    assert os.environ["LOCAL_RANK"] == "1"
    assert os.environ["MASTER_ADDR"] == "localhost"
    assert 1024 < int(os.environ["MASTER_PORT"]) < 65536


@pytest.mark.parametrize(
    "without",
    [
        {"SLURM_STEP_ID": None, "SLURM_STEP_NUM_TASKS": None, "SLURM_NTASKS": "8"},  # sbatch script
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_PROCID": None},
    ],
)
def test_outside_a_parallel_step_a_process_is_alone(slurm, without):
    slurm({k: v for k, v in {**SRUN, **without}.items() if v is not None})
    ranks.adopt_slurm()
    assert ranks.launched_world_size() is None


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("localhost", "localhost"),
        ("nowhere-x[03-07,9],b", "10.0.0.1"),
        ("node-a[03-07,9],b", "node-a03"),
        ("node-r[2,4]c[01-16],node-b", "node-r2c01"),
        ("node-r[2-4]-gpu,b", "node-r2-gpu"),
        ("node-x[0A0-0A3]", "node-x0A0"),
        ("", "10.0.0.1"),
    ],
)
def test_first_node_or_what_resolves(monkeypatch, nodes, host):
    def resolves(name):
        if not name.startswith(("localhost", "node-")) or "[" in name:
            raise OSError

    monkeypatch.setattr(ranks.socket, "gethostbyname", resolves)
    env = {"SLURM_JOB_NODELIST": nodes, "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"}
    assert ranks._first_node(env) == host


@pytest.mark.parametrize(("visible", "own"), [(8, 3), (1, 0)])
def test_a_rank_that_sees_its_own_gpu_alone(monkeypatch, visible, own):
    """The third task of a node under srun's --gpus-per-task=1, and without it."""
    import torch

    from nemo_minitron.runtime import launch

    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert launch.device() == torch.device("cuda", own)


def test_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(ranks, "visible_gpus", lambda: 2)
    with pytest.raises(ValueError, match="needs 4 ranks but this machine shows 2 GPUs"):
        ranks.check_fits(4)
    ranks.check_fits(2)
