"""Plugins: the one in examples/plugin, installed, and faulty ones."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import LlamaConfig, LlamaForCausalLM

REPO = Path(__file__).parents[2]
_ASKS = """
import contextlib, io, json, logging
log = io.StringIO()
logging.basicConfig(stream=log)
from nemo_minitron import cli
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
        "[nemo_minitron.axes]\nodd = json:loads\n"
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the example is installed."""
    folder = tmp_path_factory.mktemp("plugin")
    source, site = folder / "source", folder / "site"
    shutil.copytree(REPO / "examples" / "plugin", source)
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*pip, "--no-index", "--target", site, source], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return site


def python(*arguments: str, paths: list[Path], folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": ":".join(map(str, [*paths, REPO]))},
    )


def test_the_example_is_used_and_bad_ones_are_named(site: Path, tmp_path: Path) -> None:
    bad_package(tmp_path)
    done = python("-c", _ASKS, paths=[site, tmp_path], folder=tmp_path)
    assert done.returncode == 0, done.stderr
    shown, family, kind, loss, parts, families, log = json.loads(done.stdout.splitlines()[-1])
    names = ("family pocket", "criterion read_weights", "loss jeffreys", "axis head_dim")
    for added in (*names, "logger lines"):
        assert added in shown
    assert "from minitron-pocket 0.1.0" in shown
    assert (family, kind) == ("pocket", "pocket")
    assert loss == parts
    assert {"llama", "pocket"} <= set(families)
    assert "absent" not in families
    assert "family 'absent' of bad 1.0 cannot be used and is left out (ModuleNotFound" in log
    assert "axis 'odd' of bad 1.0 cannot be used and is left out (AttributeError" in log
    assert "family 'llama' of bad 1.0 is left out: another package, or this one, has one" in log


def pocket(folder: Path) -> None:
    """A random Pocket as a Hugging Face folder, and token ids."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=128, num_hidden_layers=2, **sizes)).save_pretrained(
        folder / "model"
    )
    path = folder / "model" / "config.json"
    named = {"architectures": ["PocketForCausalLM"], "model_type": "pocket"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **named}))
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, 128, (8, 16)))


@pytest.mark.timeout(600)
def test_a_pipeline_uses_family_criterion_and_loss_by_name(site: Path, tmp_path: Path) -> None:
    """Scores of two ranks are those of one, times the norms of the weights that read them."""
    pocket(tmp_path)
    inputs = [
        "inputs.model=model",
        "inputs.data=ids.npy",
        "experiment=pocket",
        "inputs.tensor_parallel=2",
    ]
    command = ["-m", "nemo_minitron", "pipeline", "--config-dir", str(REPO / "examples/plugin")]
    for code in (75, 0):  # stopped after two steps, and gone on with
        inputs_now = [*inputs, "inputs.steps=4", "+change.distilled.trainer.exit_interval=2"]
        done = python(*command, *inputs_now, paths=[site], folder=tmp_path)
        assert done.returncode == code, done.stderr
        assert "Trainer.fit" not in done.stdout + done.stderr  # Lightning's own lines
    plain = [
        "checkpoint=pocket/teacher",
        "data.path=ids.npy",
        "data.seq_length=16",
        "data.num_samples=null",
    ]
    command = ["-m", "nemo_minitron", "importance", *plain, "scores.axes=[ffn]", "output_dir=plain"]
    done = python(*command, paths=[site], folder=tmp_path)
    assert done.returncode == 0, done.stderr
    weights = load_file(tmp_path / "model" / "model.safetensors")
    norms = [weights[f"model.layers.{n}.mlp.down_proj.weight"].norm(dim=0) for n in range(2)]
    scores, values = (
        load_file(tmp_path / run / "scores.safetensors")["ffn"]
        for run in ("pocket/importance", "plain")
    )
    torch.testing.assert_close(scores, values * torch.stack(norms), rtol=1e-5, atol=0)
    logs = tmp_path / "pocket" / "distilled" / "logs"
    lines = [
        json.loads(line) for line in (logs / "lines" / "metrics.jsonl").read_text().splitlines()
    ]
    events = EventAccumulator(str(logs))
    events.Reload()
    for name in set(events.Tags()["scalars"]) - {"hp_metric"}:  # TensorBoard's own
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        logged = [(line["step"], line[name]) for line in lines if name in line]
        assert [step for step, _ in logged] == [step for step, _ in shown]
        np.testing.assert_allclose([v for _, v in logged], [v for _, v in shown], rtol=1e-6)
    assert [line["step"] for line in lines if "train/loss" in line] == [*range(4)]
    exported = json.loads((tmp_path / "pocket" / "exported" / "config.json").read_text())
    sizes = [exported[name] for name in ("model_type", "intermediate_size", "head_dim")]
    assert sizes == ["pocket", 64, 8]
    said = (tmp_path / "pocket" / "exported" / "README.md").read_text()
    assert "ffn, head_dim by `read_weights`" in said
    assert "`distillation.loss=jeffreys`" in said
