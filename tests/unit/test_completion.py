"""Tab completion as a shell does it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
# What bash does at a tab, with the script that `install=bash` prints.
TAB = """
eval "$(minitron --shell-completion install=bash)"
complete -p minitron
COMP_LINE='{line}' COMP_POINT=${{#COMP_LINE}}
read -ra COMP_WORDS <<<"$COMP_LINE"
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
hydra_bash_completion
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("minitron pr", ["prune"]),
        ("minitron prune pruning.target.hid", ["pruning.target.hidden_size="]),
        (
            "minitron distill parallel=tp2",
            ["parallel=tp2", "parallel=tp2_pp2", "parallel=tp2_sp_ep8"],
        ),
        ("minitron submit distill cluster.slurm.acc", ["cluster.slurm.account="]),
    ],
)
def test_tab(tmp_path, line, words):
    script = TAB.format(line=line)
    (tmp_path / "minitron").write_text(f'#!/bin/sh\nexec {sys.executable} -m nemo_minitron "$@"\n')
    (tmp_path / "minitron").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(REPO)}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True)
    rule, *found = done.stdout.split("\n")[:-1]
    assert "-F hydra_bash_completion minitron" in rule, done.stderr
    assert found == words, done.stderr


def test_without_an_action_it_says_how():
    command = [sys.executable, "-m", "nemo_minitron", "--shell-completion"]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.startswith('eval "$(minitron --shell-completion install=bash)"')
