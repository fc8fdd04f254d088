"""``minitron finetune`` against transformers with torch's AdamW, on several layouts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.bad_input import build, done, line, run_line

STEPS, BATCH = 3, 4
KEYS = {
    "trainer.max_steps": STEPS,
    "trainer.gradient_clip_val": 1.0,
    "trainer.limit_val_batches": 0,
    "trainer.save_every_n_steps": 0,
    "data.global_batch_size": BATCH,
    "data.micro_batch_size": 2,
    "optim.lr": 1e-3,
    "optim.min_lr": 1e-3,
    "optim.lr_decay_style": "constant",
    "optim.weight_decay": 0,
}
LAYOUTS: dict[int, dict[str, object]] = {
    1: {},
    4: {
        "parallel.tensor_model_parallel_size": 2,
        "parallel.sequence_parallel": "true",
        "parallel.pipeline_model_parallel_size": 2,
    },
    8: {
        "data.micro_batch_size": 1,  # an interleaved schedule wants as many as there are stages
        "parallel.context_parallel_size": 2,
        "parallel.data_parallel_size": 2,
        "parallel.pipeline_model_parallel_size": 2,
        "parallel.virtual_pipeline_model_parallel_size": 2,
    },
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    build(folder)
    return folder


@pytest.fixture(scope="module")
def by_torch(home) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of every step, and the final weights under Hugging Face names."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(home / "hf", dtype=torch.float32)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
    )
    ids = torch.from_numpy(np.load(home / "ids.npy").astype(np.int64))
    losses = []
    for step in range(STEPS):
        batch = ids[[(BATCH * step + i) % len(ids) for i in range(BATCH)]]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: weight.detach() for name, weight in model.state_dict().items()}


def test_a_training_that_is_stopped_at_every_step(ranks, home, tmp_path):
    """Checkpoints do not pile up, but the newest ones stay; TensorBoard has each step once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, kept = tmp_path / "out", []
    keys: dict[str, object] = {"trainer.max_steps": 6, "trainer.save_top_k": 2}
    keys |= {"trainer.exit_interval": 1, "exp_manager.create_tensorboard_logger": "true"}
    command = line("finetune", home, out, **{**KEYS, **keys})
    for _ in range(5):
        (ending,) = ranks.run(1, run_line, command)
        assert ending.code == 75, ending.err
        names = [path.name for path in Path(f"{out}.partial").glob("checkpoints/step=*")]
        kept.append(sorted(int(name.removeprefix("step=")) for name in names))
    assert kept == [[1], [1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]]
    done(*ranks.run(1, run_line, command))
    (folder,) = {path.parent for path in out.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("world", LAYOUTS)
def test_losses_and_weights_are_those_of_torch(ranks, home, tmp_path, by_torch, world):
    losses, weights = by_torch
    out = tmp_path / "out"
    for ending in ranks.run(
        world, run_line, line("finetune", home, out, **{**KEYS, **LAYOUTS[world]})
    ):
        done(ending)
    history = json.loads((out / "metrics.json").read_text())["history"]
    assert [record["loss"] for record in history] == pytest.approx(losses, rel=1e-5)
    assert {"kd_loss", "val_kd_loss"}.isdisjoint(history[0])
    done(run_line(line("export", home, tmp_path / "hf", checkpoint=out)))
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    start = load_file(home / "hf" / "model.safetensors")
    for name, found in exported.items():
        # Adam makes steps of lr out of gradients that are rounding errors: compare what moved.
        moved = (weights[name] - start[name]).norm()
        assert (found - weights[name]).norm() < 1e-3 * moved, name
