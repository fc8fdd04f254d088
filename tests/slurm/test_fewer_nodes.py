"""A job that loses a node, on a real SLURM: it goes on where it was, on one node fewer."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers.data_fixtures import write_pair
from tests.helpers.tiny import LLAMA, read_weights, write_result
from tests.slurm.cluster import wait
from tests.slurm.test_requeue import held, sbatch

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

STUDENT = replace(LLAMA, hidden_size=48, ffn_hidden_size=64, num_layers=2)
STEPS = 6
ONE_OR_TWO = ("--nodes=1-2", "--gpus-per-node=2", "--mincpus=2")


def distill(folder: Path, name: str) -> "list[str]":
    return [
        f"student={folder}/student",
        f"teacher={folder}/teacher",
        f"output_dir={folder}/{name}",
        f"data.blend=[3,{folder}/s0,1,{folder}/s1]",
        "data.seq_length=16",
        "data.global_batch_size=4",
        f"trainer.max_steps={STEPS}",
        "trainer.limit_val_batches=0",
        "trainer.save_every_n_steps=2",
        "trainer.async_save=true",
        "optim.lr=1e-2",
    ]


def test_a_distillation_that_loses_a_node_ends_as_an_undisturbed_one(mortal, tmp_path):
    """DP 4 on 2 nodes, a checkpoint beside the training, one node dies; then DP 2.

    The ranks that are left see closed connections and fail; the script finds that a node does not
    answer.
    """
    write_result(tmp_path / "teacher", LLAMA, 1)
    write_result(tmp_path / "student", STUDENT, 2)
    for source in range(2):
        write_pair(tmp_path / f"s{source}", 8 + 4 * source, seed=source)
    env = {**held(tmp_path), "SRUN_ARGS": "--wait=2"}
    keys = distill(tmp_path, "lost")
    number = sbatch(mortal, tmp_path, "elastic", ONE_OR_TWO, "distill", *keys, env=env)
    alone = [sys.executable, "-m", "nemo_minitron", "distill", *distill(tmp_path, "undisturbed")]
    subprocess.run(alone, env=mortal.environment(), check=True, timeout=300)
    saved = tmp_path / "lost.partial" / "checkpoints" / "step=2"
    wait(saved.exists, "a checkpoint", lambda: mortal.log(number), 300)
    assert mortal.job(number)["NumNodes"] == "2"
    mortal.kill_node("n2")
    Path(env["HOLD"]).unlink()
    said = f"seconds for SLURM to requeue job {number}"
    wait(lambda: said in mortal.log(number), said, lambda: mortal.log(number), 300)
    mortal.scontrol("update", "nodename=n2", "state=down", "reason=test")  # as SlurmdTimeout does
    done = mortal.wait(number, "COMPLETED")
    assert (done["ExitCode"], done["Restarts"], done["NodeList"]) == ("0:0", "1", "n1")
    assert "going on from" in mortal.log(number)
    curves = []
    for name in ("lost", "undisturbed"):
        history = json.loads((tmp_path / name / "metrics.json").read_text())["history"]
        assert [record["step"] for record in history] == [*range(1, STEPS + 1)]
        curves.append([record["loss"] for record in history])
    torch.testing.assert_close(*map(torch.tensor, curves), rtol=0, atol=1e-5)
    got, want = (read_weights(tmp_path / name) for name in ("lost", "undisturbed"))
    for name, tensor in want.items():  # sums in another order, which Adam makes larger
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=2e-5)
