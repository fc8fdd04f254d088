"""``minitron submit``: the sbatch lines it writes, what it refuses, and the ids it gives back."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_minitron.cli import main
from nemo_minitron.config import load
from nemo_minitron.config.pipeline import SlurmConfig
from nemo_minitron.runtime import ranks

REPO = Path(__file__).parents[2]
DISTILL = ("distill", "student=s", "teacher=t", "data.path=d", "output_dir=runs/a b/d")
BARE = "cluster.slurm.container_image=none"
FEWER = (BARE, "cluster.slurm.min_nodes=3")
CLUSTER = {
    "gpus_per_node": 4,
    "slurm": {
        "account": "me",
        "partition": "gpu",
        "time": "01:00:00",
        "container_image": "/i.sqsh",
        "container_mounts": "/a:/a,/b:/b",
        "sbatch_args": ["--qos=high"],
        "env": {"NCCL_SOCKET_IFNAME": "ib0"},
    },
}
ITEMS: list[dict[str, Any]] = [
    {"name": "teacher", "stage": "import", "config": {"source": "model"}},
    {"name": "scores", "stage": "importance"},
    {"name": "pruned", "stage": "prune"},
    {"name": "exported", "stage": "export", "config": {"checkpoint": "${stage:pruned}"}},
]
ITEMS[1]["config"] = {
    "checkpoint": "${stage:teacher}",
    "data": {"path": "model"},
    "parallel": {"tensor_model_parallel_size": 8, "data_parallel_size": 1},
}
ITEMS[2]["config"] = {
    "checkpoint": "${stage:teacher}",
    "importance": "${stage:scores}",
    "pruning": {"drop_layers": [1]},
}


@pytest.fixture
def submit(tmp_path, monkeypatch, capfd):
    """Run ``minitron submit`` here: exit code, stdout, stderr."""
    for name in [n for n in os.environ if n.startswith(("CONTAINER", "MINITRON", "SLURM"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "file").write_text("x")
    for place, values in {
        "cluster/mine": CLUSTER,
        "experiment/chain": {"stages": ITEMS, "output_dir": "runs/chain"},
    }.items():
        path = tmp_path / "conf" / f"{place}.yaml"
        path.parent.mkdir(parents=True)
        head = "# @package _global_\n" if "experiment" in place else ""
        path.write_text(head + yaml.safe_dump(values, sort_keys=False))

    def run(*arguments: str):
        code = main(["submit", *arguments])
        return (code, *capfd.readouterr())

    return run


def sbatch_lines(text: str) -> "list[list[str]]":
    return [shlex.split(x[len("job=$(") : -1]) for x in text.splitlines() if x.startswith("job=$(")]


MINE = ("--config-dir", "conf", "cluster=mine", "--dry-run")


def test_a_stage_takes_its_nodes_from_the_cluster_file_and_its_keys(submit):
    code, text, _ = submit(*DISTILL, "trainer.num_nodes=2", "parallel=tp2", *MINE, "--after", "7")
    assert code == 0
    (line,) = sbatch_lines(text)
    assert line[:6] == [
        *("sbatch", "--parsable", "--job-name=minitron-distill"),
        *("--output=runs/a b/slurm/%x_%j.log", "--nodes=2", "--ntasks=8"),
    ]
    assert line[6:14] == [
        *("--ntasks-per-node=4", "--gpus-per-node=4", "--account=me", "--partition=gpu"),
        *("--time=01:00:00", "--qos=high", "--kill-on-invalid-dep=yes", "--dependency=afterok:7"),
    ]
    script, *arguments = line[14:]
    assert script == "$MINITRON_HOME/launch/distill.sbatch"
    assert [*DISTILL[1:], "trainer.num_nodes=2", "parallel=tp2"] == arguments[:-2]
    assert arguments[-2:] == ["--config-dir", "conf"]
    for name, value in {
        "CONTAINER_IMAGE": "/i.sqsh",
        "CONTAINER_MOUNTS": "/a:/a,/b:/b",
        "CONTAINER_ENV": "NCCL_SOCKET_IFNAME",
        "NCCL_SOCKET_IFNAME": "ib0",
        "MINITRON_HOME": str(REPO),
    }.items():
        assert f"[[ -n ${{{name}:-}} ]] || export {name}={value}\n" in text


@pytest.mark.parametrize(
    ("keys", "nodes", "per_node"),
    [
        (["parallel=tp2"], 1, 2),
        (["parallel=tp8_sp"], 2, 4),
        (["parallel=tp2", "parallel.data_parallel_size=3"], 2, 3),
        (["parallel=tp2", "cluster.slurm.nodes=3"], 3, 4),
        (["cluster.slurm.nodes=3", "trainer.num_nodes=2"], 2, 4),
    ],
)
def test_as_many_ranks_as_the_layout_needs_or_whole_nodes(submit, keys, nodes, per_node):
    (line,) = sbatch_lines(submit(*DISTILL, *keys, *MINE)[1])
    assert f"--nodes={nodes}" in line
    assert f"--ntasks={nodes * per_node}" in line
    assert f"--gpus-per-node={per_node}" in line


def test_the_script_sees_the_output_folder(submit, tmp_path):
    """Where the results go may stand in a file, or be made of other keys."""
    path = tmp_path / "conf" / "experiment" / "tune.yaml"
    path.write_text("# @package _global_\noutput_dir: runs/tuned\n")
    keys = ("finetune", "checkpoint=t", "data.path=d", BARE)
    code, out, err = submit(*keys, "experiment=tune", *MINE)
    assert code == 0, err
    assert "output_dir=runs/tuned" in sbatch_lines(out)[0]
    code, out, err = submit(*keys, "output_dir=${data.path}/tuned", *MINE)
    assert code == 0, err
    assert [w for w in sbatch_lines(out)[0] if w.startswith("output_dir")] == ["output_dir=d/tuned"]


def test_an_evaluation_without_data_has_its_ranks_too(submit, tmp_path):
    """An exported model is evaluated by one process, whatever the nodes have."""
    keys = ("checkpoint=t", "tasks=[arc_easy]", "output_dir=out", BARE)
    code, out, err = submit("evaluate", *keys, "parallel=tp2", *MINE)
    assert code == 0, err
    assert {"--nodes=1", "--ntasks=2", "--gpus-per-node=2"} <= set(sbatch_lines(out)[0])
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "config.json").write_text("{}")
    code, out, err = submit("evaluate", *keys, *MINE)
    assert code == 0, err
    assert {"--nodes=1", "--ntasks=1", "--gpus-per-node=1"} <= set(sbatch_lines(out)[0])


def test_a_training_may_go_on_with_the_numbers_of_nodes_that_fit(submit):
    """A batch of 8 on nodes of four ranks, TP 2: three nodes would be six replicas."""
    nodes = ("cluster.slurm.min_nodes=1", "cluster.slurm.nodes=4", "parallel=tp2")
    (line,) = sbatch_lines(submit(*DISTILL, "data.global_batch_size=8", *nodes, *MINE)[1])
    assert line[:2] == ["MINITRON_NODES=4 2 1", "sbatch"]
    assert {"--nodes=1-4", "--gpus-per-node=4"} <= {*line}
    assert not any(word.startswith("--ntasks") for word in line)
    script = line.index("$MINITRON_HOME/launch/elastic.sbatch")
    assert line[script + 1 : script + 3] == ["distill", "student=s"]
    evaluate = ("evaluate", "checkpoint=s", "data.path=d", "output_dir=e")
    (line,) = sbatch_lines(submit(*evaluate, *nodes, *MINE)[1])  # it trains nothing
    assert line[0] == "sbatch"
    assert "--nodes=4" in line


def test_a_pipeline_is_a_chain_of_what_is_not_up_to_date(submit):
    chain = ("pipeline", "experiment=chain", "overwrite=true", *MINE)
    teacher, scores, pruned, exported, report = sbatch_lines(submit(*chain)[1])
    deps = [next((x for x in line if "afterok" in x), "") for line in (teacher, scores, pruned)]
    assert deps[0] == ""
    assert deps[1:] == [
        "--dependency=afterok:${jobs[0]}",
        "--dependency=afterok:${jobs[0]}:${jobs[1]}",
    ]
    assert {"--nodes=2", "--ntasks=8"} < {*scores}
    assert not any(flag.startswith(("--nodes", "--gpus")) for flag in teacher + pruned)
    assert "$MINITRON_HOME/launch/export.sbatch" in exported
    assert "overwrite=true" in exported
    at = report.index("$MINITRON_HOME/launch/pipeline.sbatch")
    # Once all of it is there, the pipeline only reports: it must not start over.
    keys = ("experiment=chain", "overwrite=true", "overwrite=false", "output_dir=runs/chain")
    assert report[at + 1 :] == [*keys, "--config-dir", "conf"]
    assert "--output=runs/chain/slurm/%x_%j.log" in report
    assert {"--nodes=2", "--gpus-per-node=0"} & {*report} == {"--gpus-per-node=0"}


def test_finished_items_are_left_out(submit, tmp_path):
    """A result written by the stand-in for ``import``, found by the chain."""
    from tests.helpers import fake_stages

    env = fake_stages.environment(tmp_path)
    one = ["source=model", "verify_inputs=full", "workers=2", "output_dir=runs/chain/teacher"]
    command = [sys.executable, "-m", "nemo_minitron", "import", *one]
    subprocess.run(command, env=env, check=True, timeout=100, capture_output=True)
    assert json.loads(Path("runs/chain/teacher/manifest.json").read_text())["complete"]
    scores, *_ = lines = sbatch_lines(submit("pipeline", "experiment=chain", *MINE)[1])
    assert len(lines) == 4
    assert "--job-name=minitron-scores" in scores
    assert not any("afterok" in word for word in scores)
    Path("model/file").write_text("y")
    assert len(sbatch_lines(submit("pipeline", "experiment=chain", *MINE)[1])) == 5


TOOLS = {
    "sbatch": 'n=$(ls {0}/n* | wc -l); touch {0}/n$n; [ $n = "$FAIL_AT" ] && exit 3; echo "10$n;c"',
    "scancel": 'echo "$@" > {0}/cancelled',
}


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """Stand-ins for the commands of SLURM; sbatch number FAIL_AT fails."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "n0").touch()
    for tool, body in TOOLS.items():
        (folder / tool).write_text("#!/bin/bash\n" + body.format(folder) + "\n")
        (folder / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.mark.parametrize("asks", ["overwrite=true", "++overwrite=true", "file"])
def test_only_the_jobs_of_the_items_make_them_anew(submit, tmp_path, asks):
    """The last job, which writes the report, has neither GPUs nor a reason to run an item."""
    path = tmp_path / "conf" / "experiment" / "chain.yaml"
    keys = [] if asks == "file" else [asks]
    if asks == "file":
        path.write_text(f"{path.read_text()}overwrite: true\n")
    code, text, err = submit("pipeline", "experiment=chain", *keys, *MINE)
    assert code == 0, err
    report = sbatch_lines(text)[-1]
    assert [word for word in report if "overwrite=" in word][-1] == "overwrite=false"
    overrides = report[report.index("$MINITRON_HOME/launch/pipeline.sbatch") + 1 : -2]
    with load.hydra_for("conf"):
        assert not load.compose("pipeline", overrides, "conf").overwrite


def test_the_last_id_is_printed(submit, queue):
    chain = ("pipeline", "experiment=chain", *MINE[:-1])
    code, out, err = submit(*chain)
    assert (code, out) == (0, "105\n")
    assert err.splitlines()[:2] == ["teacher: job 101", "scores: job 102"]
    assert Path("runs/chain/slurm").is_dir()


def test_half_a_chain_is_taken_back(submit, queue, monkeypatch):
    monkeypatch.setenv("FAIL_AT", "3")
    code, out, _ = submit("pipeline", "experiment=chain", *MINE[:-1])
    assert (code, out) == (3, "")
    assert (queue / "cancelled").read_text() == "101 102\n"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ((*DISTILL, "--dry-run"), "no container to run in: set cluster.slurm.container_image="),
        (("distil", BARE, "--dry-run"), "distil is not a stage; did you mean distill?"),
        (("--dry-run",), "usage: minitron submit <stage> key=value"),
        ((*DISTILL, "cluster.slurm.acount=x"), "did you mean cluster.slurm.account?"),
        (("plan", "experiment=quickstart", BARE), "plan is not a job for SLURM; run it here"),
        ((*DISTILL, "student.x=1", BARE), "student.x is not a key of distill"),
        ((*DISTILL, "cluster=mien"), "cluster= is one of cpu, dgx_a100, dgx_h100"),
        ((*DISTILL, "cluster.slurm.nodes=0"), "cluster.slurm.nodes=0 must be at least 1"),
        ((*DISTILL, "trainer.num_nodes=0", BARE), "trainer.num_nodes=0 must be at least 1"),
        ((*DISTILL, "trainer.num_nodes=2", BARE, "parallel=tp3"), "16"),
        ((*DISTILL, *FEWER, "trainer.num_nodes=2"), "set cluster.slurm.nodes in place of trainer."),
        ((*DISTILL, *FEWER), "cluster.slurm.min_nodes=3 must be at most the nodes of the job, 1"),
        (
            (*DISTILL, *FEWER, "cluster.slurm.nodes=4", "data.global_batch_size=32"),
            "lets this training be on 3 nodes of 8 ranks: data.global_batch_size=32 must be a",
        ),
        ((*DISTILL, "--config-dir", "nowhere", BARE), "--config-dir nowhere is not a folder"),
        (
            (*DISTILL, BARE, "cluster.gpus_per_node=2", "parallel=tp3"),
            "the layout needs 3 ranks, which do not spread evenly over 2 nodes",
        ),
    ],
)
def test_refused_before_anything_is_queued(submit, queue, line, says):
    code, out, err = submit(*line)
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1
    assert not (queue / "n1").exists()


