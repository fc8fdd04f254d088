"""Settings of Megatron's own in training: what they change is memory and time, not the numbers."""

import shutil
from dataclasses import replace

import pytest
import torch

from nemo_minitron.config.parallel import ParallelConfig
from tests.cases.settings import compare_gradients, left_after, trained
from tests.helpers.tiny import LLAMA, MIXTRAL, write_weights

FULL = {"transformer": {"recompute_granularity": "full"}}
# Small buckets, so that several are on their way at a time.
REDUCE = {"ddp": {"overlap_grad_reduce": True, "bucket_size": 2000}}
GATHER = {"ddp": {**REDUCE["ddp"], "overlap_param_gather": True}}
ALIGNED = {"ddp": {**GATHER["ddp"], "align_param_gather": True}}
DP2 = ParallelConfig()
EP2 = ParallelConfig(expert_model_parallel_size=2)
TP2_SP = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
PP2_VPP2 = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
TIED = replace(LLAMA, share_embeddings_and_output_weights=True)
INNER = {
    "intermediate": {"losses": ["embedding", "block_output"], "layer_map": [[1, 1], [3, 3]]},
    "ce_weight": 0.5,
}
CASES = {
    "dp2": (2, LLAMA, DP2, {}),
    "dp2_tied": (2, TIED, DP2, {}),
    "tp2_sp": (2, LLAMA, TP2_SP, {}),
    "pp2_vpp2_dp2": (4, LLAMA, PP2_VPP2, INNER),
    "pp2_vpp2_dp2_tied": (4, TIED, PP2_VPP2, INNER),
    "dp2_ep2": (2, MIXTRAL, EP2, {}),
}
STEPS = {"trainer": {"max_steps": 5, "save_every_n_steps": 3}}


def _pair(folder, config):
    student = replace(config, hidden_size=48)
    write_weights(folder / "student", student, 1)
    write_weights(folder / "teacher", config, 2)
    return (student, str(folder / "student")), (config, str(folder / "teacher"))


@pytest.mark.parametrize("case", ["dp2", "tp2_sp", "pp2_vpp2_dp2_tied", "dp2_ep2"])
def test_gradients(ranks, tmp_path, case):
    """Recomputed layers and overlapped reduction give the gradients of a run without."""
    size, config, parallel, over = CASES[case]
    args = (*_pair(tmp_path, config), parallel, [FULL, REDUCE], over)
    found = ranks.run(size, compare_gradients, *args)
    # Megatron divides the first chunk of the first stage alone.
    assert sum(reduce.buckets - plain.buckets for plain, _, reduce in found) > 0
    for plain, full, reduce in found:
        assert full.difference == 0
        # The pass that measures intermediate losses first has no backward; depths are equal.
        again = plain.passes["student"] + plain.passes["teacher"]
        assert full.passes == {**plain.passes, "student": again}, "the student's layers alone"
        assert full.settings == {"recompute_granularity": "full", "recompute_num_layers": 1}
        assert reduce.difference < 1e-6
        assert reduce.passes == plain.passes


def test_exchange_between_stages_beside_computation(ranks, tmp_path):
    """And a stage that runs more micro-batches in a row than there are stages."""
    size, config, parallel, over = CASES["pp2_vpp2_dp2_tied"]
    beside = {"transformer": {"overlap_p2p_comm": True}}
    longer = {"transformer": {**beside["transformer"], "microbatch_group_size_per_vp_stage": 4}}
    args = (*_pair(tmp_path, config), parallel, [beside, longer], over)
    for _, *found in ranks.run(size, compare_gradients, *args):
        assert all(one.difference < 1e-6 for one in found)


@pytest.mark.parametrize("case", ["dp2_tied", "pp2_vpp2_dp2", "dp2_ep2"])
def test_weights(ranks, tmp_path, case):
    """Weights gathered in the next forward pass are those of a run that waits for them.

    Validation, checkpoints and the result read them too.
    """
    size, config, parallel, over = CASES[case]
    pair, over = _pair(tmp_path, config), {**over, **STEPS}
    sections = {"plain": {}, "gather": GATHER, "aligned": ALIGNED, "resumed": GATHER}
    names = ["plain", "gather"] + (["aligned", "resumed"] if case != "dp2_ep2" else [])
    found = {}
    for name in names:
        work = tmp_path / name
        if name == "resumed":  # from what the run without overlap has saved
            shutil.copytree(tmp_path / "plain/checkpoints/step=3", work / "checkpoints/step=3")
        found[name] = ranks.run(size, trained, *pair, parallel, str(work), sections[name], over)
    for name in names[1:]:
        for (history, weights), (wanted, want) in zip(found[name], found["plain"], strict=True):
            for record, reference in zip(history, wanted, strict=True):
                for key in ("loss", "val_loss"):
                    assert record.get(key) == pytest.approx(reference.get(key), abs=1e-5), name
            for key, weight in want.items():
                torch.testing.assert_close(weights[key], weight, rtol=0, atol=1e-5, msg=key)


def test_memory_is_freed(ranks, tmp_path):
    """The hooks that wait for weights are gone with the training that needed them."""
    pair = _pair(tmp_path, replace(LLAMA, num_layers=2))
    for left in ranks.run(2, left_after, *pair, DP2, str(tmp_path / "run"), GATHER):
        assert not left
