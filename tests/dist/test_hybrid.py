"""A hybrid of Mamba-2, attention, MLP and experts has one answer at every layout, too.

As ``test_prune_live.py`` for GPT models: scores, kept indices and weights of one rank.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.checkpoint.foreign.megatron_open import open_megatron
from nemo_minitron.checkpoint.torch_dist import read_torch_dist
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import PruningConfig, TargetConfig
from tests.cases.kd import kd_gradients, read_gradients
from tests.cases.live_truth import Truth, layout, make_truth, one_answer
from tests.helpers.layout_table import LayoutTable
from tests.helpers.pool import WorkerPool
from tests.helpers.tiny import NEMOTRON_H, write_weights

# Without sequence parallelism Megatron-Core splits no experts over tensor-parallel ranks.
DENSE = replace(
    NEMOTRON_H,
    hybrid_layer_pattern="M-M*M-M*",
    num_moe_experts=None,
    moe_ffn_hidden_size=None,
    moe_shared_expert_intermediate_size=None,
    moe_router_score_function="softmax",
    moe_router_enable_expert_bias=False,
    moe_router_topk_scaling_factor=None,
)
WIDTH = {
    "hidden_size": 40,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "mamba_num_heads": 4,
    "mamba_head_dim": 6,
}
EXPERTS = {
    "num_moe_experts": 2,
    "moe_ffn_hidden_size": 16,
    "moe_shared_expert_intermediate_size": 16,
}
TEST = "test_hybrid.py::test_one_answer[{}]"
pytestmark = pytest.mark.timeout(300)

LAYOUTS = {
    "TP2": layout(tp=2),
    "TP2 SP": layout(tp=2, sp=True),
    "PP2": layout(pp=2),
    "PP2 VPP2": layout(pp=2, vpp=2),
    "CP2": layout(cp=2),
    "DP2": layout(dp=2),
    "EP2": layout(dp=2, ep=2),
    "TP2 SP PP2": layout(tp=2, sp=True, pp=2),
    "TP2 SP EP2": layout(tp=2, sp=True, dp=2, ep=2),
    "PP2 EP2": layout(pp=2, dp=2, ep=2),
    "PP2 CP2": layout(pp=2, cp=2),
}


def prunings(model: ModelConfig) -> dict[str, PruningConfig]:
    """Width, depth and both; a hybrid model can be split over the pipeline anywhere."""
    width = WIDTH if model.num_moe_experts is None else {**WIDTH, **EXPERTS}
    return {
        "width": PruningConfig(target=TargetConfig(width)),
        "depth": PruningConfig(target=TargetConfig(num_layers=6)),
        "both": PruningConfig(target=TargetConfig(width, num_layers=6)),
    }


@pytest.fixture(scope="module")
def truths(ranks: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Truth]:
    models = {"dense": DENSE, "experts": NEMOTRON_H}
    return {
        name: make_truth(ranks, tmp_path_factory.mktemp(name), model)
        for name, model in models.items()
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_answer(
    truths: dict[str, Truth], layout_table: LayoutTable, tmp_path: Path, name: str
) -> None:
    parallel = LAYOUTS[name]
    truth = truths["dense" if name == "TP2" else "experts"]
    ways = prunings(truth.config)
    one_answer(truth, parallel, ways, tmp_path, layout_table, TEST.format(name), f"hybrid {name}")


# ---------------------------------------------------------------- distillation

# Fewer and other layers, and narrower ones.
SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "mamba_num_heads": 4,
    "num_attention_heads": 4,
    "num_query_groups": 2,
}
STUDENTS = {
    "dense": replace(DENSE, hybrid_layer_pattern="M*-M", num_layers=4, **SMALL),
    "experts": replace(NEMOTRON_H, hybrid_layer_pattern="M*EM-M*E", num_moe_experts=2, **SMALL),
}
TEACHERS = {"dense": DENSE, "experts": NEMOTRON_H}
INNER = {"losses": ["block_output"], "layer_map": [[4, 1]], "alpha": 0.5}


@dataclass
class KdPairs:
    """Teachers and students on disk; losses and gradients of one step, kept by layout."""

    ranks: WorkerPool
    home: Path
    known: dict[str, tuple[list[float], dict[str, torch.Tensor]]] = field(default_factory=dict)

    def gradients(
        self, kind: str, name: str, parallel: ParallelConfig
    ) -> tuple[list[float], dict[str, torch.Tensor]]:
        folder = self.home / kind
        student, teacher = folder / "student", folder / "teacher"
        if not folder.exists():
            write_weights(student, STUDENTS[kind], seed=1)
            write_weights(teacher, TEACHERS[kind], seed=2)
        key = f"{kind} {name}"
        if key not in self.known:
            pair = (STUDENTS[kind], str(student)), (TEACHERS[kind], str(teacher))
            over = {"intermediate": INNER}
            world = parallel.world_size()
            sums = self.ranks.run(world, kd_gradients, *pair, parallel, str(folder / name), over)
            assert all(one == sums[0] for one in sums), "ranks disagree about the loss"
            self.known[key] = sums[0], read_gradients(folder / name, STUDENTS[kind])
        return self.known[key]


@pytest.fixture(scope="module")
def kd(ranks: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> KdPairs:
    return KdPairs(ranks, tmp_path_factory.mktemp("kd"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_do_not_depend_on_the_layout(kd: KdPairs, name: str) -> None:
    kind = "dense" if name == "TP2" else "experts"
    want_sums, want = kd.gradients(kind, "alone", layout())
    sums, got = kd.gradients(kind, name, LAYOUTS[name])
    assert sums == pytest.approx(want_sums, rel=1e-5, abs=1e-6)
    for key, tensor in want.items():
        error = (got[key] - tensor).norm() / tensor.norm()
        assert error < 1e-4, f"{key}: relative error {error:.2e}"


def test_it_opens_as_a_checkpoint_of_megatron_lm(truths: dict[str, Truth]) -> None:
    """From the arguments beside the weights: the same sizes, the same tensors."""
    for truth in truths.values():
        found = open_megatron(truth.folder, None, truth.config.vocab_size)
        assert replace(found.config, hf={}) == truth.config
        expected = read_torch_dist(truth.folder, found.family, truth.config)
        assert found.store.keys() == expected.keys()
        assert all(torch.equal(found.store[key].read(), expected[key].read()) for key in expected)


def test_head_channels_are_chosen_before_heads(truths: dict[str, Truth]) -> None:
    """Heads are ranked inside their group, by the channels that stay (2504.11409, section 3.1)."""
    truth = truths["dense"]
    target = TargetConfig(mamba_num_heads=4, mamba_head_dim=4)
    plan = truth.plan(PruningConfig(target=target))
    scores = truth.scores["mamba_head"]
    for layer in (0, 2, 4, 6):
        channels = scores[layer].square().sum(dim=0).argsort(descending=True)[:4].sort().values
        assert plan["mamba_head_dim"][layer] == channels.tolist()
        heads = scores[layer][:, channels].square().sum(dim=1)
        best = [group * 4 + int(i) for group in (0, 1) for i in heads[4 * group :][:4].topk(2)[1]]
        assert plan["mamba_head"][layer] == sorted(best)
    assert plan["mamba_head"][1] == []  # an MLP has none


def test_a_plan_that_leaves_no_layer_of_a_kind_is_refused(truths: dict[str, Truth]) -> None:
    drop = PruningConfig(drop_layers=[6])
    with pytest.raises(ValueError, match=r"all layers of kind 'E' .* which are \[6\]"):
        truths["experts"].plan(drop)
