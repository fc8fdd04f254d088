"""``trainer.phases``: one training whose samples and batches change, at each layout and resumed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_minitron.config.load import override
from tests.helpers.bad_input import done, run_line, write_pair
from tests.helpers.history import without_speed
from tests.helpers.tiny import LLAMA, read_weights, write_result

LENGTH, BATCH, STEPS = 16, 4, 4
PAIRS = ("short", "long", "more")
SECOND: dict[str, Any] = {
    "seq_length": 32,
    "micro_batch_size": 2,
    "global_batch_size": 8,
    "blend": [{"weight": 3, "path": "long"}, {"weight": 1, "path": "more"}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two models, corpora in Megatron's form, and rows of ids."""
    path, draw = tmp_path_factory.mktemp("phases"), np.random.default_rng(0)
    write_result(path / "teacher", LLAMA, 1)
    write_result(path / "student", replace(LLAMA, ffn_hidden_size=64), 2)
    for name in PAIRS:
        write_pair(path / name, [80 + n % 7 for n in range(40)])
        ids = draw.integers(0, LLAMA.vocab_size, sum(80 + n % 7 for n in range(40)))
        ids.astype(np.uint16).tofile(path / f"{name}.bin")
    rows = draw.integers(0, LLAMA.vocab_size, (STEPS * BATCH, LENGTH))
    np.save(path / "rows.npy", rows)
    np.save(path / "last.npy", rows[2 * BATCH :])
    return path


def _line(folder: Path, stage: str, out: str, phases: list[dict[str, Any]], **keys: Any) -> Any:
    models = {"student": "student", "teacher": "teacher"}
    if stage == "finetune":
        models = {"checkpoint": "student"}
    values = {
        **{key: folder / name for key, name in models.items()},
        "output_dir": folder / out,
        "data.path": folder / "short",
        "data.seq_length": LENGTH,
        "data.global_batch_size": BATCH,
        "data.split": "80/20/0",
        "trainer.max_steps": STEPS,
        "trainer.limit_val_batches": 1,
        "trainer.val_check_interval": 2,
        "optim.lr": 1e-2,
        "optim.lr_warmup_steps": 1,
        **keys,
    }
    line = [override(key, str(value)) for key, value in values.items()]
    return [stage, *line, *([override("trainer.phases", phases)] if phases else [])]


def _two(folder: Path) -> list[dict[str, Any]]:
    blend = [one | {"path": str(folder / one["path"])} for one in SECOND["blend"]]
    return [{"steps": 2}, {"steps": 2, "data": SECOND | {"blend": blend}}]


def _history(result: Path) -> list[dict[str, float]]:
    return without_speed(json.loads((result / "metrics.json").read_text())["history"])


def test_phases_of_the_same_samples_are_one_training(ranks, folder):
    """Bit for bit: the second phase reads what the training would have read."""
    rows = {"data.path": folder / "rows.npy", "trainer.limit_val_batches": 0}
    last = {"path": str(folder / "last.npy")}
    phases: list[dict[str, Any]] = [{"steps": 2}, {"steps": 2, "data": last}]
    done(*ranks.run(1, run_line, _line(folder, "finetune", "whole", [], **rows)))
    done(*ranks.run(1, run_line, _line(folder, "finetune", "parts", phases, **rows)))
    assert _history(folder / "parts") == _history(folder / "whole")
    whole = read_weights(folder / "whole")
    for name, tensor in read_weights(folder / "parts").items():
        assert torch.equal(tensor, whole[name])


@pytest.fixture(scope="module")
def alone(ranks, folder) -> list[dict[str, float]]:
    """The curve on one rank."""
    done(*ranks.run(1, run_line, _line(folder, "distill", "alone", _two(folder))))
    return _history(folder / "alone")


def test_each_phase_has_its_samples(folder, alone):
    """Tokens of a step, sources and their epochs, and validation losses of both."""
    assert [record["tokens"] for record in alone] == [64, 64, 256, 256]
    sources = [{key for key in record if key.startswith("epochs/")} for record in alone]
    assert sources == [set(), set(), *[{"epochs/0_long", "epochs/1_more"}] * 2]
    assert [bool(record.get("val_kd_loss")) for record in alone] == [False, True, False, True]
    written = json.loads((folder / "alone" / "manifest.json").read_text())
    assert {"trainer.phases.1.data.blend.0.path", "data.path"} <= set(written["inputs"])


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"pipeline_model_parallel_size": 2},
        {"data_parallel_size": 2},
    ],
    ids=["tp2_sp", "pp2", "dp2"],
)
def test_the_curve_is_the_same_at_each_layout(ranks, folder, alone, layout):
    keys = {f"parallel.{key}": value for key, value in layout.items()}
    line = _line(folder, "distill", "-".join(layout), _two(folder), **keys)
    for ending in ranks.run(2, run_line, line):
        done(ending)
    for got, want in zip(_history(folder / "-".join(layout)), alone, strict=True):
        assert got == pytest.approx(want, rel=1e-4)


def test_a_run_that_stopped_in_the_second_phase_goes_on(ranks, folder, alone):
    """Bit for bit; other phases are refused."""
    keys = {"trainer.save_every_n_steps": 1, "trainer.exit_interval": 3}
    line = _line(folder, "distill", "stopped", _two(folder), **keys)
    (ending,) = ranks.run(1, run_line, line)
    assert ending.code == 75
    others = _two(folder)
    others[1]["data"]["seq_length"] = 16
    (ending,) = ranks.run(1, run_line, _line(folder, "distill", "stopped", others, **keys))
    assert ending.code == 2
    assert "trainer.phases" in ending.err
    done(*ranks.run(1, run_line, line))
    assert _history(folder / "stopped") == alone
    weights = read_weights(folder / "alone")
    for name, tensor in read_weights(folder / "stopped").items():
        assert torch.equal(tensor, weights[name])


@pytest.mark.parametrize(
    ("phase", "keys", "says"),
    [
        ({"seq_length": 31}, {"parallel.tensor_model_parallel_size": 2,
                              "parallel.sequence_parallel": "true"},
         "trainer.phases.1.data.seq_length=31 must be a multiple of 2"),
        ({"global_batch_size": 3, "micro_batch_size": 2}, {},
         "trainer.phases.1.data.global_batch_size=3 must be a multiple of "
         "trainer.phases.1.data.micro_batch_size=2"),
        ({"path": "nowhere"}, {}, "trainer.phases.1.data.path=nowhere does not exist"),
        ({"path": "rows.npy"}, {}, "trainer.limit_val_batches=0, or name a source of another form"),
        ({}, {"trainer.max_steps": 5}, "add up to 4, which must be trainer.max_steps=5"),
        ({"seq_lenght": 8}, {}, "trainer.phases.1.data.seq_lenght is not a key of a phase"),
    ],
)  # fmt: skip
def test_bad_phases_are_refused(folder, monkeypatch, phase, keys, says):
    """Before any rank or model, naming the phase and its key."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("WORLD_SIZE", str(keys.get("parallel.tensor_model_parallel_size", 1)))
    phases = [{"steps": 2}, {"steps": 2, "data": phase}]
    ending = run_line(_line(folder, "distill", "refused", phases, **keys))
    assert ending.code == 2
    assert says in ending.err
    assert not (folder / "refused").exists()
