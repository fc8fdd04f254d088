"""A checkpoint written at one layout goes on at another, and bit for bit at its own."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.config.parallel import ParallelConfig
from tests.cases.training import STEPS, train
from tests.helpers.history import without_speed
from tests.helpers.tiny import GLM4_MOE, LLAMA, MIXTRAL, NEMOTRON_H, write_weights

TIED = replace(LLAMA, share_embeddings_and_output_weights=True)
HYBRID = replace(NEMOTRON_H, num_layers=4, hidden_size=48, hybrid_layer_pattern="M*E-")
STUDENT = replace(LLAMA, num_layers=4, hidden_size=48, ffn_hidden_size=64)
PREDICTING = replace(
    replace(GLM4_MOE, moe_router_num_groups=None, moe_router_group_topk=None).resized({}, [0, 1]),
    moe_router_topk=2,
    num_moe_experts=4,
    mtp_num_layers=1,
)
LAYOUTS = {
    "single": (1, ParallelConfig()),
    "tp2": (2, ParallelConfig(tensor_model_parallel_size=2)),
    "tp2_sp": (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
    "pp2": (2, ParallelConfig(pipeline_model_parallel_size=2)),
    "pp2_vpp2": (
        2,
        ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    ),
    "dp2": (2, ParallelConfig()),
    "pp2_dp2": (4, ParallelConfig(pipeline_model_parallel_size=2)),
    "pp2_vpp2_dp2": (
        4,
        ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    ),
    "ep2": (2, ParallelConfig(expert_model_parallel_size=2)),
}
RESUMED_AT = 3
_VALIDATION = ("val_loss", "val_kd_loss")


@pytest.fixture(scope="module")
def runs(ranks, tmp_path_factory):
    """``run(model, layout, work, **over)``, and ``undisturbed(model, layout)`` run once each."""
    folder = tmp_path_factory.mktemp("layouts")
    models = {"dense": (STUDENT, LLAMA), "experts": (replace(MIXTRAL, hidden_size=48), MIXTRAL)}
    models["hybrid"] = (HYBRID, NEMOTRON_H)
    models["prediction"] = (replace(PREDICTING, hidden_size=48), PREDICTING)
    models["tied"] = (replace(STUDENT, share_embeddings_and_output_weights=True), TIED)
    return Runs(ranks, folder, models)


class Runs:
    """Training runs below one folder."""

    def __init__(self, ranks, folder: Path, models) -> None:
        self.ranks, self.folder, self.models = ranks, folder, models
        self.done: dict[Any, Any] = {}

    def run(self, model: str, layout: str, work: Path, **over):
        """Histories and weights of every rank."""
        pair = []
        for seed, config in enumerate(self.models[model], start=1):
            path = self.folder / f"{model}{seed}"
            if not path.exists():
                write_weights(path, config, seed)
            pair.append((config, str(path)))
        size, parallel = LAYOUTS[layout]
        return self.ranks.run(size, train, *pair, parallel, str(work), over)

    def undisturbed(self, model: str, layout: str, **over):
        """Result and folder of a run from the first step to the last."""
        key = f"{model}-{layout}-{sorted(over)}"
        if key not in self.done:
            work = self.folder / key
            self.done[key] = self.run(model, layout, work, **over), work
        return self.done[key]

    def resumed(self, model: str, source: str, layout: str, at: int = RESUMED_AT, **over):
        """Run as ``undisturbed``, but resume from step ``at`` of the run ``source``."""
        _, before = self.undisturbed(model, source, **over)
        work = self.folder / f"{model}-{source}-{layout}-{at}-{sorted(over)}"
        name = f"checkpoints/step={at}"
        shutil.copytree(before / name, work / name)
        return self.run(model, layout, work, **over), work


def _curve(results) -> torch.Tensor:
    """Loss of every step and of every validation, of rank 0; the ranks agree."""
    keys = ("loss", *_VALIDATION)
    curves = [[r[key] for r in history for key in keys if key in r] for history, _ in results]
    assert all(curve == curves[0] for curve in curves)
    return torch.tensor(curves[0], dtype=torch.float64)


def _logged(work: Path) -> dict[str, dict[int, float]]:
    """The losses that TensorBoard shows, each by its place on the horizontal axis."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(work / "logs"))
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if name in ("train/loss", *_VALIDATION)]
    return {name: {one.step: one.value for one in events.Scalars(name)} for name in names}


