"""Every loss on the logits gives one answer on every layout, with and without experts and Mamba."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.config.distillation import LOSS_KINDS
from nemo_minitron.config.parallel import ParallelConfig
from tests.cases.kd import kd_gradients_of_kinds, read_gradients
from tests.helpers.losses import loss_keys
from tests.helpers.tiny import LLAMA, MIXTRAL, NEMOTRON_H, write_weights

# Student and teacher: of different depth, width and, in a pipeline, split.
MODELS = {
    "dense": (
        replace(LLAMA, num_layers=4, hidden_size=32, ffn_hidden_size=48),
        replace(LLAMA, num_layers=8, hidden_size=48),
    ),
    "experts": (
        replace(MIXTRAL, num_layers=2, num_moe_experts=2, moe_ffn_hidden_size=24),
        replace(MIXTRAL, num_layers=4, hidden_size=48),
    ),
    # Of another order of layers, too.
    "hybrid": (
        replace(NEMOTRON_H, num_layers=4, hidden_size=48, hybrid_layer_pattern="M*E-"),
        NEMOTRON_H,
    ),
}
TP2 = {"tensor_model_parallel_size": 2}
SP = {**TP2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
LAYOUTS: dict[str, dict[str, tuple[int, dict[str, Any]]]] = {
    "dense": {
        "TP2": (2, TP2),
        "TP2 SP": (2, SP),
        "PP2": (2, PP2),
        # The teacher keeps equal halves.
        "PP2 uneven": (2, {**PP2, "num_layers_in_first_pipeline_stage": 1}),
        "PP2 VPP2": (2, VPP2),
        "CP2": (2, CP2),
        "DP2": (2, {}),
        "TP2 SP PP2": (4, {**SP, **PP2}),
        "TP2 SP CP2": (4, {**SP, **CP2}),
        "PP2 VPP2 DP2": (4, VPP2),
        "PP2 CP2": (4, {**PP2, **CP2}),
    },
    "experts": {"EP2": (2, EP2), "TP2 SP": (2, SP), "EP2 PP2": (4, {**EP2, **PP2})},
    "hybrid": {
        "TP2 SP": (2, SP),
        "PP2 VPP2": (2, VPP2),
        "CP2": (2, CP2),
        "EP2": (2, EP2),
        "TP2 SP PP2": (4, {**SP, **PP2}),
    },
}
CASES = [(model, layout) for model, layouts in LAYOUTS.items() for layout in layouts]
Found = dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]


@pytest.fixture(scope="module")
def found(ranks, tmp_path_factory) -> Callable[[str, str], Found]:
    """(model, layout) -> kind -> sums and gradients; one run of a layout has them all."""
    home = tmp_path_factory.mktemp("every_loss")
    known: dict[tuple[str, str], Found] = {}
    for model, pair in MODELS.items():
        for seed, (name, config) in enumerate(zip(("student", "teacher"), pair, strict=True), 1):
            write_weights(home / model / name, config, seed)

    def run(model: str, layout: str) -> Found:
        if (model, layout) not in known:
            size, parallel = LAYOUTS[model].get(layout, (1, {}))
            student, teacher = MODELS[model]
            folder = home / model / layout
            outs = {
                str(folder / kind): {"chunk_size": 11, **loss_keys(kind)} for kind in LOSS_KINDS
            }
            pair = (
                (student, str(home / model / "student")),
                (teacher, str(home / model / "teacher")),
            )
            sums = ranks.run(size, kd_gradients_of_kinds, *pair, ParallelConfig(**parallel), outs)
            assert all(s == sums[0] for s in sums), "ranks disagree about a loss"
            known[model, layout] = {
                Path(out).name: (torch.tensor(kind_sums), read_gradients(Path(out), student))
                for kind_sums, out in zip(sums[0], outs, strict=True)
            }
        return known[model, layout]

    return run


@pytest.mark.parametrize(("model", "layout"), CASES, ids=[" ".join(case) for case in CASES])
def test_one_answer(found, gradient_table, model, layout):
    """Loss and every gradient tensor of each kind equal the single rank's."""
    errors = {}
    for kind, (want_sums, want) in found(model, "alone").items():
        sums, got = found(model, layout)[kind]
        torch.testing.assert_close(sums, want_sums, rtol=1e-5, atol=1e-6)
        for name, tensor in want.items():
            errors[kind, name] = float((got[name] - tensor).norm() / tensor.norm())
    worst = max(errors, key=lambda key: errors[key])
    gradient_table.record(
        f"test_every_loss.py::test_one_answer[{model} {layout}]",
        ranks=LAYOUTS[model][layout][0],
        layout=layout + {"experts": ", 2 experts", "hybrid": ", hybrid"}.get(model, ""),
        losses=f"each of the {len(LOSS_KINDS)} on the logits",
        error=errors[worst],
    )
    assert errors[worst] < 1e-4, (worst, errors[worst])