def test_flags_are_flags():
    with pytest.raises(ValueError, match="start with a hyphen; qos=high does not"):
        SlurmConfig(sbatch_args=["--exclusive", "qos=high"])


def test_a_time_that_yaml_read_as_a_number(submit, tmp_path):
    """Hydra's YAML takes 12:00:00 without quotes for 43200, and SLURM that for thirty days."""
    path = tmp_path / "conf" / "cluster" / "mine.yaml"
    path.write_text(path.read_text().replace("time: 01:00:00", "time: 12:00:00"))
    assert "time: 12:00:00" in path.read_text()
    code, out, err = submit(*DISTILL, "parallel=tp2", *MINE)
    assert (code, out) == (2, "")
    assert "cluster.slurm.time=43200 must say hours, minutes and seconds" in err
    assert "--time=12:00:00" in submit(*DISTILL, *MINE, "cluster.slurm.time=12:00:00")[1]


def test_without_slurm_it_says_so(submit, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    code, _, err = submit(*DISTILL, BARE)
    assert code == 2
    assert "--dry-run prints the script" in err


@pytest.mark.parametrize(
    ("env", "nodes"),
    [
        ({}, 1),
        ({"RANK": "0", "SLURM_STEP_NUM_NODES": "4"}, 4),
        ({"RANK": "0", "GROUP_WORLD_SIZE": "2", "SLURM_STEP_NUM_NODES": "4"}, 2),
        ({"SLURM_STEP_NUM_NODES": "4"}, 1),
    ],
)
def test_nodes_of_a_run(monkeypatch, env, nodes):
    for name in ("RANK", "GROUP_WORLD_SIZE", "SLURM_STEP_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    ranks.check_nodes(nodes)
    ranks.check_nodes(None)
    with pytest.raises(ValueError, match=f"trainer.num_nodes=9, but this runs on {nodes}"):
        ranks.check_nodes(9)


def test_a_pipeline_runs_on_one_machine(submit, tmp_path):
    config = {"checkpoint": "model", "data": {"path": "model"}, "trainer": {"num_nodes": 2}}
    item = {"name": "big", "stage": "finetune", "config": config}
    values = {"stages": [item], "output_dir": "runs/big"}
    path = tmp_path / "conf" / "experiment" / "big.yaml"
    path.write_text("# @package _global_\n" + yaml.safe_dump(values))
    command = [sys.executable, "-m", "nemo_minitron", "pipeline", "experiment=big"]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [*command, "--config-dir", "conf"], env=env, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2
    assert "big: trainer.num_nodes=2, but a pipeline runs on one machine" in done.stderr
    (line, _) = sbatch_lines(submit("pipeline", "experiment=big", *MINE)[1])
    assert "--nodes=2" in line
