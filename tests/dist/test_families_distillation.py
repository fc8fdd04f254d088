"""Gradients of modules that Llama does not have are the same at every layout.

Weights of query and key norms see only a rank's own heads; biases and norm biases only a rank's
part of the sequence under sequence parallelism; OLMo-2's norms have weights of both kinds, and a
mean square that is a sum over ranks; learned positions are added before it is split. In
multi-latent attention every rank holds the projections to the latents and to the rotated key whole.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_minitron.checkpoint.torch_dist import read_torch_dist
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.families.registry import family_of
from tests.cases.kd import kd_gradients
from tests.cases.live_truth import layout
from tests.helpers.pool import WorkerPool
from tests.helpers.tiny import (
    DEEPSEEK_EXPERTS,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GEMMA2,
    GEMMA3,
    GPT2,
    GPT_OSS,
    GRANITE,
    LLAMA,
    MINISTRAL3,
    MIXTRAL,
    NEMOTRON,
    OLMO2,
    PHI3_LONG,
    QWEN3,
    QWEN3_5,
    QWEN3_NEXT,
    write_weights,
)

TEACHER = replace(LLAMA, num_layers=2, hidden_size=48)
STUDENTS = {
    "qwen3": replace(QWEN3, num_layers=2),
    "windows": replace(QWEN3, num_layers=2, window_size=[5, 0]),
    "olmo2": replace(OLMO2, num_layers=2),
    "granite": replace(GRANITE, num_layers=2),
    "gemma2": replace(GEMMA2, num_layers=2, window_size=[6, 0]),
    "gemma3": replace(GEMMA3, num_layers=2, window_size=[6, 0]),
    "nemotron": replace(NEMOTRON, num_layers=2),
    "gpt2": replace(GPT2, num_layers=2),
    "gpt_oss": GPT_OSS.resized({}, [0, 1]),
    "ministral3": replace(MINISTRAL3, num_layers=2),
    "longrope": replace(PHI3_LONG, num_layers=2),
    "deepseek_v3": replace(DEEPSEEK_V3, num_layers=2),
    "deepseek_v2": replace(DEEPSEEK_V2, num_layers=2),
    "deepseek_experts": DEEPSEEK_EXPERTS.resized({}, [0, 1]),
    "qwen3_next": QWEN3_NEXT.resized({}, [0, 1]),
    "qwen3_5": QWEN3_5.resized({}, [0, 1]),
}
# Only experts can be shared out among ranks.
TEACHERS = {"gpt_oss": replace(MIXTRAL, num_layers=2, hidden_size=48)}
TP2, TP2_SP = layout(tp=2), layout(tp=2, sp=True)
RUNS = {
    "qwen3": {"tp2": TP2, "tp2_sp": TP2_SP},
    "windows": {"tp2_sp": TP2_SP, "pp2": layout(pp=2), "cp2": layout(cp=2)},
    "olmo2": {"tp2": TP2, "tp2_sp": TP2_SP},
    "granite": {"tp2_sp": TP2_SP, "pp2": layout(pp=2), "cp2": layout(cp=2)},
    "gemma2": {"tp2": TP2, "tp2_sp": TP2_SP, "pp2": layout(pp=2), "cp2": layout(cp=2)},
    "gemma3": {"tp2_sp": TP2_SP, "pp2": layout(pp=2)},
    "nemotron": {"tp2_sp": TP2_SP},
    "gpt2": {"tp2_sp": TP2_SP, "pp2": layout(pp=2), "cp2": layout(cp=2)},
    "ministral3": {"tp2_sp": TP2_SP, "pp2": layout(pp=2), "cp2": layout(cp=2)},
    "longrope": {"tp2_sp": TP2_SP, "pp2": layout(pp=2), "cp2": layout(cp=2)},
    "gpt_oss": {
        "tp2_sp": TP2_SP,
        "pp2": layout(pp=2),
        "cp2": layout(cp=2),
        "ep2": layout(dp=2, ep=2),
    },
    "deepseek_v3": {"tp2": TP2, "tp2_sp": TP2_SP, "pp2": layout(pp=2), "cp2": layout(cp=2)},
    "deepseek_v2": {"tp2": TP2, "tp2_sp": TP2_SP},
    "deepseek_experts": {"tp2_sp": TP2_SP, "pp2": layout(pp=2)},
    "qwen3_5": {"tp2": TP2},
    "qwen3_next": {"tp2_sp": TP2_SP, "pp2": layout(pp=2), "cp2": layout(cp=2)},
}


def gradients(
    ranks: WorkerPool, home: Path, student: ModelConfig, parallel: ParallelConfig, name: str
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    teacher = TEACHERS.get(student.family, TEACHER)
    pair = (student, str(home / "student")), (teacher, str(home / "teacher"))
    out = home / name
    sums = ranks.run(parallel.world_size(), kd_gradients, *pair, parallel, str(out), {})
    assert all(s == sums[0] for s in sums), "ranks disagree about the loss"
    store = read_torch_dist(out, family_of(student), student)
    return torch.tensor(sums[0]), {key: lazy.read() for key, lazy in store.items()}


@pytest.mark.parametrize("family", STUDENTS)
def test_gradients_do_not_depend_on_the_layout(
    ranks: WorkerPool, tmp_path: Path, family: str
) -> None:
    student = STUDENTS[family]
    write_weights(tmp_path / "student", student, seed=1)
    write_weights(tmp_path / "teacher", TEACHERS.get(student.family, TEACHER), seed=2)
    want_sums, want = gradients(ranks, tmp_path, student, layout(), "alone")
    for name, parallel in RUNS[family].items():
        sums, got = gradients(ranks, tmp_path, student, parallel, name)
        torch.testing.assert_close(sums, want_sums, rtol=1e-5, atol=1e-6)
        for key, tensor in want.items():
            assert tensor.any(), key
            error = (got[key] - tensor).norm() / tensor.norm()
            assert error < 1e-4, f"{name}: {key}: relative error {error:.2e}"
