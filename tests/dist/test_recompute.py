"""Recomputed activations change the memory of a step, not its gradients."""

from dataclasses import replace

import pytest

from nemo_minitron.config.parallel import ParallelConfig
from tests.cases.recompute import with_and_without
from tests.helpers.tiny import LLAMA, MIXTRAL, write_weights

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SETTINGS = {
    "uniform": FULL,
    "uniform_2": {**FULL, "recompute_num_layers": 2},
    "block_1": {**FULL, "recompute_method": "block"},
    "selective": {"recompute_granularity": "selective"},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
}
# Forward passes of a student layer's parts per micro-batch, with 2 layers per chunk.
PASSES: dict[str, dict[str, float]] = {
    "uniform": {"core_attn": 2, "mlp": 2, "layer": 2},
    "uniform_2": {"core_attn": 2, "mlp": 2, "layer": 2},
    "block_1": {"core_attn": 1.5, "mlp": 1.5, "layer": 1.5},
    "selective": {"core_attn": 2, "mlp": 1, "layer": 1},
    "mlp": {"core_attn": 2, "mlp": 2, "layer": 1},
}
TP2_SP = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
PP2_VPP2 = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
LAYOUTS = {
    "single": (1, 2, ParallelConfig(), tuple(SETTINGS)),
    "tp2_sp": (2, 2, TP2_SP, ("uniform_2", "mlp")),
    "pp2_vpp2": (2, 4, PP2_VPP2, ("uniform", "selective")),
}


def _pair(folder, config):
    student = replace(config, hidden_size=48)
    write_weights(folder / "student", student, 1)
    write_weights(folder / "teacher", config, 2)
    return (student, str(folder / "student")), (config, str(folder / "teacher"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_gradients(ranks, tmp_path, layout):
    """Bit for bit, and each part of the student runs as often as Megatron's setting says."""
    size, layers, parallel, names = LAYOUTS[layout]
    student, teacher = _pair(tmp_path, replace(LLAMA, num_layers=layers))
    settings = [SETTINGS[name] for name in names]
    results = ranks.run(size, with_and_without, student, teacher, parallel, settings)
    for plain, *found in results:
        parts = ("core_attn", "mlp", "layer")
        assert plain[1] == {f"{who}.{part}": 1 for who in ("student", "teacher") for part in parts}
        for name, (different, passes) in zip(names, found, strict=True):
            assert not different, f"{name}: {different}"
            want = {f"student.{part}": count for part, count in PASSES[name].items()}
            assert passes == {**plain[1], **want}, name


@pytest.mark.parametrize(
    ("config", "module", "part"),
    [(MIXTRAL, "moe", "experts")],
    ids=["moe"],
)
def test_experts(ranks, tmp_path, config, module, part):
    """The student's are computed twice, the teacher's once."""
    student, teacher = _pair(tmp_path, replace(config, num_layers=2))
    setting = {"recompute_granularity": "selective", "recompute_modules": [module]}
    ((_, (different, passes)),) = ranks.run(
        1, with_and_without, student, teacher, ParallelConfig(), [setting]
    )
    assert not different
    assert passes[f"student.{part}"] == 2
    assert passes[f"teacher.{part}"] == passes["student.core_attn"] == 1
