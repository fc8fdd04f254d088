"""Families and losses of other packages: the one in examples/plugin, installed, and bad ones."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[2]
_ASKS = """
import contextlib, io, json, logging
from nemo_minitron import cli
log = io.StringIO()
logging.basicConfig(stream=log)
shown = io.StringIO()
with contextlib.redirect_stdout(shown):
    assert cli.main(["--help"]) == 0
from nemo_minitron.config.distillation import DistillationConfig
from nemo_minitron.distillation.divergences import LOSSES, loss_function
from nemo_minitron.families.registry import FAMILIES, read_config, written_config
hf = dict(architectures=["PocketForCausalLM"], model_type="pocket", hidden_size=16, vocab_size=32,
          intermediate_size=24, num_attention_heads=4, num_hidden_layers=2)
family, config = read_config(hf)
import torch
from nemo_minitron.distillation.vocab import VocabShard
import torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
def losses(*kinds):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 8, dtype=torch.float64)
    given = DistillationConfig(loss=kinds[0]), VocabShard(dist.group.WORLD, 8, 8)
    found = [loss_function(kind)(student.clone(), teacher.clone(), torch.ones(3).double(), *given)
             for kind in kinds]
    return [sum(x[0].item() for x in found), sum(x[1] for x in found).tolist()]
print(json.dumps([shown.getvalue(), family.name, written_config(config)["model_type"],
    losses("jeffreys"), losses("forward_kl", "reverse_kl"), sorted(FAMILIES), log.getvalue()]))
"""


def bad_package(site: Path) -> None:
    """Entry points that name nothing, and a name that is taken."""
    info = site / "bad-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: bad\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[nemo_minitron.families]\nabsent = no_such_module:FAMILY\nllama = json:loads\n"
    )


def test_the_example_is_used_and_bad_ones_are_named(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(REPO / "examples" / "plugin", source)
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*pip, "--no-index", "--target", site, source], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    bad_package(site)
    done = subprocess.run(
        [sys.executable, "-c", _ASKS],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": f"{site}:{REPO}"},
    )
    assert done.returncode == 0, done.stderr
    shown, family, kind, loss, parts, families, log = json.loads(done.stdout.splitlines()[-1])
    assert "family pocket" in shown
    assert "from minitron-pocket 0.1.0" in shown
    assert (family, kind) == ("pocket", "pocket")
    assert loss == parts
    assert {"llama", "pocket"} <= set(families)
    assert "absent" not in families
    assert "family 'absent' of bad 1.0 cannot be imported and is left out (ModuleNotFound" in log
    assert "family 'llama' of bad 1.0 is left out: another package, or this one, has one" in log
