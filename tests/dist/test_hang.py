"""Ranks that wait for each other for ever say where they are, and end."""

import json
import os
import subprocess
import sys

from tests.slurm.cluster import free_ports


def test_a_rank_that_sleeps_ends_the_job(tmp_path):
    """Both leave the stacks of their threads and the code on which launch/ requeues."""
    (port,) = free_ports(1)
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    here["MINITRON_VERDICT_FILE"] = str(tmp_path / "verdict.json")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.cases.hang", str(tmp_path / "hung")],
            env={**os.environ, **here, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=100)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [75, 75], said
    for rank, where in enumerate(("in _meet", "in _sleep")):
        assert where in (tmp_path / "hung" / f"rank_{rank}.txt").read_text()
        assert f"hung: rank {rank} ended step 2 " in said[rank]
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert verdict["code"] == 75
    assert "run the same command again to go on" in verdict["message"]
