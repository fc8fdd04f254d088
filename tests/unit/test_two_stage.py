"""The shipped two-stage pipeline: killed it ends the same, and a change re-runs what it must."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import fake_stages

ITEMS = (
    "teacher",
    "evaluate_teacher",
    "importance_1",
    "pruned_1",
    "evaluate_pruned_1",
    "distilled_1",
    "evaluate_distilled_1",
    "importance_2",
    "pruned_2",
    "evaluate_pruned_2",
    "distilled_2",
    "evaluate_distilled_2",
    "exported_1",
    "exported_2",
)
# As much of a model as is looked at before anything runs.
MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
}
# One of each stage, and the second distillation.
KILLED = ("teacher", "evaluate_teacher", "importance_1", "pruned_1", "distilled_1", "distilled_2")
# What reads, directly or not, the sizes of the second cut.
AFTER_SECOND = ("pruned_2", "evaluate_pruned_2", "distilled_2", "evaluate_distilled_2")


class Pipeline:
    """Runs ``experiment=quickstart_two_stage`` with stand-ins for its stages."""

    def __init__(self, folder: Path) -> None:
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "config.json").write_text(json.dumps(MODEL))
        (folder / "text.txt").write_text("text")
        self.folder = folder

    def run(self, *overrides: str, **env: str) -> "tuple[int, list[str]]":
        """Exit code, and the names of the items that finished by it."""
        before = {name: self._id(name) for name in ITEMS}
        inputs = ("inputs.model=model", "inputs.text=text.txt", "output_dir=run")
        done = subprocess.run(
            [
                *(sys.executable, "-m", "nemo_minitron", "pipeline"),
                *("experiment=quickstart_two_stage", *inputs, *overrides),
            ],
            env=fake_stages.environment(self.folder, **env),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=250,
        )
        assert done.returncode in (0, -9), done.stderr
        changed = [name for name in ITEMS if self._id(name) != before[name]]
        return done.returncode, changed

    def _id(self, name: str) -> "str | None":
        path = self.folder / "run" / name / "metrics.json"  # holds the number of a process
        return path.read_text() if path.exists() else None

    def results(self) -> "dict[str, object]":
        """What every item left, but for times."""
        manifests = [self.folder / "run" / name / "manifest.json" for name in (*ITEMS, ".")]
        weights = [self.folder / "run" / name / "weights" for name in ITEMS]
        inputs = [json.loads(path.read_text())["inputs"] for path in manifests]
        return {"weights": [path.read_text() for path in weights], "inputs": inputs}


@pytest.mark.timeout(900)
def test_killed_and_started_again(tmp_path):
    """A pipeline killed in any stage goes on to the results of an undisturbed one.

    Its stages are stand-ins; test_resume.py kills a real distillation.
    """
    undisturbed, killed = Pipeline(tmp_path / "undisturbed"), Pipeline(tmp_path / "killed")
    assert undisturbed.run() == (0, [*ITEMS])
    done = 0
    for name in (*KILLED, "exported_2"):
        number = ITEMS.index(name)
        assert killed.run(FAKE_DIE=name) == (-9, [*ITEMS[done:number]])
        done = number
    assert killed.run() == (0, [*ITEMS[done:]])
    assert killed.results() == undisturbed.results()

    # A changed key re-runs exactly what depends on it.
    code, ran = killed.run("inputs.second.ffn_hidden_size=640")
    assert (code, ran) == (0, [*AFTER_SECOND, "exported_2"])
    assert killed.run("inputs.second.ffn_hidden_size=640") == (0, [])
    code, ran = killed.run("inputs.second.ffn_hidden_size=640", "inputs.steps=30")
    assert (code, ran) == (0, [*ITEMS[5:]])