PAIRS = [
    ("dense", "tp2", "pp2"),
    ("dense", "tp2", "single"),
    ("dense", "single", "tp2_sp"),
    ("dense", "dp2", "tp2"),
    ("dense", "pp2", "dp2"),
    ("dense", "pp2_vpp2", "dp2"),
    ("dense", "dp2", "pp2_vpp2"),
    ("experts", "ep2", "single"),
    ("experts", "single", "ep2"),
    ("hybrid", "tp2_sp", "pp2"),
    ("hybrid", "pp2_vpp2", "dp2"),
    ("hybrid", "ep2", "tp2_sp"),
    ("prediction", "pp2", "tp2_sp"),  # the copy of the embeddings on the last stage is one no more
    ("prediction", "single", "pp2"),
    ("tied", "pp2", "pp2"),
    ("tied", "pp2_dp2", "pp2_dp2"),
    ("tied", "pp2_vpp2", "pp2_vpp2"),
    ("tied", "pp2_vpp2_dp2", "pp2_vpp2_dp2"),
]


@pytest.mark.parametrize(("model", "source", "layout"), PAIRS)
def test_goes_on_at_another_layout(runs, model, source, layout):
    """The loss curve is that of the undisturbed run within 1e-5, validation included.

    So are the gradient norms, which clipping depends on. The vocabulary of 101 is padded at TP 2
    and not elsewhere; the optimizer is distributed.
    """
    (want, _), (got, _) = runs.undisturbed(model, source), runs.resumed(model, source, layout)
    assert got[0][0][-1]["step"] == STEPS
    curve = _curve(want)
    assert len(curve) == STEPS + 4
    torch.testing.assert_close(_curve(got), curve, rtol=0, atol=1e-5)
    norms = [[record["grad_norm"] for record in result[0][0]] for result in (got, want)]
    torch.testing.assert_close(*map(torch.tensor, norms), rtol=1e-4, atol=0)


def test_optimizer_that_is_not_distributed(runs):
    """Its state has another shape in Megatron; it too goes on at another layout."""
    over = {"optim": {"use_distributed_optimizer": False}}
    (want, _), (got, _) = (
        runs.undisturbed("dense", "tp2", **over),
        runs.resumed("dense", "tp2", "pp2", **over),
    )
    torch.testing.assert_close(_curve(got), _curve(want), rtol=0, atol=1e-5)


# Several buckets, with padding between them.
BUCKETS = {"ddp": {"overlap_grad_reduce": True, "bucket_size": 2000}}
SAME = [
    *(("single", at, {}) for at in range(1, STEPS + 1)),  # the last one was not validated yet
    ("single", 3, {"trainer": {"log_every_n_steps": 2}}),
    ("tp2", 3, {}),
    ("pp2_vpp2", 2, {}),
    ("dp2", STEPS, {}),
    ("dp2", 3, {"megatron": BUCKETS}),
    ("dp2", 3, {"precision": "bf16-mixed", "megatron": BUCKETS}),
    ("dp2", 3, {"precision": "bf16-mixed"}),
    ("dp2", 4, {"precision": "bf16-mixed", "optim": {"use_distributed_optimizer": False}}),
]


@pytest.mark.parametrize(("layout", "at", "over"), SAME)
def test_goes_on_bit_for_bit(runs, layout, at, over):
    """History, weights and curves are the same whichever step was the last one saved."""
    want, before = runs.undisturbed("dense", layout, **over)
    got, work = runs.resumed("dense", layout, layout, at, **over)
    for (history, weights), (want_history, want_weights) in zip(got, want, strict=True):
        assert without_speed(history) == without_speed(want_history)
        assert weights.keys() == want_weights.keys()
        assert all(torch.equal(weights[name], want_weights[name]) for name in weights)
    logged, curves = _logged(work), _logged(before)
    assert set(curves) == {"train/loss", "val_loss", "val_kd_loss"}
    for name, curve in curves.items():
        begin = at if name == "train/loss" else at - 1  # what is due at a checkpoint comes after it
        rest = {place: value for place, value in curve.items() if place >= begin}
        assert logged.get(name, {}) == rest, name
