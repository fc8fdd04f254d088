"""The Python interface on a stock GPTModel of megatron-core, built as another program builds it."""

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch

from nemo_minitron.config.parallel import ParallelConfig
from tests.cases.live_truth import Truth, layout, make_truth
from tests.cases.stock import (
    against_our_own,
    edges,
    experts_split_otherwise,
    half_precision,
    hybrid_refusals,
    of_another_dtype,
    refusals,
    run_page,
    without_groups,
)
from tests.helpers.pool import WorkerPool
from tests.helpers.snippets import REPO, snippets
from tests.helpers.tiny import LLAMA, MIXTRAL, NEMOTRON_H, token_batch, write_weights

MODEL = replace(LLAMA, num_layers=8)
TARGETS = {"hidden_size": 40, "ffn_hidden_size": 64, "num_attention_heads": 4}
LAYOUTS = {
    "TP1": layout(),
    "TP2 PP2": layout(tp=2, pp=2),
    "PP2 VPP2": layout(pp=2, vpp=2),
    "PP4 VPP2": layout(pp=4, vpp=2),
}
# A HybridModel does not keep the base of its rotary positions, nor is it asked to scale them.
STRETCHED = replace(LLAMA, rotary_base=500000.0, rope_scaling={"rope_type": "linear", "factor": 2})
EXPERTS = {"hidden_size": 40, "num_moe_experts": 2, "moe_ffn_hidden_size": 24, "num_layers": 3}
MAMBA = {"ffn_hidden_size": 64, "mamba_num_heads": 4, "mamba_head_dim": 6, "num_layers": 6}
HYBRIDS = {
    "TP1": (STRETCHED, "*-*-*-*-", layout(), {**TARGETS, "num_layers": 3}),
    "TP2 SP": (STRETCHED, "*-*-*-*-", layout(tp=2, sp=True), {**TARGETS, "num_layers": 3}),
    "PP2": (STRETCHED, "*-*|-*-*-", layout(pp=2), {**TARGETS, "num_layers": 3}),
    "experts TP2 SP": (MIXTRAL, "*E*E*E*E", layout(tp=2, sp=True), EXPERTS),
    "mamba TP2 SP PP2": (NEMOTRON_H, "M-M*|MEM-", layout(tp=2, sp=True, pp=2), MAMBA),
}
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def truth(ranks: WorkerPool, tmp_path_factory) -> Truth:
    return make_truth(ranks, tmp_path_factory.mktemp("stock"), MODEL)


def assert_as_ours(found: dict[str, Any], kind: str) -> None:
    """Check what ``against_our_own`` found on a rank, for a model of class ``kind``."""
    assert found["axes"][0] == found["axes"][1]
    assert max(found["scores"].values()) < 1e-5
    assert all(mine == ours for mine, ours in found["meta"].values())
    assert found["plans"][0] == found["plans"][1]
    assert found["class"] == {kind}
    assert found["equal"]
    assert found["logits"] < 1e-5
    assert found["gradients"] < 1e-4


@pytest.mark.parametrize("name", LAYOUTS)
def test_as_our_own_model(ranks: WorkerPool, truth: Truth, name: str) -> None:
    """Scores, kept indices, weights, and gradients of a distillation of the pruned model."""
    parallel: ParallelConfig = LAYOUTS[name]
    targets = {**TARGETS, "num_layers": {"PP2 VPP2": 4, "PP4 VPP2": 8}.get(name, 6)}
    arguments = (MODEL, str(truth.folder), truth.ids, parallel, targets)
    for found in ranks.run(parallel.world_size(), against_our_own, *arguments):
        assert_as_ours(found, "GPTModel")


def test_every_edge_of_the_pipeline_has_a_group(ranks: WorkerPool) -> None:
    """With one communicator for two of them ranks may wait for each other's sends on NCCL."""
    assert ranks.run(2, edges, layout(pp=2, vpp=2)) == [[[0, 1], [0, 1]]] * 2
    found = ranks.run(4, edges, layout(pp=4))
    assert found == [[[0, 3], [0, 1]], [[0, 1], [1, 2]], [[1, 2], [2, 3]], [[2, 3], [0, 3]]]
    assert ranks.run(4, edges, layout(tp=2, pp=2)) == [[[0, 2]] * 2, [[1, 3]] * 2] * 2
    assert ranks.run(1, edges, layout()) == [[]]


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrid_model(ranks: WorkerPool, tmp_path, name: str) -> None:
    """The same of a HybridModel: as our GPT model of whose layers each is two, or as our hybrid."""
    config, pattern, parallel, targets = HYBRIDS[name]
    write_weights(tmp_path / "model", config, seed=0)
    ids = token_batch(4, 16, config.vocab_size)[:, :16].contiguous()
    arguments = (config, str(tmp_path / "model"), ids, parallel, targets, pattern)
    for found in ranks.run(parallel.world_size(), against_our_own, *arguments):
        assert_as_ours(found, "HybridModel")


