"""``minitron submit pipeline`` on a real SLURM: two nodes, four ranks, and results that last."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers.tiny import read_weights, write_npy
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

CLUSTER = {
    "gpus_per_node": 2,
    "slurm": {
        "partition": "low",
        "time": "00:50:00",
        "container_image": "none",
        "sbatch_args": ["--cpus-per-task=1"],
    },
}
DISTILL = {
    "student": "${stage:pruned}",
    "teacher": "${stage:teacher}",
    "data": {"path": "${inputs.data}", "seq_length": 16, "global_batch_size": 4},
    "parallel": {"tensor_model_parallel_size": 2},
    "trainer": {"max_steps": 3, "limit_val_batches": 0, "num_nodes": 2},
}
ITEMS = [
    {"name": "teacher", "stage": "import", "config": {"source": "${inputs.model}"}},
    {
        "name": "pruned",
        "stage": "prune",
        "config": {"checkpoint": "${stage:teacher}", "pruning": {"drop_layers": [2]}},
    },
    {"name": "distilled", "stage": "distill", "config": DISTILL},
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A tiny Llama, tokens, and the user's own config files."""
    folder = tmp_path_factory.mktemp("chain")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    write_npy(folder / "data.npy", 40, 16, 101)
    values = {"model": f"{folder}/model", "data": f"{folder}/data.npy"}
    experiment = {"inputs": values, "stages": ITEMS, "output_dir": f"{folder}/run"}
    for place, content in {"cluster/here": CLUSTER, "experiment/tiny": experiment}.items():
        path = folder / "conf" / f"{place}.yaml"
        path.parent.mkdir(parents=True)
        head = "# @package _global_\n" if "experiment" in place else ""
        path.write_text(head + yaml.safe_dump(content, sort_keys=False))
    return folder


def submit(slurm: Cluster, inputs: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    line = ["pipeline", "--config-dir", f"{inputs}/conf", "cluster=here", "experiment=tiny"]
    return subprocess.run(
        [sys.executable, "-m", "nemo_minitron", "submit", *line, *arguments],
        env=slurm.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )


def test_import_prune_distill_on_two_nodes(slurm, inputs):
    """One command; the ids it prints are jobs that all end with 0, the last after the others."""
    done = submit(slurm, inputs)
    jobs = dict(line.split(": job ") for line in done.stderr.splitlines() if ": job " in line)
    assert list(jobs) == ["teacher", "pruned", "distilled", "report"]
    assert done.stdout.split() == [jobs["report"]]
    for name, number in jobs.items():
        said = slurm.wait(number, "COMPLETED", limit=900)
        assert said["ExitCode"] == "0:0"
        assert said["JobName"] == f"minitron-{name}"
        assert said["StdOut"] == f"{inputs}/run/slurm/minitron-{name}_{number}.log"
        assert (said["Partition"], said["TimeLimit"]) == ("low", "00:50:00")
    spread = slurm.job(jobs["distilled"])
    assert (spread["NumNodes"], spread["NumTasks"]) == ("2", "4")
    assert spread["TresPerNode"] == "gres:gpu:2"
    results = {item["name"]: inputs / "run" / item["name"] for item in ITEMS}
    assert all(json.loads((p / "manifest.json").read_text())["complete"] for p in results.values())
    assert all((path / ".hydra" / "config.yaml").exists() for path in results.values())
    metrics = json.loads((results["distilled"] / "metrics.json").read_text())
    assert [record["step"] for record in metrics["history"]] == [1, 2, 3]
    before, after = (read_weights(results[name]) for name in ("pruned", "distilled"))
    assert any(not torch.equal(after[key], tensor) for key, tensor in before.items())
    assert (inputs / "run" / "report.html").exists()
    said = slurm.log(jobs["report"])
    assert said.count("up to date, skipped") == 3
    again = submit(slurm, inputs, "--dry-run").stdout
    assert [line for line in again.splitlines() if "sbatch" in line and "report" not in line] == []