@pytest.mark.parametrize("split", [False, True], ids=["student's", "teacher's"])
def test_a_teacher_that_splits_sequences_otherwise(
    ranks: WorkerPool, tmp_path, split: bool
) -> None:
    """Sequence parallelism of one of the two models alone."""
    config, pattern, _, targets = HYBRIDS["PP2"]
    write_weights(tmp_path / "model", config, seed=0)
    ids = token_batch(4, 16, config.vocab_size)[:, :16].contiguous()
    parallel, teacher = (layout(tp=2, pp=2, sp=one) for one in (not split, split))
    arguments = (config, str(tmp_path / "model"), ids, parallel, targets, pattern, teacher)
    for found in ranks.run(4, against_our_own, *arguments):
        assert_as_ours(found, "HybridModel")


@pytest.mark.parametrize("ours", [False, True], ids=["stock", "ours"])
def test_a_refusal_leaves_the_weights_alone(ranks: WorkerPool, truth: Truth, ours: bool) -> None:
    arguments = (MODEL, str(truth.folder), LAYOUTS["TP2 PP2"], ours)
    says = {
        "part": "adapter.weight has no row",
        "shallow": "the plan's 'layer' must be some of the model's indices 0 to 7",
        "wide": "the plan's 'hidden' must be some of the model's indices 0 to 63",
        "odd": "pruning.target.ffn_hidden_size to 50 or 52",
        "different": "the ranks were given different plans",
        "setting": "GPTModel: qk_l2_norm=True is not supported; only false",
    }
    for found in ranks.run(4, refusals, *arguments):
        assert len(found) == 5 + (not ours)
        for name, (said, untouched) in found.items():
            assert says[name] in said, name
            assert untouched, name


def test_a_hybrid_model_that_is_refused_is_as_it_was(ranks: WorkerPool, tmp_path) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    write_weights(folder, STRETCHED, seed=0)
    out.mkdir()
    arguments = (STRETCHED, str(folder), "*-*-*-*-", str(out / "hf"))
    said = ranks.run(1, hybrid_refusals, *arguments)[0]
    says = {
        "frequencies": "rotary_pos_emb.inv_freq of the HybridModel is not made of one base",
        "prediction": "hybrid_layer_pattern=*-*-*-*-/*- is not supported; only a pattern without",
        "letter": "hybrid_layer_pattern=*G*G*G*G holds G",
        "sinks": "softmax_type=learnable is not supported; only vanilla in a HybridModel",
        "part": "adapter.weight has no row",
        "half": "hybrid_layer_pattern=*-**-*- has no Hugging Face format in family 'llama'",
    }
    assert said.keys() == says.keys()
    for name, words in says.items():
        assert words in said[name]


def test_a_model_that_was_cast(ranks: WorkerPool, truth: Truth) -> None:
    """Rows that travel are of the dtype that the weights have now."""
    assert all(ranks.run(2, of_another_dtype, MODEL, str(truth.folder), layout(tp=2)))


@pytest.mark.parametrize("wrapped", [True, False])
def test_half_precision_with_and_without_a_wrapper(
    ranks: WorkerPool, truth: Truth, wrapped: bool
) -> None:
    """Megatron's wrapper would make fp32 of the hidden states; a model may also have none."""
    (found,) = ranks.run(1, half_precision, MODEL, str(truth.folder), wrapped)
    assert found == (torch.bfloat16, pytest.approx(0.0, abs=1e-3))


def test_experts_that_are_split_otherwise_are_refused(ranks: WorkerPool, truth: Truth) -> None:
    for said, untouched in ranks.run(2, experts_split_otherwise, MODEL, str(truth.folder)):
        assert "expert_tensor_parallel_size=1 and tensor_model_parallel_size=2" in said
        assert untouched


def test_groups_have_to_be_initialised(ranks: WorkerPool) -> None:
    assert "initialize_model_parallel first" in ranks.run(1, without_groups)[0]


def test_the_page_of_the_interface(ranks: WorkerPool, truth: Truth, tmp_path) -> None:
    """Every block of docs/api.md runs, in an empty folder but for a result."""
    blocks = snippets(REPO / "docs" / "api.md")[3:]  # what is before them makes what is here
    assert [block.kind for block in blocks] == ["python"] * 5
    checkpoint = tmp_path / "runs" / "teacher" / "checkpoint"
    shutil.copytree(truth.folder, checkpoint)
    MODEL.save(checkpoint)
    assert ranks.run(1, run_page, [block.code for block in blocks], str(tmp_path))[0] == [
        "exported/model.safetensors"
    ]
    assert (tmp_path / "runs" / "pruned" / "model.yaml").is_file()
